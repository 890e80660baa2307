# make demo   train attention and its convolutional twin on the packaged images, and draw what they see
# make check  lint, types and a sample of the unit tests, in under three minutes
# make test   the test suite, C++ kernels under sanitizers first; a sample of the slowest tests (.ci/nightly: all)
# make bench  measure and write benchmarks/results/; make bench-gpu: on a GPU
# make zoo    convert other people's networks, 243 of them, and write docs/zoo.md
# make notebooks   run the notebooks of docs/notebooks and save them with their output
# make docs   the documentation site, warnings as errors, into build/docs
# make wheel  sdist and wheel, tested in a clean environment without a compiler
# make lint   ruff, pyright and clang-format
# make results   bench and demo, copied to where README and docs use them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp)
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/tests/*.h csrc/tests/*.cpp)

.PHONY: demo check test sanitize sanitize-gpu bench bench-gpu zoo notebooks results docs wheel lint format clean

demo: $(INSTALLED)
	$(BIN)/sasa demo --out runs/demo

# one case of each test, excluding those that train or start processes
check: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -q --sample 1 -m "not slow and not nightly" --ignore=tests/train --ignore=tests/study --ignore=tests/detection

# in two processes, whose threads sleep while they wait for each other; training and studies, which start their own
# processes, on one thread each
test: sanitize
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not nightly" --ignore=tests/train --ignore=tests/study --ignore=tests/detection
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not nightly" tests/train tests/study tests/detection

# the kernels alone, on a grid of problems: bad addresses and undefined behaviour, on every instruction set of this
# machine; data races, which don't depend on the instruction set, on one
CORES := $(shell getconf _NPROCESSORS_ONLN)
CAPABILITIES := $(shell grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null && echo 4 || (grep -q avx512dq /proc/cpuinfo 2>/dev/null && echo 3 || echo 2))
sanitize: $(INSTALLED)
	$(BIN)/cmake -G "Unix Makefiles" -B build/sanitize/address -DSASA_SANITIZE=address,undefined -DSASA_CAPABILITIES=$(CAPABILITIES)
	$(BIN)/cmake --build build/sanitize/address --parallel $(CORES)
	build/sanitize/address/sasa_driver
	$(BIN)/cmake -G "Unix Makefiles" -B build/sanitize/thread -DSASA_SANITIZE=thread -DSASA_CAPABILITIES=1
	$(BIN)/cmake --build build/sanitize/thread --parallel $(CORES)
	build/sanitize/thread/sasa_driver 2 7

# on a machine with a GPU: the Triton kernels' memory accesses and races, under NVIDIA's compute-sanitizer
sanitize-gpu: $(INSTALLED)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest tests/ops/test_triton.py tests/ops/test_block_attention.py -k "results or half or finite"
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest tests/ops/test_triton.py tests/ops/test_block_attention.py -k "results or half or finite"

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.run --device cuda

zoo: $(VENV)/.zoo
	$(BIN)/python -m tests.zoo

notebooks: $(VENV)/.notebooks
	$(BIN)/python docs/notebooks/execute.py

# the figures of README and docs
results: bench demo
	mkdir -p docs/demo
	cp runs/demo/results.json runs/demo/curves.png runs/demo/attention.png docs/demo/
	$(BIN)/python -m benchmarks.drawing
	$(BIN)/python -m benchmarks.readme

docs: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" OMP_WAIT_POLICY=passive $(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

wheel: $(INSTALLED)
	.ci/wheel

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

$(INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[all]'
	touch $@

$(VENV)/.zoo: $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[zoo]'
	touch $@

$(VENV)/.notebooks: $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[notebooks]'
	touch $@

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache .hypothesis
