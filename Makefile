# make demo   set up, then run the quick start
# make test   set up, then lint, types, floors and tests
# make sanitize   the tests of the compiled ops under AddressSanitizer
# The first run makes .venv with pinned versions; later runs only when what it is made from has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
STAMP := $(VENV)/.elle-mp-stamp
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: demo test sanitize setup lint clean $(VENV)
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/elle-mp pretrain configs/quickstart.yaml

test: lint
	$(BIN)/python -m pytest

sanitize: $(STAMP)
	csrc/sanitize.sh

setup: $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f elle_mp/_helpers*.so elle_mp/_ops.so elle_mp/_cuda_ops.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by exact version: left to a range, pip may choose another and far larger build.
$(STAMP): pyproject.toml setup.py constraints.txt $(CXX_FILES)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory $(VENV)
	@echo "installing torch (some minutes the first time)"
	@$(PIP) torch==2.13.0
	@echo "installing the build tools"
	@$(PIP) setuptools wheel ninja pybind11
	@echo "installing elle_mp and what it needs"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'import elle_mp._helpers' 2>/dev/null || \
	  echo "C++ helpers not built, NumPy takes their place; '$(BIN)/elle-mp doctor' says how to get them"
	@test -e elle_mp/_ops.so || \
	  echo "compiled ops not built, PyTorch takes their place; '$(BIN)/elle-mp doctor' says how to get them"
	@touch $@

$(VENV):
	@command -v $(PYTHON) >/dev/null || \
	  { echo "no $(PYTHON) here: install Python 3.10 to 3.13, or say where it is: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "elle_mp needs Python 3.10 to 3.13, not $$($(PYTHON) --version 2>&1): make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo "no virtual environment: install Python's venv module (Debian: apt install python3-venv)"; exit 1; }
