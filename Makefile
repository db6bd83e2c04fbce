# Two commands for a newcomer: `make serve` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
SHELL  := bash
.SHELLFLAGS := -o pipefail -ec

TIMED  := tests/story/test_crash.py tests/story/test_serve.py  # they hold us to seconds: alone
DECIDES := rules flow fleet signing  # rooms whose tests need neither model, disc nor sockets

.DEFAULT_GOAL := help
.PHONY: help serve test thorough fast check crash spenders scale mutate fault wedge starved soak sim lives bench-engine bench-quality bench-fleet bench-gateway guard bench-cached strain hostile bench-store upstreams lock wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

serve: $(VENV)/.setup  ## set up, then run a gateway and a node with a real model (ARGS="--port 8099")
	@exec $(BIN)/embedmesh serve $(ARGS)

test: $(VENV)/.setup $(VENV)/.dev  ## everything: rules, stores, engine, real processes, real SDKs
	$(BIN)/pytest -n 2 --dist worksteal -p no:schemathesis $(addprefix --cov embedmesh/,$(DECIDES)) --cov-report= $(addprefix tests/,$(DECIDES)) $(ARGS)
	@$(foreach room,$(DECIDES),echo "covered: $(room) $$($(BIN)/coverage report --include 'embedmesh/$(room)/*' --format total) %";)
	$(BIN)/pytest -n 3 --dist loadfile $(addprefix --ignore tests/,$(DECIDES)) $(addprefix --ignore ,$(TIMED)) $(ARGS)
	$(BIN)/pytest $(TIMED) $(ARGS)

thorough: $(VENV)/.setup $(VENV)/.dev  ## all examples of the tests that try a part of them in `make test` (minutes)
	THOROUGH=1 $(BIN)/pytest -n 2 --dist loadfile tests/hostile $(ARGS)

fast: $(VENV)/.dev  ## what decides: rules, flow, fleet, signing (under 10 s)
	$(BIN)/pytest -n 2 --dist worksteal -p no:schemathesis -p no:anyio -p no:pytest_cov $(addprefix tests/,$(DECIDES)) $(ARGS)

check: $(VENV)/.dev  ## static checks: format, lint, types, import arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

crash: $(VENV)/.setup $(VENV)/.dev  ## kill -9 gateways, node, engine and PostgreSQL under load; the ledger must still add up (minutes)
	$(BIN)/python -m bench.crash $(ARGS)
	$(BIN)/python -m bench.crash --store postgres $(ARGS)
	$(BIN)/python -m bench.crash --store postgres --receipts --kills 10 $(ARGS)

spenders: $(VENV)/.setup $(VENV)/.dev  ## 64 callers with money for 10 over three gateways, 200 rounds; exactly 10 are served (minutes)
	$(BIN)/python -m bench.spenders $(ARGS)

mutate: $(VENV)/.dev  ## change the ledger, holds, keys and limits in every small way: does any test notice? (half an hour)
	$(BIN)/python -m bench.mutate $(ARGS)

scale: $(VENV)/.dev  ## a million accounts and ten million entries: no question of a request may get slower (minutes, 10 GB)
	$(BIN)/python -m bench.scale $(ARGS)
	$(BIN)/python -m bench.scale --store postgres $(ARGS)

sim: $(VENV)/.dev  ## the line beside other routers, in virtual time: waits, fairness, idle nodes (2 minutes)
	$(BIN)/python -m bench.sim $(ARGS)

lives: $(VENV)/.dev  ## 10,000 requests' lives in virtual time, with gateways that die at any await (1 minute)
	$(BIN)/python -m bench.lives $(ARGS)

bench-quality: $(VENV)/.setup $(VENV)/.dev  ## parity with sentence-transformers and STS-B, as a table
	$(BIN)/python -m bench.quality $(ARGS)

bench-engine: $(VENV)/.setup $(VENV)/.dev  ## the engine beside its peers: speed, latency, start, memory (minutes)
	$(BIN)/python -m bench.engine $(ARGS)

