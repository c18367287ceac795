# make demo   an environment, the package, and a packaged human voice turned into text
# make test   an environment with NeMo to compare with; linters, type checker, every test
# make quick  the tests that take seconds
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
DEMO := .venv-demo
ROOMS := src export engine runtime serving benchmarks
CODE := $(ROOMS) tests examples
# Folders too: theirs is the time that changes when a file goes.
SOURCES := $(shell find $(ROOMS) -not -name '*.pyc' -not -name __pycache__ 2>/dev/null)
PIP := -m pip install --quiet --disable-pip-version-check --prefer-binary

.PHONY: demo test quick lint format bundle clean
.NOTPARALLEL:
.DEFAULT_GOAL := demo

demo: $(DEMO)/.package
	@$(DEMO)/bin/nemostream transcribe "$$($(DEMO)/bin/python -c 'import nemostream; print(nemostream.demo_clip())')"

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

quick: $(VENV)/.package
	$(VENV)/bin/python -m pytest -m "not slow"

lint: $(VENV)/.package
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy -p nemostream

format: $(VENV)/.tools
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

bundle: $(VENV)/.package
	$(VENV)/bin/nemostream export examples/demo_model/demo.nemo src/nemostream/demo

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info src/*.egg-info

# Nothing is installed editable: what is linted, typed, tested and shown is what a user gets, and a module that was
# forgotten in pyproject.toml is missed at once. `build/` goes before and after, or modules deleted long ago are shipped.

# A user's environment: no NeMo, no PyTorch. (pip leaves a package of the same version alone, so the old one goes first.)
$(DEMO)/.package: pyproject.toml Makefile $(SOURCES)
	$(call have_python)
	rm -rf build
	$(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/python -m pip uninstall -qq --yes nemostream
	$(DEMO)/bin/python $(PIP) .
	@rm -rf build
	@touch $@

$(VENV)/.package: $(VENV)/.tools $(SOURCES)
	rm -rf build
	$(VENV)/bin/python $(PIP) --no-deps --no-build-isolation --force-reinstall .
	@rm -rf build
	@touch $@

# PyTorch first and exactly: left to the resolver, NeMo's requirement brings the newest build with gigabytes of CUDA.
# (pip 25.1 is the first that reads dependency groups.)
$(VENV)/.tools: pyproject.toml Makefile
	$(call have_python)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) --upgrade 'pip>=25.1' 'setuptools>=77'
	$(VENV)/bin/python $(PIP) torch==2.13.0
	rm -rf build
	$(VENV)/bin/python $(PIP) torch==2.13.0 'nemo_toolkit[asr]==3.0.0' --group dev --group accelerate --group clients --group readers '.[export,bench,serve,ray,vad,av]'
	@# Triton, in a folder of its own: its Python backend was built for an older numpy. Without it its tests are left out.
	-$(VENV)/bin/python $(PIP) --no-deps --target $(VENV)/triton nvidia-pytriton==0.7.0 numpy==1.26.4
	@rm -rf build
	@touch $@

define have_python
@test -n "$(PYTHON)" || { echo "nemostream needs Python 3.11 or newer: install one, or say make PYTHON=/path/to/it"; exit 1; }
endef
