# Everything a person does with this tree. `make help` lists it.
# The virtual environment and the native build are made by what needs them, and only when out of date.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_OUT ?= demo
BENCH_OUT ?= bench
BENCH_ARGS ?=
EMULATE ?= conroe nehalem haswell aarch64
FUZZ_ARGS ?=
WHEEL_ARGS ?=
SANITIZE_ARGS ?=
MINIMUM := 3.11

BIN := $(VENV)/bin
NATIVE := pyproject.toml setup.py CMakeLists.txt $(wildcard bncpu/cpu/*.pyx bncpu/cpu/*.pxi bncpu/cpu/*.hpp)
OURS := bncpu tests benchmarks docs tools setup.py
CPP := $(wildcard bncpu/cpu/*.hpp bncpu/cuda/*.cu tests/emulated_cuda/* benchmarks/*.cpp tools/*.hpp)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-large bench sanitize gpu emulate docs lint format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter (now $(PYTHON)), VENV= the environment (now $(VENV))"

demo: $(VENV)/.installed ## the paper's figure 1 on handwritten digits, with and without BN, then the speed of the kernels
	$(BIN)/bncpu reproduce mnist --dataset digits --out $(DEMO_OUT)
	$(BIN)/bncpu bench --quick

test: $(VENV)/.installed ## run all tests (PYTEST_ARGS="-k layouts -x" narrows them)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-large: $(VENV)/.installed ## the tests of arrays beyond 2^31 elements: minutes, and up to 19 GB of memory
	$(BIN)/python -m pytest -m large -rs $(PYTEST_ARGS)

fuzz: $(VENV)/.installed ## 100,000 random calls against the reference (FUZZ_ARGS="--seed 1 --examples 5000")
	$(BIN)/python tools/fuzz_calls.py $(FUZZ_ARGS)

bench: $(VENV)/.installed ## measure against all peers: JSON and figures into bench/ (BENCH_ARGS=--quick: sooner)
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest benchmarks --benchmark-json=$(BENCH_OUT)/operations.json \
	  --benchmark-max-time=0.3 --benchmark-columns=median,iqr,rounds $(BENCH_ARGS) $(PYTEST_ARGS)
	$(BIN)/python benchmarks/figures.py --out $(BENCH_OUT) $(BENCH_ARGS)
	@echo "measurements and figures: $(BENCH_OUT)/"

sanitize: $(VENV)/.installed ## run the kernels under sanitizers: clang, its runtime, libomp (SANITIZE_ARGS=--quick: sooner)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check cmake ninja "cython>=3.1" "cython-cmake>=0.3"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/sanitize.py $(SANITIZE_ARGS)

gpu: ## with an NVIDIA GPU: build, test and measure there with PYTHON's own packages, without network (OUT=folder)
	$(PYTHON) benchmarks/on_gpu.py --out $(or $(OUT),gpu)

emulate: ## the kernels' tests as on other processors, under QEMU (EMULATE="aarch64": that one alone)
	for machine in $(EMULATE); do $(PYTHON) tools/emulate.py $$machine || exit 1; done

docs: $(VENV)/.installed-dev ## build the documentation into build/docs/html, without network; a warning is an error
	$(BIN)/python -P -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --quiet \
	  --doctree-dir build/docs/doctrees docs build/docs/html
	@echo "documentation: build/docs/html/index.html"

lint: $(VENV)/.installed-dev ## check style, types, imports and the C++ and Cython sources
	$(BIN)/ruff check $(OURS)
	$(BIN)/ruff format --check $(OURS)
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint bncpu
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(OURS)
	$(BIN)/ruff format $(OURS)
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/.installed-dev ## sdist and wheel into dist/, with its OpenMP runtime, checked, installed, tested (WHEEL_ARGS=--twice)
	$(BIN)/python tools/wheel.py $(WHEEL_ARGS)

clean: ## remove everything that was made here
	rm -rf $(VENV) build dist gpu $(DEMO_OUT) $(BENCH_OUT) *.egg-info .benchmarks .coverage .hypothesis .*_cache
	rm -f bncpu/cpu/*.so bncpu/cpu/*.pyd
	find bncpu tests benchmarks docs tools -name __pycache__ -prune -exec rm -rf {} +

# An environment stays with the interpreter that made it.
IDENTITY := import platform, sys; print(platform.python_version(), sys.base_prefix)
ifneq ($(filter-out file,$(origin PYTHON)),)
ifneq ($(wildcard $(VENV)/.created),)
ifneq ($(filter demo test fuzz test-large bench docs lint format wheel,$(MAKECMDGOALS)),)
ifneq ($(shell cat $(VENV)/.created),$(shell $(PYTHON) -c '$(IDENTITY)'))
$(error $(VENV) was made by Python $(shell cat $(VENV)/.created), not by $(PYTHON): `make clean`, or choose another with VENV=)
endif
endif
endif
endif

# Without compiled modules in the tree, an installed editable package is an empty promise.
BUILT := $(if $(wildcard bncpu/cpu/detect*.so),,unbuilt)
.PHONY: unbuilt
unbuilt:

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MINIMUM)".split("."))))' \
	  || { echo "bncpu needs Python >= $(MINIMUM), and '$(PYTHON)' is not: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "'$(PYTHON)' cannot make virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c '$(IDENTITY)' > $@

$(VENV)/.installed: $(VENV)/.created $(NATIVE) $(BUILT)
	@echo "building bncpu and installing what it needs into $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(NATIVE) $(BUILT)
	@echo "building bncpu and installing the developers' tools into $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(VENV)/.installed $@
