# Set-up, demo, tests and checks. Each target builds its own virtual environment first, once.

# The first interpreter that is new enough; `make PYTHON=/path/to/python` chooses another.
ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
RUN := env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
READY := $(VENV)/.ready
# One OpenMP thread a test worker: two spinning teams on the same cores run many times slower.
WORKERS ?= 2

.PHONY: demo test support lint aot bench clean

demo: $(READY)
	$(RUN) -m reap_driver demo --out out/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) $(TESTS)

# Rewrites the README's support matrix from what the tests prove.
support: $(READY)
	@mkdir -p out && rm -f out/support.jsonl
	OMP_NUM_THREADS=1 REAP_SUPPORT_MATRIX=out/support.jsonl \
		$(RUN) -m pytest -q -n $(WORKERS) tests/driver
	$(RUN) -m tests.support_matrix out/support.jsonl

lint: $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Compiles every GPU kernel for five architectures and inspects the code; needs no GPU.
aot: $(READY)
	env -u TRITON_INTERPRET TRITON_CACHE_DIR=$(CURDIR)/out/triton OMP_NUM_THREADS=1 $(RUN) -m bench aot

bench: $(READY)
	$(RUN) -m bench

clean:
	rm -rf $(VENV) build out *.egg-info

$(READY): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(ENOUGH)' || { echo "reap-kernels needs Python 3.11 or \
	newer, found '$(PYTHON)'; run: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.lint: $(READY)
	$(PIP) install -q -c constraints.txt -e '.[lint]'
	@touch $@
