PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -c requirements/constraints.txt
READY := $(VENV)/.ready
# Two processes of one thread each: a file's tests share models that one process converts once.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all sanitize workflows golden lint typecheck benchmarks clean

demo: $(READY)
	$(RUN) examples/demo.py

test: $(READY)
	$(TEST)

test-all: $(READY)
	$(TEST) -m "" --hypothesis-profile default

# The native kernels under the sanitizers of the compiler.
sanitize: $(READY)
	$(RUN) -m pytest -m slow tests/backends/test_native_sanitized.py

# Other people's trainers, adapters and explainers around converted models.
workflows: $(READY)
	$(INSTALL) --quiet --editable ".[workflows]"
	$(TEST) tests/workflows

# `make golden DIR=…` compares a directory of golden files, one line a file.
golden: $(READY)
	$(RUN) tests/parity/run.py $(DIR)

lint: $(READY)
	$(RUN) -m ruff check .

# Only an install knows `patterns/` and `backends/` as sub-packages, so mypy reads one, made outside the checkout.
typecheck: $(READY)
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; log="$$scratch/build.log"; \
	$(RUN) -m build --no-isolation --outdir "$$scratch" . > "$$log" 2>&1 || { cat "$$log"; exit 1; }; \
	$(INSTALL) --quiet --no-deps --target "$$scratch/site" "$$scratch"/*.whl; \
	cd "$$scratch/site"; \
	check="$(abspath $(RUN)) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache"; \
	$$check -p attnrewrite; $$check $(CURDIR)/benchmarks $(CURDIR)/examples

benchmarks: $(READY)
	@set -e; for script in $(wildcard benchmarks/*.py); do $(RUN) $$script; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch goes first: asked for together with others, pip may choose another build of it.
$(READY): pyproject.toml setup.py requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable ".[zoo,dev]"
	touch $@