fault: $(VENV)/.setup $(VENV)/.dev  ## nodes that lie, hang, break and vanish under load; no caller may notice (minutes)
	$(BIN)/python -m bench.fault $(ARGS)

wedge: $(VENV)/.setup $(VENV)/.dev  ## break the engine in every way under load; nobody may wait or be told wrong (minutes)
	$(BIN)/python -m bench.wedge $(ARGS)

starved: $(VENV)/.setup $(VENV)/.dev  ## 24 busy loops beside a server: it may be slow, and must not restart, refuse or lie (5 minutes)
	$(BIN)/python -m bench.starved $(ARGS)

soak: $(VENV)/.setup $(VENV)/.dev  ## 100,000 texts through a node; memory must not grow (minutes)
	$(BIN)/python -m bench.soak $(ARGS)

bench-fleet: $(VENV)/.setup $(VENV)/.dev  ## choosing among unequal nodes beside other routers, and two real nodes (minutes)
	$(BIN)/python -m bench.choosing $(ARGS)
	$(BIN)/python -m bench.choosing.real

upstreams: $(VENV)/.setup $(VENV)/.dev  ## real servers of other makes (infinity, llama.cpp) as nodes (minutes; installs them in .bench)
	$(BIN)/python -m bench.upstreams $(ARGS)

bench-gateway: $(VENV)/.setup $(VENV)/.dev  ## the gateway's own cost in stages, beside nginx, vllm-router, LiteLLM and Portkey (minutes; installs them in .bench)
	$(BIN)/python -m bench.gateway $(ARGS)

guard: $(VENV)/.setup $(VENV)/.dev  ## has a request become dearer? each stage of the gateway over mere forwarding (a minute)
	$(BIN)/python -m bench.gateway.guard $(ARGS)

bench-cached: $(VENV)/.setup $(VENV)/.dev  ## a text that is known already beside one that is embedded (a minute)
	$(BIN)/python -m bench.cached $(ARGS)

strain: $(VENV)/.setup $(VENV)/.dev  ## a gateway asked for five times too much, with 2,000 stalled connections, and a million times (a quarter of an hour)
	$(BIN)/python -m bench.strain $(ARGS)

hostile: $(VENV)/.setup $(VENV)/.dev  ## a stranger, a broke key and a paying tenant attack a gateway in every way; others must not notice (minutes)
	$(BIN)/python -m bench.hostile $(ARGS)

bench-store: $(VENV)/.dev  ## holds a second, and what a hold adds to a request, on SQLite and PostgreSQL
	$(BIN)/python -m bench.store $(ARGS)
	$(BIN)/python -m bench.store --store postgres $(ARGS)

lock:  ## write requirements/*.lock anew (needs uv)
	requirements/lock.sh

wheel: $(VENV)/.dev  ## build dist/embedmesh-*.whl
	$(BIN)/python -m hatchling build -t wheel

clean:  ## remove what the targets made
	rm -rf $(VENV) .bench bench/results dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache node_modules

# -- set-up: each step leaves a stamp, so that a second run is instant ------------------------------------------------

$(VENV)/bin/pip:
	@echo "embedmesh: making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("embedmesh needs Python 3.11 or newer; this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements/install.lock pyproject.toml | $(VENV)/bin/pip
	@echo "embedmesh: installing pinned, hash-checked dependencies"
	@$(BIN)/pip install --disable-pip-version-check --require-hashes --no-deps -r requirements/install.lock \
		| sed -u -n -E 's/^(Collecting [^ ]+|Installing collected packages).*/  \1/p'
	@$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.setup: $(VENV)/.installed
	@$(BIN)/embedmesh setup
	@touch $@

$(VENV)/.dev: requirements/dev.lock $(VENV)/.installed
	@echo "embedmesh: installing what the tests need"
	@$(BIN)/pip install --disable-pip-version-check --quiet --require-hashes --no-deps -r requirements/dev.lock
	@touch $@
