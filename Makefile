# make demo   train attention and its convolutional twin on the packaged images, and draw what they see
# make test   the whole test suite
# make bench  measure and write benchmarks/results/
# make lint   ruff and pyright
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test bench lint format clean

demo: $(INSTALLED)
	$(BIN)/sasa demo --out runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[all]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
