# Every target makes its own virtual environment; nothing is needed but Python 3.11+, make and a package index.
PYTHON ?= python3
VENV ?= .venv
# Test files run at a time: each is a process with its own PyTorch.
TEST_WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-slow lint bench clean

help:
	@echo "make demo       real digits to pairs (data/demo), an encoder (runs/demo), its fine-tuning (runs/demo-finetune)"
	@echo "make test       the test suite (minutes); make test-slow adds the slow tests"
	@echo "make lint       ruff and mypy"
	@echo "make bench      speed and memory, as ratios against named baselines"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; choose another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing diffmix and PyTorch into $(VENV): about 6 GB, some minutes without a word ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing diffmix, PyTorch and the test tools into $(VENV): about 6 GB, some minutes without a word ..."
	$(PIP) --editable ".[test,lint]"
	@touch $@ $(VENV)/run.stamp

demo: $(VENV)/run.stamp
	$(BIN)/pipeline generate --out data/demo
	$(BIN)/pipeline verify data/demo
	$(BIN)/pipeline sheet data/demo --out data/demo-sheet.png
	$(BIN)/trainer pretrain --data data/demo --out runs/demo
	$(BIN)/trainer finetune --init runs/demo --out runs/demo-finetune
	@echo "Look at data/demo-sheet.png (real digits, each beside its variation) and"
	@echo "runs/demo-finetune/gain-and-forgetting.png (what each way of fine-tuning gained and what it forgot)."

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile -m "slow or not slow"

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.stamp
	$(BIN)/pipeline bench
	$(BIN)/trainer bench

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
