# Type `make` for the list.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
TESTS_STAMP := $(VENV)/.stamp-tests
BENCH := tests/bench/.venv
# One GPU trains the published recipe; a CPU one of the same shape, in about a minute.
PRESET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo full || echo small)
LOG ?= mainrun/logs/mainrun.log
BASELINES := baseline.log $(wildcard tests/baselines/*.log)
RUNS ?= $(wildcard mainrun/out/*)
# QUICK=--quick: a bench in a minute, whose figures mean nothing.
QUICK ?=

.DEFAULT_GOAL := help
.PHONY: help train pipeline tb test parity summarize faults lint bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

train: $(STAMP) ## train the reference recipe, observed, and compare it with its baseline
	@PRESET=$(PRESET) LOG=$(abspath $(LOG)) $(PY) mainrun/train.py
	@$(MAKE) -s parity
	@echo "the run lies in $$(ls -dt mainrun/out/*/ | head -n 1)"
	@echo "look at it with: make tb, make summarize"

# 2 says that no baseline fits these titles, which is no fault of the run.
parity: $(STAMP) ## compare the last training's validation losses with the baselines
	@test -e $(LOG) || { echo "$(LOG) is missing; make train writes it" >&2; exit 2; }
	@$(PY) mainrun/observability.py parity $(LOG) $(BASELINES) || [ $$? -eq 2 ]

pipeline: $(STAMP) ## train the example's four stages; run again, it goes on where it ended
	@PYTHON=$(abspath $(PY)) mainrun/pipeline/pipeline.sh

tb: $(STAMP) ## show the curves: TensorBoard on this machine's loopback
	@$(PY) mainrun/observability.py tb

summarize: $(STAMP) ## a table of the runs
	@$(if $(RUNS),$(PY) mainrun/observability.py summarize $(RUNS),echo "no run yet: make train")

test: $(TESTS_STAMP) ## the test suite, on up to four cores
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

faults: $(TESTS_STAMP) ## kill a small run 320 times, then starve and damage its checkpoints
	@$(PY) tests/faults/campaign.py --kills 300 --chain 20
	@$(PY) -m pytest tests/dropin/test_faults.py

lint: $(TESTS_STAMP) ## ruff, its formatter, and mypy --strict on all but the tests
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: $(BENCH)/.stamp ## measure step(), save and run beside their peers, which get a .venv of their own
	@$(BENCH)/bin/python tests/bench/bench_step.py $(QUICK)
	@OMP_NUM_THREADS=1 $(BENCH)/bin/python tests/bench/bench_save.py $(QUICK)
	@$(BENCH)/bin/python tests/bench/bench_run.py $(QUICK)

clean: ## remove the runs and the caches; keep .venv
	rm -rf mainrun/out mainrun/logs .pytest_cache .mypy_cache .ruff_cache .hypothesis build mainrun/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): requirements.txt
$(BENCH)/.stamp: requirements.txt tests/bench/requirements.txt

%/.stamp:
	@echo "installing $^ into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check $(addprefix -r ,$^)
	@touch $@

$(TESTS_STAMP): tests/requirements.txt $(STAMP)
	@echo "installing $< into $(VENV)"
	@$(PY) -m pip install -q --disable-pip-version-check -r $<
	@touch $@
