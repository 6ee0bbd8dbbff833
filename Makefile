# Each target creates the environment that it needs, once. To use another Python:
#   make test PYTHON=python3.12
# To use another build of torch:
#   make test TORCH='torch==2.13.0'
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
DOCS_STAMP := $(VENV)/.docs-ready

# Tests and examples run many small operations, which are slower on more threads.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

# The tests on ArviZ 1.x need Python 3.12 or later, without torch and this package. To choose one:
#   make test-arviz ARVIZ_PYTHON=python3.13
ARVIZ_PYTHON = python3.14 python3.13 python3.12 python3 \
  $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.1[2-9]*/bin/python)
ARVIZ_VENV ?= .venv-arviz

# Lightning and scvi-tools need many packages, so their tests have an environment of their own.
TRAINERS_VENV ?= .venv-trainers

# torch for CUDA includes Triton. Elsewhere Triton's interpreter runs the kernels on the CPU.
TRITON ?= .triton

PYTEST_ARGS ?= -n 2
DEMO_OUT ?= out/demo
OUT ?= out/gpu

.PHONY: help demo test test-slow test-arviz test-triton test-trainers lint format benchmark gpu docs spelling clean

help:
	@echo 'make demo         train and compare estimators on digits (minutes)'
	@echo 'make test         run the test suite (minutes)'
	@echo 'make test-slow    run the long statistical tests and the long examples'
	@echo 'make test-arviz   test the code that depends on the ArviZ version, on ArviZ 1.x'
	@echo 'make test-triton  test the GPU kernels on a CPU, by the Triton interpreter'
	@echo 'make test-trainers  test the examples of Lightning and scvi-tools (minutes)'
	@echo 'make lint         run ruff and mypy'
	@echo 'make format       format the sources'
	@echo 'make benchmark    time the package against plain PyTorch and Pyro'
	@echo 'make gpu          test, train, time and profile on a GPU, with $$(PYTHON) as it is'
	@echo 'make docs         build the manual in out/docs; its tutorials run (minutes)'
	@echo 'make spelling     run codespell'
	@echo 'make clean        remove environments, outputs and caches'

demo: $(STAMP)
	$(BIN)/python examples/vae.py --out $(DEMO_OUT) --seeds 2 $(DEMO_FLAGS) \
	  --compare reinmax,gumbel_straight_through,straight_through,score:4

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

# Try each Python, since one on PATH may fail to run (a shim of a version manager).
test-arviz:
	@[ -e $(ARVIZ_VENV)/.ready ] || for python in $(ARVIZ_PYTHON); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || continue; \
	  echo "creating $(ARVIZ_VENV) once, with $$($$python --version)"; \
	  $$python -m venv $(ARVIZ_VENV) && $(ARVIZ_VENV)/bin/python -m pip install --quiet \
	    'arviz[matplotlib,h5netcdf]>=1' pytest && touch $(ARVIZ_VENV)/.ready || exit 1; \
	  break; \
	done
	@if [ -e $(ARVIZ_VENV)/.ready ]; then \
	  $(ARVIZ_VENV)/bin/python -m pytest --noconftest -p no:cacheprovider tests/test_arviz.py; \
	else echo 'notice: skipped tests on ArviZ 1.x, since Python 3.12 or later was not found'; fi

test-triton: $(STAMP)
	@[ -e $(TRITON)/.ready ] || { echo 'installing Triton into $(TRITON), once'; \
	  $(BIN)/python -m pip install --quiet --no-deps --target $(TRITON) triton && \
	  touch $(TRITON)/.ready; }
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 \
	  $(BIN)/python -m pytest $(PYTEST_ARGS) tests/distributions/test_triton.py

test-trainers:
	@[ -e $(TRAINERS_VENV)/.ready ] || { echo 'creating $(TRAINERS_VENV), once'; \
	  $(PYTHON) -m venv $(TRAINERS_VENV) && $(TRAINERS_VENV)/bin/python -m pip install --quiet \
	    '$(or $(TORCH),torch==2.13.0)' --editable '.[test,lightning,scvi]' && \
	  touch $(TRAINERS_VENV)/.ready; }
	$(TRAINERS_VENV)/bin/python examples/lightning_vae.py --smoke --devices 2 --gradient rebar
	$(TRAINERS_VENV)/bin/python examples/scvi_mixture.py --smoke
	$(TRAINERS_VENV)/bin/python -m pytest -p no:cacheprovider -W default -m '' \
	  tests/examples/test_lightning_vae.py tests/examples/test_scvi_mixture.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

benchmark: $(STAMP)
	@for script in tests/benchmarks/[a-z]*.py; do \
	  echo "== $$script"; $(BIN)/python "$$script" $(BENCHMARK_FLAGS) || exit 1; \
	done

# Warnings are errors, among them links to a page or name that does not exist.
# $(PYTHON) needs the packages of pyproject.toml; this package need not be installed:
#   make gpu PYTHON=python3.12 OUT=out/gpu
gpu:
	$(PYTHON) tests/gpu/run.py --out $(OUT) $(if $(SMOKE),--smoke)

docs: $(DOCS_STAMP)
	rm -rf docs/api
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -d out/docs-state docs out/docs
	@echo 'the manual is out/docs/index.html'

spelling: $(DOCS_STAMP)
	$(BIN)/python -m codespell_lib

clean:
	rm -rf docs/api $(VENV) $(ARVIZ_VENV) $(TRAINERS_VENV) $(TRITON) out build dist \
	  .mypy_cache .pytest_cache .ruff_cache

# Without an NVIDIA GPU, Python 3.11 gets a fixed version of torch, so that pip can find its CPU
# build. With a GPU pip installs the default build, which includes CUDA.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; give a newer one: make PYTHON=python3.12"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || \
	  { echo 'the venv module is missing: install python3-venv or a similar package'; exit 1; }
	@echo 'creating $(VENV) once; this downloads torch and takes a few minutes'; \
	torch='$(TORCH)'; \
	if [ -z "$$torch" ]; then torch='torch>=2.13'; \
	  if ! command -v nvidia-smi >/dev/null 2>&1 && \
	    $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
	  then torch='torch==2.13.0'; fi; fi; \
	$(BIN)/python -m pip install --quiet "$$torch" --editable '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@echo 'installing what the manual needs, once'
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@
