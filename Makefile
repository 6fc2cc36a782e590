# Needs Python >= 3.11 with pip, and make. Everything else goes into .venv from the pinned requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup train test test-slow soak lint bench bench-quick docs docs-serve lock lowest newest clean

help:
	@echo "make train   set up and train HyperMARL against its baselines (about two minutes on 2 cores)"
	@echo "make test    set up and run the tests"
	@echo "make soak    kill runs at random moments 100 times, and twenty times as many random configs"
	@echo "make lint    formatting, lint, types, import rules"
	@echo "make bench   speed against the peers; ARGS='--jaxmarl PATH --purejaxrl PATH --kla PATH --naswot PATH --torch-python PYTHON'"
	@echo "make bench-quick   today's ratios beside the recorded ones, in under three minutes"
	@echo "make docs    the site of docs/ in site/; make docs-serve shows it (both install the site's generator once)"
	@echo "make lock    resolve the versions in pyproject.toml anew"
	@echo "make lowest  train one step with the lowest versions that pyproject.toml allows; make newest with the newest"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), f'Python 3.11 to 3.13 is needed, found {sys.version.split()[0]}; set PYTHON=python3.11'"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/python scripts/train.py

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow or claim"

soak: $(STAMP)
	JAXSTACK_SOAK_KILLS=100 HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -o timeout=7200 \
	  tests/core/test_soak.py tests/test_fuzz.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/python scripts/bench.py $(ARGS)

bench-quick: $(STAMP)
	$(BIN)/python scripts/bench.py --quick $(ARGS)

.venv/.docs: $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet "zensical>=0.0.70" "mkdocstrings[python]>=1.0"
	@touch .venv/.docs

docs: .venv/.docs
	$(BIN)/zensical build --clean

docs-serve: .venv/.docs
	$(BIN)/zensical serve

lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --output-file requirements.lock

lowest newest:
	$(PYTHON) scripts/versions.py $@

clean:
	rm -rf .venv build dist site *.egg-info
