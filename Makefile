# Every target needs only Python and make: the first one that runs builds `.venv`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TYPES := build/types/sigphi
FOLDERS := configuration modeling processing train hub_card

# Tests make their models, tokenizers and images in code, and a download would make them slow and flaky.
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# The shapes of Hugging Face, GitHub, GitLab, AWS, OpenAI and Slack tokens, and of private keys.
SECRETS := hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}
SECRETS := $(SECRETS)|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{32,}|xox[abprs]-[A-Za-z0-9-]{10,}
SECRETS := $(SECRETS)|BEGIN [A-Z ]*PRIVATE KEY

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-gpu matrix golden quality style types audit wheel clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## Make .venv with the package, editable, and the tools of development.

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: install  ## Run the whole pipeline with tiny models: CPU, no network, minutes.
	$(BIN)/sigphi quickstart --output-dir runs/quickstart

test: install  ## Run the tests that take seconds, in two processes.
	$(PYTEST) -n 2 --dist loadfile

test-all: install  ## Run the slow tests too.
	$(PYTEST) -m 'not gpu'

test-gpu: install  ## Run the tests that need a CUDA device.
	$(PYTEST) -m gpu

matrix: wheel  ## Train, push, pull and ask with the oldest and the newest transformers, in environments of their own.
	$(BIN)/python tests/version_matrix.py dist/sigphi-*.whl

golden: install  ## Write the training steps that tests compare with anew (say why in the commit).
	$(PYTEST) -q tests/test_train_siglip_trainer.py -k committed_file --write-golden

quality: install types  ## Check style, types, import order, file sizes and secrets.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -q tests/test_layout.py
	@large=$$(git ls-files -coz --exclude-standard | xargs -0 -I{} find {} -maxdepth 0 -size +1024k 2>/dev/null); \
	    test -z "$$large" || { echo "larger than 1 MB: $$large"; exit 1; }
	@! git grep --untracked -nIE '$(SECRETS)' || { echo 'the lines above look like secrets'; exit 1; }

style: install  ## Fix what ruff can fix, and format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## Check the types of the six packages.
	@# mypy does not follow the import hook of an editable install, so links lay the packages out for it.
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@ln -s $(CURDIR)/sigphi/*.py $(TYPES)
	@$(foreach folder,$(FOLDERS),ln -s $(CURDIR)/$(folder) $(TYPES)/$(folder);)
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache --package sigphi

audit: install  ## Look the installed packages up in the advisory database (needs the network).
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

wheel: install  ## Build dist/*.whl.
	@# setuptools packs whatever an earlier build left in build/lib.
	rm -rf build/lib dist
	$(BIN)/python -m build --wheel

clean:  ## Delete what the targets made, except .venv and runs/.
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
