# `make` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check test-all test-presets lint types format clean

PRESET ?= embedded
ARGS ?=
# The first that runs: some machines have a python3.11 on the path that only says it is not installed.
PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell $(p) -c 'print("$(p)")' 2>/dev/null)))
RUN := .venv/bin/python
HAS_GPU = $(shell nvidia-smi -L 2>/dev/null)

# No test needs a model hub; this turns a hidden download into an error.
test check test-all test-presets: export HF_HUB_OFFLINE := 1

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{printf "make %-12s %s\n", $$1, $$2}'

setup: ## build .venv (minutes the first time, nothing when it is up to date)
	@$(PYTHON) scripts/setup.py

demo: setup ## run the whole pipeline; PRESET=embedded, ARGS="seed=1 ..." overrides the config
	$(RUN) jobs/pipeline.py --preset $(PRESET) $(ARGS)

serve: setup ## the delta-generation endpoint on http://127.0.0.1:8000, with the checkpoint of `make demo`
	@test -f runs/embedded-seed0/grad_transformer/config.json || { echo "no checkpoint yet: run make demo first"; exit 2; }
	.venv/bin/serve run serve_configs/local.yaml

QUICK := not ray and not vllm and not slow and not gpu

test: check ## lint, types and every test but the slow and GPU ones
	$(RUN) -m pytest -m "(ray or vllm) and not slow and not gpu"

check: lint types ## lint, types and the quick tests (no Ray, no vLLM), two at once
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(QUICK)"

PRESETS := tests/studies/test_dry_runs.py

test-all: check ## lint, types and every test that this machine can run but those of test-presets (an hour)
	$(RUN) -m pytest --ignore $(PRESETS) -m "not ($(QUICK))$(if $(HAS_GPU),, and not gpu)"

test-presets: setup ## each preset of real models on tiny models, from curation to the table (another hour)
	$(RUN) -m pytest $(PRESETS)

lint: setup ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup ## mypy
	$(RUN) -m mypy gt_ray

format: setup ## let ruff fix and format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## remove caches and build outputs; keeps .venv, store/ and runs/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
