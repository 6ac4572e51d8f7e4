# Two commands do everything on a fresh machine with Python 3.11+, pip and g++:
#   make demo    trains, prunes, fine-tunes, measures and reports on a real data set, in about a minute
#   make test    the whole test suite

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-long lint bench bench-runtime bench-plan docs pictures clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,3p' Makefile | cut -c5-
	@echo "make test-long, lint, bench, docs, pictures, clean: the long tests, style only, benchmarks, pages, start afresh"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/secateur run recipes/digits-demo.toml -o runs/digits-demo

test: $(READY)
	scripts/chromium.sh
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/check.py

# The same promises on many more cases, and runs killed at many more moments: about half an hour
test-long: $(READY)
	OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 2 -m long
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/native_checks.py

bench: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/bench_hold.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_scoring.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_threshold.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_solvers.py

# The tables of docs/results/runtime.md, about 15 minutes; DEEPSPARSE=PYTHON adds that engine from its own environment
bench-runtime: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	rm -f docs/results/runtime.jsonl
	$(BIN)/python benchmarks/bench_runtime.py --near 4 $(if $(DEEPSPARSE),--deepsparse $(DEEPSPARSE)) --write docs/results/runtime.jsonl
	$(BIN)/python benchmarks/runtime_page.py docs/results/runtime.jsonl docs/results/runtime.md

# The tables of docs/results/plan.md, about an hour; DATA names the folder of data sets
bench-plan: $(READY)
	for s in 0 1 2; do $(BIN)/secateur run recipes/dense-resnet20-cifar10.toml -s seed=$$s -o runs/plan-dense-$$s $(if $(DATA),--data-dir $(DATA)) || exit; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_plan.py --write docs/results/plan.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_plan_loss.py $(if $(DATA),--data-dir $(DATA)) --write docs/results/plan.jsonl
	$(BIN)/python benchmarks/bench_planning.py --write docs/results/plan.jsonl
	for r in 0.4 0.25; do OMP_NUM_THREADS=1 SECATEUR_DATA=$(or $(DATA),$$SECATEUR_DATA) $(BIN)/python benchmarks/bench_plan_accuracy.py runs/plan-dense-? --ratio $$r --write docs/results/plan.jsonl || exit; done
	$(BIN)/python benchmarks/plan_page.py

lint: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/check.py --lint

docs: $(READY)
	$(BIN)/python scripts/methods_page.py
	$(BIN)/python scripts/claims_page.py

# The pictures of docs/report.md and the README, made by the test that opens the page; needs MNIST
pictures: $(READY)
	scripts/chromium.sh
	SECATEUR_SHOTS=docs/images $(BIN)/python -m pytest tests/browser/test_real_run.py -k documentation

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
