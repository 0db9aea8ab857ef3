PYTHON ?= python3.11
LOCK ?= requirements/cpu.lock
BIN := .venv/bin
ARGS ?=
# Twice the cores of a small machine: tests of servers wait for most of their time.
JOBS ?= 4

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint coverage format bench lock hooks release clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "LOCK=requirements/cuda.lock sets up for a GPU; ARGS='...' goes to demo, bench and the tests"

setup: ## create .venv from the lock and install this checkout
	@PYTHON="$(PYTHON)" requirements/install.sh "$(LOCK)"

demo: setup ## what a small KV cache forgets and kept tokens remember, live (ARGS='--questions 20')
	$(BIN)/pte-vllm demo $(ARGS)

test: setup ## the tests that need no GPU and little time
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

test-slow: setup ## the long tests
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: setup ## ruff, mypy, and which folder may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# server/ and patches/ are sub-packages once installed, and import-linter has to see them there
	@rm -rf build/imports && mkdir -p build/imports
	@cp -r pte_vllm build/imports/ && cp -r server patches build/imports/pte_vllm/
	@cd build/imports && "$(CURDIR)/$(BIN)/lint-imports" --no-cache "$(CURDIR)/pyproject.toml"

coverage: setup ## line coverage of pte_vllm, server and patches by the tests of `make test`
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

format: setup ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## speed beside vLLM as it is (ARGS='latency --repeats 2'; ARGS=--help)
	$(BIN)/pte-vllm model fetch smollm2 .cache/models/smollm2
	$(BIN)/pte-vllm bench $(or $(ARGS),lora)

lock: ## resolve requirements/*.lock again (KINDS='cpu cuda train')
	$(PYTHON) requirements/lock.py $(KINDS)

hooks: setup ## write the hashes of the installed vLLM's hooks, once its changes were read
	$(BIN)/python -m pte_vllm.compat.hooks --refresh $(ARGS)

release: setup ## build sdist and wheel into dist/, and try both in clean environments
	rm -rf dist
	PTE_DIST=dist $(BIN)/python -m pytest tests/test_release.py $(ARGS)

clean: ## remove caches and outputs; keeps .venv and .cache
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
