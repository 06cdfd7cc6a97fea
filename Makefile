# Short names for daily commands. `make PYTHON=.venv/bin/python test` uses another interpreter.
PYTHON ?= python

.PHONY: fast test check docs bench

fast:   ## all tests except those marked slow
	$(PYTHON) -m pytest -q -n logical --dist loadfile --no-loadscope-reorder -m "not slow"

test:   ## all tests
	$(PYTHON) -m pytest -n logical --dist loadfile --no-loadscope-reorder

check:  ## linters and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs:   ## the commands and settings that the documents and examples show
	$(PYTHON) -m pytest -q tests/test_docs.py tests/test_docs_run.py tests/test_examples.py tests/config/test_reference.py

bench:  ## a small comparison with Seq2SeqTrainer on this machine
	$(PYTHON) benchmarks/throughput.py --quick
