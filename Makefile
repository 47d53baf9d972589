PYTHON := .venv/bin/python
test: export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types install install-dev release-check clean

demo: install  ## calibrate the example model, serve it at five widths at once, print a table
	$(PYTHON) examples/demo.py

test: install-dev  ## the test suite, on real vLLM, in two processes: most tests wait for a program of one thread
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: install-dev
	.venv/bin/mypy

install:
	deploy/install/install.sh

install-dev:
	deploy/install/install.sh dev

release-check: install-dev  ## build wheel and source distribution, check them, run the demo from the wheel
	deploy/release/check.sh

clean:  ## remove what make demo and make test have made
	rm -rf .venv .demo
