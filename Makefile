# `make demo` and `make test` are all that a fresh machine needs: both make the environment first.
# Another interpreter: `make test PYTHON=python3.12`. On a GPU: `make test EXTRAS=dev,cuda`. With an
# environment of your own (Colab, an accelerator image), run the commands below with its python.

PYTHON ?= python3
EXTRAS ?= dev
VENV ?= .venv
BIN := $(VENV)/bin

# "3.11", or a word that no constraints file fits when the interpreter is missing or too old.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; v = sys.version_info; \
	print("%d.%d" % v[:2] if v >= (3, 11) else "too-old")' 2>/dev/null || echo missing)
CONSTRAINTS := constraints/py$(if $(filter 3.11,$(PYTHON_VERSION)),311,312).txt
# Installed again when setup.py or the constraints change, or for another PYTHON or EXTRAS.
comma := ,
STAMP := $(VENV)/installed-$(PYTHON_VERSION)-$(subst $(comma),-,$(EXTRAS))

.PHONY: help install demo test slow lint format clean

help:
	@echo "make demo     train a small language model on this machine, show samples, numbers, report"
	@echo "make test     run the test suite"
	@echo "make slow     run the long tests (before a release)"
	@echo "make lint     check style;  make format  repairs it"
	@echo "make install  only make the environment in $(VENV)"
	@echo "make clean    remove the environment and the tools' caches (runs/ stays)"

install: $(STAMP)

# An environment of the same Python is kept, with whatever else was installed into it. No build
# isolation: the pinned setuptools builds the package, nothing unpinned is fetched.
$(STAMP): setup.py $(CONSTRAINTS)
	@case "$(PYTHON_VERSION)" in missing|too-old) echo "llm_jax needs Python 3.11 or newer:" \
		"PYTHON=$(PYTHON) is $(PYTHON_VERSION); try make PYTHON=python3.12" >&2; exit 1;; esac
	@echo "Installing into $(VENV) (Python $(PYTHON_VERSION), $(CONSTRAINTS)): a minute or two"
	@$(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")' \
		2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		--no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# A finished run is kept: the next demo goes to a folder of its own and starts from step 0, so that
# the two can be compared (same machine: the same numbers, bit for bit). An unfinished one resumes.
demo: $(STAMP)
	@workdir=runs/quickstart; \
	if [ -e $$workdir/summary.json ]; then workdir=runs/quickstart-$$(date +%Y%m%d-%H%M%S); fi; \
	$(BIN)/python -m experiments.pretrain --config=configs/quickstart.py --workdir=$$workdir

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
