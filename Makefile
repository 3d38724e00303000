# Set-up, demo, tests and checks. Each target builds its own virtual environment first, once.

# The first interpreter that is new enough; `make PYTHON=/path/to/python` chooses another.
ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
CONSTRAINTS := constraints.txt
RUN := env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
READY := $(VENV)/.ready
# One OpenMP thread a test worker: two spinning teams on the same cores run many times slower.
WORKERS ?= 2
# The same kernels for the CPU, which tests run; conftest.py finds them there.
HOST := out/host
INTEROP := out/interop
ENVIRONMENTS := $(basename $(notdir $(wildcard tests/interop/environments/*.txt)))
ENGINES := llamacpp mlx vllm
CMAKE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m cmake

.PRECIOUS: $(INTEROP)/%/.ready
.PHONY: demo test test-interop test-engines docs fuzz support lint host sanitize aot cuda bench clean

demo: $(READY)
	$(RUN) -m reap_driver demo --out out/demo

test: $(READY) host
	OMP_NUM_THREADS=1 REAP_CUDA_HOST="$$(echo $(CURDIR)/$(HOST)/_host*.so)" \
		$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(TESTS)

# Tests against packages of others, each with an environment of its own under out/interop:
# `make test-interop ENVS=llmcompressor` for one, and FILES=... for some of its tests. `test-engines`
# runs pruned models in engines.
test-interop: $(addprefix interop-,$(or $(ENVS),$(filter-out $(ENGINES),$(ENVIRONMENTS))))

test-engines: $(addprefix interop-,$(or $(ENVS),$(filter $(ENGINES),$(ENVIRONMENTS))))

# A process for each file: AutoRound changes the classes of transformers where it quantizes.
interop-%: $(INTEROP)/%/.ready
	failed=0; for file in $(or $(FILES),tests/interop/$*/test_*.py); do \
		env -u PYTHONHOME PYTHONPATH=$(CURDIR):$(CURDIR)/python REAP_INTEROP=$* OMP_NUM_THREADS=1 \
			$(INTEROP)/$*/bin/python -m pytest -q --confcutdir tests/interop -p tests.assertions $$file \
			|| failed=1; done; exit $$failed

# The stamp holds the requirements that were installed: newer files that say the same build nothing.
# NAME.sh installs what pip does not, into the folder that it is given.
$(INTEROP)/%/.ready: tests/interop/environments/%.txt
	cat $(basename $<).* | cmp -s - $@ || { $(PYTHON) -m venv --clear $(@D) && $(@D)/bin/python -m pip \
		--disable-pip-version-check --no-input install -q -r $< \
		&& { ! test -e $(<:.txt=.sh) || sh $(<:.txt=.sh) $(@D); } && cat $(basename $<).* > $@; }
	@touch $@
$(INTEROP)/llamacpp/.ready: tests/interop/environments/llamacpp.sh

# The site, into out/site. Warnings are errors; nothing is loaded from the network.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR) $(VENV)/bin/python -m mkdocs build -q

# Feeds 50,000 changed inputs to every reader, about half an hour; INPUTS=5000 SEED=7 for others.
fuzz: $(READY) host
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m tests.fuzz --inputs $(or $(INPUTS),50000) \
		--seed $(or $(SEED),0)

# Rewrites the support matrix of docs/support.md from what the tests prove.
support: $(READY) host
	@mkdir -p out && rm -f out/support.jsonl
	OMP_NUM_THREADS=1 REAP_SUPPORT_MATRIX=out/support.jsonl \
		$(RUN) -m pytest -q -n $(WORKERS) tests/driver
	$(RUN) -m tests.support_matrix out/support.jsonl

lint: $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	for system in linux darwin win32; do $(RUN) -m mypy --platform $$system || exit 1; done
	$(VENV)/bin/codespell
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc -type f)

# The kernels of csrc/ for the CPU.
host: $(READY)
	$(call build-host,$(HOST),OFF)

# Runs tests of them under AddressSanitizer and UndefinedBehaviorSanitizer of GCC. Both come before
# anything Python loads; Python itself frees little at exit, so leaks are not looked for. They end
# the process after their report, which pytest must therefore not hold back.
sanitize: TESTS := $(or $(TESTS),tests/ops/test_cuda.py)
sanitize: $(READY)
	$(call build-host,$(HOST)-sanitized,ON)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
		REAP_CUDA_HOST="$$(echo $(CURDIR)/$(HOST)-sanitized/_host*.so)" \
		$(RUN) -m pytest -q --capture=sys $(TESTS)

# Compiles every GPU kernel for five architectures and inspects the code; needs no GPU.
aot: $(READY)
	env -u TRITON_INTERPRET TRITON_CACHE_DIR=$(CURDIR)/out/triton OMP_NUM_THREADS=1 $(RUN) -m bench aot

# Builds reap_kernels._C for every architecture and inspects it; brings its own nvcc where the system
# has none. Where there is none to bring either, the last line says so.
cuda: $(READY)
	@command -v "$${CUDACXX:-nvcc}" >/dev/null || test -x "$$CUDA_HOME/bin/nvcc" \
		|| REAP_BUILD_CUDA=0 $(PIP) install -q -c $(CONSTRAINTS) -e '.[nvcc]' || true
	OMP_NUM_THREADS=1 $(RUN) -m bench ptxas

bench: $(READY)
	$(RUN) -m bench

clean:
	rm -rf $(VENV) build core/build out *.egg-info core/*.egg-info

$(READY): pyproject.toml setup.py $(CONSTRAINTS)
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(ENOUGH)' || { echo "reap-kernels needs Python 3.11 or \
	newer, found '$(PYTHON)'; run: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q -c $(CONSTRAINTS) torch
	REAP_BUILD_CUDA=0 $(PIP) install -q -c $(CONSTRAINTS) -e '.[test]'
	@touch $@

$(VENV)/.lint: $(READY)
	REAP_BUILD_CUDA=0 $(PIP) install -q -c $(CONSTRAINTS) -e '.[lint]'
	@touch $@

$(VENV)/.docs: $(READY)
	REAP_BUILD_CUDA=0 $(PIP) install -q -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

# Folder, and whether with sanitizers.
define build-host
@command -v $(firstword $(CXX)) >/dev/null || { echo "tests run the kernels of csrc/ on the CPU, which needs a \
C++20 compiler, and '$(CXX)' is not there; install g++ 11 or newer, or run: make CXX=/path/to/g++" \
	>&2; exit 1; }
@CXX="$(CXX)" $(CMAKE) -S . -B $(1) -G Ninja --log-level=WARNING -DREAP_HOST=ON \
	-DREAP_SANITIZE=$(2) -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python
$(CMAKE) --build $(1)
endef
