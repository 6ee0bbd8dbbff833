# Every verb makes the environment it needs, once. Where another Python is wanted:
#   make test PYTHON=python3.12
# and where another build of torch is wanted:
#   make test TORCH='torch==2.9.1'
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Tests and examples are many small operations: more threads only wait for one another.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

# ArviZ 1.x wants Python 3.12 or later, and neither torch nor this package. Name one by
#   make test-arviz ARVIZ_PYTHON=python3.13
ARVIZ_PYTHON = python3.14 python3.13 python3.12 python3 \
  $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.1[2-9]*/bin/python)
ARVIZ_VENV ?= .venv-arviz

# Triton comes with the torch of a machine with a GPU; elsewhere its interpreter runs the kernels.
TRITON ?= .triton

PYTEST_ARGS ?= -n 2
DEMO_OUT ?= out/demo

.PHONY: help demo test test-slow test-arviz test-triton lint format benchmark clean

help:
	@echo 'make demo       train and compare estimators on scikit-learn digits (minutes)'
	@echo 'make test       the test suite (minutes)'
	@echo 'make test-slow  the long statistical tests and the long examples'
	@echo 'make test-arviz the part that differs between ArviZ 0.x and 1.x, on 1.x'
	@echo 'make test-triton the kernels for GPUs, on a CPU by the interpreter of Triton'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     rewrite the sources in the one format'
	@echo 'make benchmark  time what the package does against plain PyTorch and Pyro'

demo: $(STAMP)
	$(BIN)/python examples/vae.py --out $(DEMO_OUT) --seeds 2 $(DEMO_FLAGS) \
	  --compare reinmax,gumbel_straight_through,straight_through,score:4

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

# A Python that is on PATH may refuse to run, as shims of version managers do: each is tried.
test-arviz:
	@[ -e $(ARVIZ_VENV)/.ready ] || for python in $(ARVIZ_PYTHON); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || continue; \
	  echo "making $(ARVIZ_VENV), once, by $$($$python --version)"; \
	  $$python -m venv $(ARVIZ_VENV) && $(ARVIZ_VENV)/bin/python -m pip install --quiet \
	    'arviz[matplotlib,h5netcdf]>=1' pytest && touch $(ARVIZ_VENV)/.ready || exit 1; \
	  break; \
	done
	@if [ -e $(ARVIZ_VENV)/.ready ]; then \
	  $(ARVIZ_VENV)/bin/python -m pytest --noconftest -p no:cacheprovider tests/test_arviz.py; \
	else echo 'notice: no Python 3.12 or later is found, so ArviZ 1.x is left untested'; fi

test-triton: $(STAMP)
	@[ -e $(TRITON)/.ready ] || { echo 'fetching $(TRITON), once'; \
	  $(BIN)/python -m pip install --quiet --no-deps --target $(TRITON) triton && \
	  touch $(TRITON)/.ready; }
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 \
	  $(BIN)/python -m pytest $(PYTEST_ARGS) tests/distributions/test_fused_draw.py

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

clean:
	rm -rf $(VENV) $(ARVIZ_VENV) $(TRITON) out build dist .mypy_cache .pytest_cache .ruff_cache

# The torch of a machine without an NVIDIA GPU is pinned on the Python that the tests run on, so
# that pip can take the CPU build; with a GPU pip takes its default build, which brings CUDA.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: name a newer one, make PYTHON=python3.12"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || \
	  { echo 'no venv module: install the package python3-venv (or the like)'; exit 1; }
	@echo 'making $(VENV), once: this fetches torch and takes a few minutes'; \
	torch='$(TORCH)'; \
	if [ -z "$$torch" ]; then torch='torch>=2.4'; \
	  if ! command -v nvidia-smi >/dev/null 2>&1 && \
	    $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
	  then torch='torch==2.13.0'; fi; fi; \
	$(BIN)/python -m pip install --quiet "$$torch" --editable '.[dev]'
	@touch $@
