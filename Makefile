# make demo   an environment, the package, and a packaged human voice turned into text
# make test   an environment with NeMo to compare with, linters, type checker, every test
# make quick  the tests that take seconds
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
DEMO := .venv-demo
CODE := src export engine runtime benchmarks tests examples
SOURCES := $(shell find src export engine runtime benchmarks -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: demo test quick lint format bundle clean
.DEFAULT_GOAL := demo

demo: $(DEMO)/.installed
	@$(DEMO)/bin/nemostream transcribe $$($(DEMO)/bin/python -c 'import nemostream; print(nemostream.demo_clip())')

test: lint
	$(VENV)/bin/python -m pytest

quick: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m "not slow"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy -p nemostream

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

bundle: $(VENV)/.installed
	$(VENV)/bin/nemostream export examples/demo_model/demo.nemo src/nemostream/demo

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info src/*.egg-info

# A plain install, as a user's: no NeMo, no PyTorch.
$(DEMO)/.installed: pyproject.toml $(SOURCES)
	@test -n "$(PYTHON)" || { echo "nemostream needs Python 3.11 or newer; install one or set PYTHON=."; exit 1; }
	rm -rf build
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary --force-reinstall --no-deps .
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary .
	@rm -rf build
	@touch $@

# PyTorch first and exactly: left to the resolver, NeMo's requirement brings the newest build with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "nemostream needs Python 3.11 or newer; install one or set PYTHON=."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		torch==2.13.0 'nemo_toolkit[asr]==3.0.0' onnx onnxscript
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		'pytest>=8' 'hypothesis>=6.100' 'ruff>=0.9' 'mypy>=1.13' 'build>=1.2' types-PyYAML
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		--config-settings editable_mode=strict -e .
	@touch $@
