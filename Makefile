# On a fresh clone: `make demo` runs the comparison, `make test` the default tests. Each sets up
# .venv once and reuses it; `make site` and `make package` fill build/ and dist/.
# Variables: PYTHON (interpreter), VENV (folder), ARGS (for demo), N (fuzz).
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
N ?= 2000
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# LAPACK on the CPU: on a busy machine its threads wait for each other far longer than a small
# factorisation takes.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test slow fuzz lint types doctest site package format clean

demo: $(READY)
	$(RUN) -m experiments compare $(ARGS)

test: $(READY)
	$(RUN) -m pytest -n 2 -m "not slow"

slow: $(READY)
	$(RUN) -m pytest -n 2 -m slow

fuzz: $(READY)
	FUZZ_EXAMPLES=$(N) $(RUN) -m pytest -n 2 tests/test_fuzz.py -m slow

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m pyrefly check --python-interpreter-path $(RUN)

doctest: $(READY)
	$(RUN) -m pytest --doctest-modules fop_optax

# Links in pages and notebooks follow real paths: what is linked is copied.
site: $(READY)
	rm -rf build/pages build/site && mkdir -p build && cp -rL .docs/pages build/pages
	$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -c .docs build/pages build/site

# Wheel and source distribution; each is installed in a clean environment and runs the README's code.
package: $(READY)
	rm -rf dist && mkdir -p build
	$(RUN) -m build --outdir dist . >build/package.log
	sed -n '/^```python/,/^```/{/^```/d;p}' README.md >build/readme.py
	for file in dist/*; do \
	  "$(PYTHON)" -m venv --clear build/installed; \
	  build/installed/bin/python -m pip install --quiet "$$file" || exit 1; \
	  (cd build && installed/bin/python readme.py) || exit 1; \
	done

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(READY): pyproject.toml
	@if command -v uv >/dev/null; then \
	  set -ex; uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV); \
	  uv pip install --quiet --python $(VENV)/bin/python -e '.[dev]'; \
	else \
	  set -ex; "$(PYTHON)" -m venv $(VENV); \
	  $(VENV)/bin/python -m pip install --quiet -e '.[dev]'; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist results
