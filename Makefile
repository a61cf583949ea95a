# Two commands do all the set-up, each with an environment of its own:
#
#   make demo    a base model and the fused one side by side
#   make test    all quality gates
#
# and a third one, with the oldest versions that are supported (docs/versions.md):
#
#   make oldest  the tests of decoding
#
# PYTHON     the interpreter that makes the environments, 3.10 or later
# WORKERS    processes that run the tests
# PIP_FLAGS  passed to pip; on Linux without a GPU, this saves gigabytes of CUDA libraries:
#            make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
WORKERS ?= 2
PIP_FLAGS ?=

VENV := .venv
DEMO := .venv-demo
OLDEST := .venv-oldest
SHIPPED := $(wildcard calibration_ckpts/*/calibrator.json examples/demo_target/model/config.json)
SOURCES := $(shell find fusion_detox -name '*.py')
# Of everything between a model and its text; evaluation and training have extras of their own.
DECODING := tests/alignment tests/calibrator tests/conformance tests/decoding tests/generation tests/isolation \
    tests/vocabulary tests/test_families.py tests/test_fusion.py tests/test_layers.py tests/test_lightness.py \
    tests/test_processor.py tests/test_versions.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest oldest clean

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile

demo: $(DEMO)/.installed
	$(DEMO)/bin/fusion-detox demo

# One after the other, also under make -j: the first failure is the last thing on the screen.
test: $(VENV)/.installed
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory pytest

lint: $(VENV)/.installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/python -m mypy --strict

# One thread a process: the tiny models of the tests gain nothing from more.
pytest: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

# torch 2.4 and 2.5 warn of their own unpickling.
oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile \
    -W 'ignore:You are using:FutureWarning' $(DECODING)

clean:
	rm -rf $(VENV) $(DEMO) $(OLDEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# $(call environment,FOLDER,WHAT TO INSTALL,CONSTRAINTS). An environment whose stamp is missing was
# never finished, and is made anew.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
    echo "fusion_detox needs Python 3.10 or later, but '$(PYTHON)' is" \
        "$$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
    echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu:" \
        "apt install python3-venv" >&2; exit 1; }
@test -e $(1)/.installed || { echo "Making $(1) (a few minutes, once) ..." >&2; \
    $(PYTHON) -m venv --clear $(1); }
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
    -c $(3) $(2)
@touch $(1)/.installed
endef

$(DEMO)/.installed: pyproject.toml constraints.txt hatch_build.py $(SHIPPED) $(SOURCES)
	$(call environment,$(DEMO),.,constraints.txt)

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py
	$(call environment,$(VENV),-e ".[all$(comma)dev]",constraints.txt)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt hatch_build.py
	$(call environment,$(OLDEST),-e . hypothesis pytest pytest-xdist,constraints-oldest.txt)

comma := ,
