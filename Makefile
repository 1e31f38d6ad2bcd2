# make demo      trains a small model on the clips in tests/data, with pictures of the result
# make test      installs and runs the tests
# make install   the environment alone
# make lint      ruff, as continuous integration runs it
# make clean     removes what was built and the environment
#
# Variables: PYTHON (the interpreter), VENV (the environment's folder, .venv), TORCH (what pip installs as torch,
# `make demo TORCH=torch==2.11.0`), DEMO_ARGS (`--short`), TEST_ARGS (`-k buckets`; `-n 0` for one process).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1
DEMO_ARGS ?=
TEST_ARGS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# What TORCH asks for is in the name, so that another choice installs again.
STAMP = $(VENV)/.stdit_fast_installed_$(shell printf '%s' "$(TORCH)" | cksum | cut -d ' ' -f 1)
SOURCES = pyproject.toml setup.py requirements-nodeps.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test install lint clean

demo: install
	$(VENV)/bin/python -m stdit_fast.train.demo $(DEMO_ARGS)

test: install
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(TEST_ARGS)

install: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" -e '.[dev]'
	$(PIP) install --no-deps -r requirements-nodeps.txt
	$(VENV)/bin/python -m stdit_fast.reporting
	rm -f $(VENV)/.stdit_fast_installed_*
	touch $@

lint: install
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check

clean:
	rm -rf build dist *.egg-info stdit_fast/_C.*.so stdit_fast/libstdit_cuda.so stdit_fast/_build_info.json
	rm -rf .pytest_cache .ruff_cache .benchmarks
	rm -f $(VENV)/.stdit_fast_installed_*
	if [ "$(VENV)" = .venv ]; then rm -rf .venv; fi
