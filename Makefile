# `make demo` and `make test` set everything up by themselves; they need Python 3.11+, make and a C compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a process: the tests run many small processes at once. A file's tests stay in one worker, for its fixtures.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
TEST_WORKERS ?= 2
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile
DEMO_ARGS ?=

.PHONY: help demo test long check format lint types fast docs bench aggregation utility offsite rules frameworks clean

help:
	@echo "make demo    an owner and two parties on this machine, real text; writes demo-out/report.html"
	@echo "make test    every test that belongs to a change"
	@echo "make long    the tests that take a minute or more each"
	@echo "make check   format, lint, types and the fast tests"
	@echo "make docs    write the generated pages again (docs/families.md, docs/protocols.md, docs/aggregation.md)"
	@echo "make bench   splitfl bench split (an hour or more)"
	@echo "make utility what protection costs: the table and picture in docs/protocols.md"
	@echo "make offsite offsite tuning beside its alternatives: the table and picture in docs/offsite.md"
	@echo "make rules   all rules of combining adapters: the table and picture in docs/aggregation.md"

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,recipes]' --group dev
	touch $@

demo: $(READY)
	$(BIN)/splitfl demo $(DEMO_ARGS)

test: $(READY)
	$(PYTEST) -m "not long"

# What takes a minute or more each: every sum and rule through processes, privacy accounting of whole federations.
long: $(READY)
	$(PYTEST) -m long

check: $(READY) lint types fast

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

fast: $(READY)
	$(PYTEST) -m "not slow and not long"

docs: $(READY)
	$(TEST_ENV) $(BIN)/python -m tests.equivalence.table
	$(BIN)/python -m protocols.page > docs/protocols.md
	$(BIN)/python -m splitfl.aggregation.page > docs/aggregation.md

bench: $(READY)
	$(BIN)/splitfl bench split --json bench-split.json

# NVFlare is compared with where it is installed.
aggregation: $(READY)
	$(BIN)/splitfl bench aggregation --steps 5 --json aggregation-runs.json
	$(BIN)/splitfl bench rounds --json rounds-runs.json
	$(BIN)/python -m splitfl.bench.aggregation_table aggregation-runs.json rounds-runs.json --into docs/performance.md

# Goes on where it was broken off; half an hour on two free cores from nothing.
utility: $(READY)
	$(BIN)/splitfl bench utility --json utility-runs.json --resume
	$(BIN)/python -m splitfl.bench.utility_page utility-runs.json
	$(BIN)/python -m protocols.page > docs/protocols.md

# Trains the second model first, where it is not there yet. All three go on where they were broken off; hours on two free
# cores from nothing. Reads ../shared/data, or the folder data of the one that SPLITFL_SHARED names.
GPT2 := runs/gpt2
offsite: $(READY)
	test -f $(GPT2)/base/result.json || OMP_NUM_THREADS=1 $(BIN)/python examples/pretrain/pretrain.py \
		--data $${SPLITFL_SHARED:-../shared}/data --settings examples/pretrain/gpt2.toml --out $(GPT2) --trial base
	$(BIN)/splitfl bench offsite --model embedded --model gpt2-31m=$(GPT2)/base/best --cache runs/offsite \
		--tasks answers --tasks restaurants --tasks spam --json offsite-runs.json --resume
	$(BIN)/python -m splitfl.bench.offsite_page offsite-runs.json

# Goes on where it was broken off; half an hour on two free cores from nothing. Task polarity needs the extra minilm, and
# rows that do not come with splitfl are read as above.
rules: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/splitfl bench rules --json rules-runs.json --resume
	$(BIN)/python -m splitfl.bench.rules_page rules-runs.json
	$(BIN)/python -m splitfl.aggregation.page > docs/aggregation.md

# Three federated designs on one data set; some minutes on two free cores.
frameworks: $(READY)
	$(BIN)/splitfl bench frameworks --json frameworks-runs.json
	$(BIN)/python -m splitfl.bench.frameworks_page frameworks-runs.json

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
