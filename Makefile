# `make help` lists the targets. Everything goes into this checkout: .venv, .models, .cache.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Targets share the machine's cores and ports of measurement: one after the other, in their order.
.NOTPARALLEL:

MODEL ?= .models/SmolLM2-135M-Instruct.Q4_1.gguf
# The first that is new enough.
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
	"$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$each" && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
PROTOS := $(wildcard protos/splitserve/v1/*.proto)
GENERATED := .cache/protos

##@ Use

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(STAMP) ## make .venv with everything that is needed

$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "error: $(PYTHON) cannot make a virtual environment; is python3-venv installed?" >&2; exit 2; }
	@echo "installing into .venv: about 1 GB, some minutes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check --constraint requirements.lock --editable '.[engine,dev]'
	@touch $@

.PHONY: model
model: install ## fetch the small real model into .models (93 MB, once)
	@$(BIN)/python scripts/fetch_model.py > /dev/null

.PHONY: demo
demo: install model ## start the four services, ask one question, show the answer and its trace
	@$(BIN)/python scripts/demo.py --model "$(MODEL)"

.PHONY: serve
serve: install $(if $(filter command environment,$(firstword $(origin MODEL))),,model) ## serve MODEL=path until Ctrl-C; default: the small model
	@$(BIN)/splitserve serve --model "$(MODEL)"

.PHONY: bench
bench: install model ## replay a chat workload against the in-process engine
	$(BIN)/splitserve bench --engine --model "$(MODEL)" --workload benchmarks/workloads/chat.jsonl \
		--num-requests 64 --concurrency 16 --max-prompt-tokens 512 --max-output-tokens 128

##@ Check

.PHONY: check
check: install model lint types ## lint, types and unit tests: under a minute
	$(BIN)/pytest tests/unit -m "not slow"

.PHONY: test
test: install model lint types protos-check unit families services kernels gpu e2e k8s ## every check there is

.PHONY: lint
lint: install ## style and format
	$(BIN)/ruff check --extend-exclude .cache .
	$(BIN)/ruff format --check --extend-exclude .cache .

.PHONY: types
types: install ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy scripts

.PHONY: protos-check
protos-check: install ## protos are well-formed and the committed code is what they generate
	$(BIN)/buf lint protos
	@rm -rf $(GENERATED) && mkdir -p $(GENERATED)
	@$(call generate,$(GENERATED))
	diff -r -x __init__.py -x __pycache__ $(GENERATED)/splitserve/v1 splitserve/v1

.PHONY: unit
unit: install model ## tests of single modules
	$(BIN)/pytest tests/unit

.PHONY: families
families: install ## tests of every model family against transformers
	$(BIN)/pytest tests/families --numprocesses 2

.PHONY: services
services: install ## tests of services over real gRPC, with the fake engine
	$(BIN)/pytest tests/services

.PHONY: kernels
kernels: install ## tests of kernels against their plain references
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels --numprocesses 2

.PHONY: gpu
gpu: install ## tests of the engine on a GPU; skipped where there is none
	$(BIN)/pytest tests/gpu

.PHONY: e2e
e2e: install model ## tests of the whole suite with the real small model
	$(BIN)/pytest $(wildcard tests/golden/test_*.py) tests/e2e

.PHONY: k8s
k8s: install ## validate the manifests, strictly and offline
	$(BIN)/pytest tests/k8s

##@ Maintain

.PHONY: protos
protos: install ## generate splitserve/v1 from protos
	$(call generate,.)

.PHONY: lock
lock: install ## write requirements.lock from what .venv holds
	$(BIN)/python -m pip list --format freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel \
		| sed 's/+cpu$$//' > requirements.lock

.PHONY: clean
clean: ## remove caches; .venv and .models stay
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

define generate
$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
endef
