# make demo | make test | make lint | make bench     each makes .venv when it is missing
PYTHON ?= python3
PY := .venv/bin/python
export PYTHONUNBUFFERED := 1

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

test: .venv/dev
	$(PY) -m pytest

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/main: requirements.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/main requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf demo
