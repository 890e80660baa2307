# make demo   train attention and its convolutional twin on the packaged images, and draw what they see
# make test   the whole test suite
# make bench  measure and write benchmarks/results/
# make lint   ruff and pyright
# make results   bench and demo, copied to where the README shows them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test bench results lint format clean

demo: $(INSTALLED)
	$(BIN)/sasa demo --out runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

# the figures and pictures that the README shows
results: bench demo
	mkdir -p docs/demo
	cp runs/demo/results.json runs/demo/curves.png runs/demo/attention.png docs/demo/
	$(BIN)/python -m benchmarks.readme

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

KERNELS := CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp)

$(INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[all]'
	touch $@

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache .hypothesis
