# Each target sets up all it needs in .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Whatever build of torch pip is set up to take; on Linux that is the CUDA one unless pip's index says otherwise.
TORCH ?= torch==2.13.0

.PHONY: demo test prove check docs clean

demo: .setup/demo
	$(BIN)/tessera demo

test: .setup/dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

prove: .setup/dev
	$(BIN)/python -m pytest -m slow

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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

.setup/dev: .setup/venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ .setup/demo

clean:
	rm -rf .venv .setup site
