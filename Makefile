# Every target installs what it needs into .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# On Linux this installs PyTorch's CUDA build unless pip is configured for the CPU build.
TORCH ?= torch==2.13.0
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-fast prove check docs clean

demo: .setup/demo
	$(BIN)/tessera demo

test: .setup/dev
	$(PYTEST) -m "not slow"

# Without whole commands, trainings and subprocesses: for daily work.
test-fast: .setup/dev
	$(PYTEST) -m "not slow and not run"

prove: .setup/dev
	$(BIN)/python -m pytest -m slow --timeout 3600

check: .setup/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet

docs: .setup/dev
	$(BIN)/mkdocs serve

.setup/venv:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	mkdir -p .setup && touch $@

.setup/demo: .setup/venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,serve]"
	touch $@

.setup/dev: .setup/venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ .setup/demo

clean:
	rm -rf .venv .setup site
