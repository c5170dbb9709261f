# `make demo`, `make demo-file` and `make test` are all that a fresh clone needs: each makes .venv and installs what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := src tests oracles bench scripts
CHECKPOINT := demo/silero_vad_16k.safetensors

.PHONY: demo demo-file test oracles check format bench fuzz docs docs-site web web-check wheel workflows clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/.torch  ## show a live network: explained, frozen, trained, saved
	@$(BIN)/python scripts/demo.py

demo-file: $(VENV)/.installed $(CHECKPOINT)  ## show the parameters of a pretrained network's file; needs no torch
	@$(BIN)/python scripts/demo_file.py $(CHECKPOINT)

test: $(VENV)/.developed $(CHECKPOINT)  ## run all tests, the examples of the documentation among them
	$(BIN)/python -m pytest -q -n auto --dist loadfile
	@echo 'Left out, and run by make oracles: the page of the report in Chromium$(if $(shell command -v chromium),,, which is not installed here); other libraries.'

oracles: $(VENV)/.oracles  ## compare with the libraries that make the files and layers: PEFT, transformers, timm, bitsandbytes; test the page in Chromium
	$(BIN)/python -m pytest -q -n auto --dist loadfile oracles

check: $(VENV)/.developed  ## lint, types, import rules, generated documentation
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/python scripts/check_imports.py
	$(BIN)/python scripts/generate_docs.py --check

format: $(VENV)/.developed  ## format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/.developed  ## write the generated pages anew
	$(BIN)/python scripts/generate_docs.py

docs-site: $(VENV)/.documented  ## build the site of the documentation in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

wheel: $(VENV)/.packaged  ## build the source distribution and the wheel of this machine; install it without a compiler, and try it
	rm -rf dist
	$(BIN)/python -m build -q
	$(BIN)/python scripts/wheel_tag.py dist
	$(BIN)/python bench/bench_install.py dist

workflows: $(VENV)/.packaged  ## lint the workflow files
	$(BIN)/yamllint -s .github .pre-commit-hooks.yaml
	$(BIN)/zizmor -q --offline .github

bench: $(VENV)/.developed  ## measure every claim; BENCH=bench/bench_x.py for one
	@set -e; for file in $(or $(BENCH),$(sort $(wildcard bench/bench_*.py))); do \
		echo "== $$file"; $(BIN)/python $$file; done

web: web/node_modules/.installed  ## bundle the page of the report from its source in web/; needs Node
	cd web && npm run -s check && npm run -s build

web-check: web/node_modules/.installed  ## fail where the page in the package is not what its source gives
	cd web && npm run -s check && npm run -s build -- ../build/page.html
	cmp build/page.html src/torchparams/page/page.html

fuzz: $(VENV)/.developed  ## 100,000 broken inputs for each reader; FUZZ=1000 for fewer
	@set -e; for file in $(sort $(wildcard tests/fuzz/fuzz_*.py)); do \
		echo "== $$file"; PYTHONPATH=tests $(BIN)/python $$file $(or $(FUZZ),100000); done

clean:  ## remove what these targets made
	rm -rf $(VENV) build demo bench/data src/*.egg-info src/torchparams/sketch/*.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Without torch: files are read without it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard src/torchparams/sketch/*.[ch]) | $(VENV)/bin/python
	@echo 'Installing torchparams in $(VENV): once.'
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.torch: pyproject.toml setup.py constraints.txt $(wildcard src/torchparams/sketch/*.[ch]) | $(VENV)/bin/python
	@echo 'Installing torchparams and torch in $(VENV): once, some minutes.'
	@$(PIP) install -c constraints.txt -e '.[torch]'
	@touch $@ $(VENV)/.installed

$(VENV)/.developed: pyproject.toml setup.py constraints.txt $(wildcard src/torchparams/sketch/*.[ch]) | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.torch $(VENV)/.installed

$(VENV)/.oracles: $(VENV)/.developed
	$(PIP) install -c constraints.txt -e '.[dev,oracles,remote]'
	@touch $@

$(VENV)/.documented: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.packaged: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[ci]'
	@touch $@

web/node_modules/.installed: web/package-lock.json
	cd web && npm ci --silent
	@mkdir -p build && touch $@

$(CHECKPOINT): | $(VENV)/bin/python
	$(BIN)/python scripts/demo_checkpoint.py $@
