# make demo      install the package and transcribe the packaged recording
# make test      lint, type check and all tests but the slow ones
# make test-all  the slow tests too: full-size models and long runs
# make mutants MODULE=scheduler   change a module in small ways and list the changes that no test detects
# make docs      build the documentation site into build/site
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
DEMO := .venv-demo
PACKAGES := src export engine runtime serving benchmarks
CODE := $(PACKAGES) tests examples docs/hooks.py
# Directories too: the modification time of a directory changes when a file in it is deleted.
SOURCES := $(shell find $(PACKAGES) -not -name '*.pyc' -not -name __pycache__ 2>/dev/null)
# Workers take files in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --dist loadfile --no-loadscope-reorder
PIP := -m pip install --quiet --disable-pip-version-check --prefer-binary

.PHONY: demo test test-all mutants lint format docs bundle clean
.NOTPARALLEL:
.DEFAULT_GOAL := demo

demo: $(DEMO)/.package
	@$(DEMO)/bin/nemostream transcribe "$$($(DEMO)/bin/python -c 'import nemostream; print(nemostream.demo_clip())')"

# A file of tests at a time, so that fixtures of a module (servers, exports) are created once. Three workers keep two
# cores busy while tests wait for servers; more threads of PyTorch would only wait for each other.
test: lint
	$(PYTEST) -n 3 -m "not slow"

# Two workers: full-size models take up to 10 GB, and half of these tests wait for servers and installations.
test-all: test
	$(PYTEST) -n 2 -m slow

mutants: $(VENV)/.package
	$(VENV)/bin/python tests/mutation/mutants.py $(MODULE) $(ARGS)

lint: $(VENV)/.package
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy -p nemostream

format: $(VENV)/.tools
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

bundle: $(VENV)/.package
	$(VENV)/bin/nemostream export examples/demo_model/demo.nemo src/nemostream/demo

docs: $(VENV)/.package $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info src/*.egg-info

# A user's environment: no NeMo, no PyTorch. (pip leaves a package of the same version alone, so the old one goes first.)
$(DEMO)/.package: pyproject.toml Makefile $(SOURCES)
	$(call have_python)
	rm -rf build
	$(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/python -m pip uninstall -qq --yes nemostream
	$(DEMO)/bin/python $(PIP) .
	@rm -rf build
	@touch $@

$(VENV)/.package: $(VENV)/.tools setup.py runtime/streaming/host.c $(wildcard runtime/backends/operators/*.[ch])
	$(VENV)/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# PyTorch first and exactly: left to the resolver, NeMo's requirement brings the newest build with gigabytes of CUDA.
# (pip 25.1 is the first that reads dependency groups.)
$(VENV)/.tools: pyproject.toml Makefile
	$(call have_python)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) --upgrade 'pip>=25.1' 'setuptools>=77'
	$(VENV)/bin/python $(PIP) torch==2.13.0
	rm -rf build
	$(VENV)/bin/python $(PIP) torch==2.13.0 'nemo_toolkit[asr]==3.0.0' --group dev --group accelerate --group clients --group readers --group deploy '.[nemo,bench,serve,state,otel,ray,vad,av]'
	@# Triton, in a folder of its own: its Python backend was built for an older numpy. Without it its tests are left out.
	-$(VENV)/bin/python $(PIP) --no-deps --target $(VENV)/triton nvidia-pytriton==0.7.0 numpy==1.26.4
	@rm -rf build
	@touch $@

# The documentation's own tools.
$(VENV)/.docs: $(VENV)/.tools
	$(VENV)/bin/python $(PIP) --group docs
	@touch $@

define have_python
@test -n "$(PYTHON)" || { echo "nemostream needs Python 3.11 or newer: install one, or run make PYTHON=/path/to/it"; exit 1; }
endef
