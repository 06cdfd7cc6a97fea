# Short names for what is done every day. `make PYTHON=.venv/bin/python test` uses another interpreter.
PYTHON ?= python

.PHONY: fast test check docs bench

fast:   ## the tests that a change is tried with; slow ones are left out
	$(PYTHON) -m pytest -q -m "not slow"

test:   ## the whole suite
	$(PYTHON) -m pytest

check:  ## linters and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs:   ## every command that the documents show, and what they say of settings
	$(PYTHON) -m pytest -q tests/test_docs.py tests/test_docs_run.py tests/commands/test_reference.py

bench:  ## the comparison with Seq2SeqTrainer on this machine, at a small size
	$(PYTHON) benchmarks/throughput.py --quick
