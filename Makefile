# Everything a developer types. `make` alone lists it.

PYTHON ?= python3
PORT ?= 8000
SSH_PORT ?= 22
# More arguments for pytest: make test ARGS='-k half_close -x'; ARGS='-n 0 -s' in one process
ARGS ?=
# COVERAGE=1 also measures what the unit and integration tests reach, and fails below the floor.
COVERAGE ?=
# Most tests wait most of the time. One process runs a whole file, since its tests share a server.
# The order of the names puts the long files, those of tests/e2e, before the short ones.
TEST_PROCESSES := -n 3 --dist loadfile --no-loadscope-reorder
COVERAGE_ARGS := --cov --cov-report=term

BIN := .venv/bin
STAMP := .venv/.installed

# What tests/support/debian.py looks for, and the means to build the environment.
DEBIAN_PACKAGES := openssh-server openssh-client nginx rsync git tinyproxy openssl \
	netcat-openbsd procps iproute2 python3-venv python3-websocket

# The tests that need nothing but the one file, and so run where the server does not.
SCRIPT_TESTS := tests/unit/proxy_command tests/integration/script

SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

.DEFAULT_GOAL := help
.PHONY: help setup setup-debian run test coverage end-to-end script-tests check amalgamate survival soak fuzz mutants bench clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP) ## create .venv and install everything for development into it

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup-debian: ## install the Debian packages that the end-to-end tests use
	@missing=""; \
	for package in $(DEBIAN_PACKAGES); do \
		dpkg-query --show --showformat='$${Status}\n' $$package 2>/dev/null \
			| grep -q '^install ok installed' || missing="$$missing $$package"; \
	done; \
	if test -z "$$missing"; then echo "all Debian packages are there"; exit 0; fi; \
	echo "installing:$$missing"; \
	$(SUDO) apt-get update --quiet && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive \
		apt-get install --quiet --yes --no-install-recommends $$missing

run: $(STAMP) ## start a server and a client named demo here, and print an ssh line (PORT=8000 SSH_PORT=22)
	@exec $(BIN)/python deploy/demo.py --port $(PORT) --ssh-port $(SSH_PORT)

test: $(STAMP) ## run every test but those of survival and soak: 5 minutes (COVERAGE=1)
	$(BIN)/python -m pytest $(TEST_PROCESSES) $(if $(COVERAGE),$(COVERAGE_ARGS)) $(ARGS)

coverage: $(STAMP) ## run the unit and integration tests alone, and fail below the coverage floor
	$(BIN)/python -m pytest $(TEST_PROCESSES) $(COVERAGE_ARGS) tests/unit tests/integration $(ARGS)

end-to-end: $(STAMP) ## run the end-to-end tests alone
	$(BIN)/python -m pytest $(TEST_PROCESSES) tests/e2e $(ARGS)

script-tests: ## run the tests of the proxy command on its oldest Python (PYTHON=python3.9)
	$(PYTHON) -m venv .venv-script
	.venv-script/bin/python -m pip install --quiet --disable-pip-version-check \
		websocket-client pytest pytest-timeout
	.venv-script/bin/python -m pytest -p no:cacheprovider $(SCRIPT_TESTS) $(ARGS)

survival: $(STAMP) ## the flaky-link oracle and restarts under real ssh (RELAY_ORACLE_HITS=300 RELAY_ORACLE_SEED=1)
	$(BIN)/python -m pytest tests/survival $(ARGS)

check: $(STAMP) ## format, lint, types, the generated proxy command, the mutants, the CI workflow
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python .ci/amalgamate.py --check
	$(BIN)/python -m tests.mutants --check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml

amalgamate: $(STAMP) ## write ssh_proxy_command.py anew from http_network_relay/
	$(BIN)/python .ci/amalgamate.py

soak: $(STAMP) ## the long tests, with the full figures
	$(BIN)/python -m pytest tests/soak $(ARGS)

fuzz: $(STAMP) ## a million inputs to decoders and whole legs; Linux, glibc, Python 3.11-3.13 (RELAY_FUZZ_RUNS=1000000 RELAY_FUZZ_SEED=1)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(ARGS)

mutants: $(STAMP) ## break each rule of the design once, and see its test fail (ARGS=resume for one subject)
	$(BIN)/python -m tests.mutants $(ARGS)

bench: $(STAMP) ## measure speed, CPU and memory beside plain TCP: benchmarks/README.md (half an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove .venv, caches and build artefacts (never credentials.json)
	rm -rf .venv .venv-script .run .fuzz .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
