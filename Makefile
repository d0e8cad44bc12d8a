# Everything a checkout needs; `make` lists the targets.

PYTHON ?= python3
BIND ?= 127.0.0.1:8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What the server itself does, whatever the interpreter and its libraries.
SERVER_TESTS := $(addprefix tests/test_,bridge_wsgi.py bridge_django.py connection.py testproject.py threads.py environ.py)

.DEFAULT_GOAL := help
.PHONY: help install run test lint types docs bench soak test-versions clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  %-15s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with the package and all tools (PYTHON=... picks the interpreter)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[redis,test,docs,dev]'
	touch $@

run: install ## serve testproject at BIND with runaio, with a database and a superuser admin/admin
	DEBUG=$${DEBUG-true} $(BIN)/python testproject/manage.py migrate --verbosity=0
	DEBUG=$${DEBUG-true} $(BIN)/python testproject/manage.py seed
	DEBUG=$${DEBUG-true} $(BIN)/python testproject/manage.py runaio --bind $(BIND)

test: install ## run all tests, then those of the server's behaviour under python -O, and report coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	PYTHONOPTIMIZE=1 AIO_TEST_PYTHON_FLAGS=-O $(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not browser' $(SERVER_TESTS)

lint: install ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install ## check types, strictly
	$(BIN)/mypy

docs: install ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install ## measure this project and its peers side by side (OPTIONS="--quick", "--help"), into docs/
	$(BIN)/python -m tests.benchmarks $(OPTIONS)

soak: install ## recycle workers under load, for this project and its peers (OPTIONS="--million", "--faults all", "--help")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement tests/soak/requirements.txt
	$(BIN)/python -m tests.soak $(OPTIONS)

test-versions: ## run the tests with the lowest and the newest supported dependencies, on the Pythons found
	.ci/versions -n 2 --dist worksteal -m 'not slow and not browser' $(SERVER_TESTS)

clean: ## remove everything that the other targets made
	rm -rf $(VENV) .venvs build dist site htmlcov .coverage .coverage.* testproject/var
