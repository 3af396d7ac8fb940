# Every target works alone from a bare clone: all it needs is Python (>= 3.11) with pip, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS ?= .venv-clients
TRITON ?= .triton

.DEFAULT_GOAL := help
.PHONY: help setup model run test test-long test-guides test-clients test-triton check format train bench gpu-check docker-check deploy-check ci clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create the virtual environment and install everything, once

$(STAMP): pyproject.toml constraints.txt
	@# A virtual environment that was interrupted while it was made has no pip.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	@touch $@

model: setup ## Fetch and convert the base model, once
	$(BIN)/softprompt model pull

run: setup ## Serve on http://127.0.0.1:8000 (settings: PORT, SOFTPROMPT_*)
	exec $(BIN)/softprompt serve

test: setup model ## Run the tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: setup model ## Run what takes minutes to hours; K=swaps only those whose names have it
	$(BIN)/python -m pytest -m long -s --timeout 0 $(if $(K),-k '$(K)')

test-guides: setup model ## Run the commands of docs/guides, each guide on a server of its own
	$(BIN)/python -m pytest -m guides --timeout 0

test-clients: setup model $(CLIENTS)/.installed ## Ask a real server with clients that others wrote; K=chat only some
	SOFTPROMPT_BIN=$(abspath $(BIN))/softprompt $(CLIENTS)/bin/python -m pytest tests/clients $(if $(K),-k '$(K)')

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/constraints.txt
	$(CLIENTS)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -r tests/clients/requirements.txt -c tests/clients/constraints.txt
	@touch $@

test-triton: setup ## Run the attention kernel of GPUs without one, by Triton's interpreter (installs Triton, 200 MB)
	test -d $(TRITON)/triton || $(BIN)/python -m pip install --no-deps --target $(TRITON) triton==3.6.0
	PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/test_triton_attention.py

check: setup ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: setup ## Example: train a soft prompt and publish it as the task mood
	$(BIN)/softprompt train mood --data examples/data/sentiment_mixed --classify \
		--template '{input}\nSentiment:' --init-text 'Is the sentiment of the text negative or positive?'

bench: setup model ## Measure this engine on a quiet machine (benchmarks/README.md has the peers and the rest)
	$(BIN)/python -m benchmarks.run throughput --systems ours-fp32,ours-int8

gpu-check: ## Check the CUDA path against transformers and time it (a GPU, torch, transformers and safetensors are enough)
	$(PYTHON) scripts/gpu_check.py

docker-check: ## Run the Dockerfile's steps without Docker and ask the server one question
	$(PYTHON) scripts/docker_check.py

deploy-check: setup ## Hold deploy/ to promtool, systemd-analyze and the schemas of Kubernetes and compose
	$(BIN)/python scripts/deploy_check.py

ci: check test ## What CI runs

clean: ## Remove the virtual environment and caches; the base model's cache stays
	rm -rf $(VENV) $(CLIENTS) $(TRITON) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find app benchmarks tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
