# make serve   a server with the bundled reasoning model and the mixed-precision KV cache
# make test    everything but the very long; make check: lint, types, unit tests (under 3 minutes)
.DEFAULT_GOAL := help
SHELL := /bin/bash

PY := .venv/bin/python
STAMP := .venv/.pmkvq-installed
PORT ?= 30000
PYTEST_ARGS ?=
MINUTES ?= 20

# One thread per process: the models here are tiny, a server has three busy processes, and threads that
# wait for one another on a busy small machine are many times slower. A value from outside wins.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# SGLang starts three processes that import thousands of modules. Where this is set, each of them compiles
# all of that again, every time: a server then takes a minute longer to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup serve check lint format test test-full soak lock wheel clean

help:
	@echo "make setup      .venv with pinned versions and this project (Python 3.11)"
	@echo "make serve      server on 127.0.0.1:$(PORT) with the bundled model or MODEL=smollm2-135m; prints requests"
	@echo "make check      ruff, mypy, CPU unit tests"
	@echo "make test       the suite with real servers"
	@echo "make test-full  the suite with the very long tests"
	@echo "make soak       mixed traffic at four times the pool for MINUTES=20; nothing may be lost"
	@echo "make lint       ruff and mypy only"
	@echo "make format     ruff: fix imports, format"
	@echo "make lock       remake requirements.lock (needs uv)"
	@echo "make wheel      dist/*.whl"
	@echo "make clean      build outputs and caches (keeps .venv)"

$(STAMP): pyproject.toml requirements.lock scripts/setup.sh
	bash scripts/setup.sh

setup: $(STAMP)

# exec: a Ctrl-C or a SIGTERM reaches the demo, which ends the server in good order.
serve: $(STAMP)
	@exec .venv/bin/pmkvq serve-demo --port $(PORT) $(if $(MODEL),--model "$(MODEL)") $(SERVE_ARGS)

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/mypy

# A sample of the random ledger events; `make test` runs 100,000 and `make test-full` a million.
check: lint
	PMKVQ_LEDGER_STEPS=$${PMKVQ_LEDGER_STEPS:-15000} $(PY) -m pytest -m "not server and not slow and not full" -q $(PYTEST_ARGS)

test: $(STAMP)
	$(PY) -m pytest -m "not full" $(PYTEST_ARGS)

test-full: $(STAMP)
	PMKVQ_LEDGER_STEPS=1000000 $(PY) -m pytest -m "" $(PYTEST_ARGS)

soak: $(STAMP)
	.venv/bin/pmkvq bench checks soak --minutes $(MINUTES) $(SOAK_ARGS)

format: $(STAMP)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock:
	bash scripts/lock.sh $(LOCK_ARGS)

wheel: $(STAMP)
	rm -rf build
	$(PY) -m build --no-isolation --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis results/tmp
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
