# Two commands for a newcomer: `make serve` and `make test`. `make help` prints the lines that begin with "#:".

PYTHON ?= $(shell requirements/python.sh)
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
KERNELS := embedmesh/engine/native/encoder
SHELL  := bash
export PYTHONDONTWRITEBYTECODE :=  # each of some hundred processes would compile everything again
.SHELLFLAGS := -o pipefail -ec

TIMED   := tests/story/test_seconds.py  # it holds us to seconds: alone
DECIDES := rules dialects flow fleet signing  # rooms whose tests need neither model, disk nor sockets
BENCHES := clients conformance ships streams reload spenders fault wedge starved hostile soak strain upstreams bench-engine bench-quality bench-gateway bench-cached bench-confidential bench-client bench-engines
VIRTUAL := lives sim mutate bench-generation  # these need no model
BY_HAND := docs batches confidential crash locks scale guard bench-store bench-fleet bench-rerank bench-two-models platforms

.DEFAULT_GOAL := help
.PHONY: help serve test thorough fast check lock wheel clean $(BENCHES) $(VIRTUAL) $(BY_HAND)

help:
	@sed -n 's/^#: \{0,1\}//p' $(MAKEFILE_LIST)

#: serve             set up, then run a gateway and a node with a real model (ARGS="--port 8099")
#: test              everything: rules, stores, engine, real processes, real SDKs
#: fast, check       what decides (under 10 s); format, lint, types, import contracts
#: thorough          all examples of the tests that try a part of them in `make test`

serve: $(VENV)/.setup
	@exec $(BIN)/embedmesh serve $(ARGS)

test: $(VENV)/.setup $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal -p no:schemathesis $(addprefix --cov embedmesh/,$(DECIDES)) --cov-report= $(addprefix tests/,$(DECIDES)) $(ARGS)
	@$(foreach room,$(DECIDES),echo "covered: $(room) $$($(BIN)/coverage report --include 'embedmesh/$(room)/*' --format total) %";)
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder $(addprefix --ignore tests/,$(DECIDES)) $(addprefix --ignore ,$(TIMED)) $(ARGS)
	$(BIN)/pytest $(TIMED) $(ARGS)

thorough: $(VENV)/.setup $(VENV)/.dev
	THOROUGH=1 $(BIN)/pytest -n 2 --dist loadfile $$(grep -rlE 'quick_or|THOROUGH' tests --include='test_*.py') $(ARGS)

fast: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal -p no:schemathesis -p no:anyio -p no:pytest_cov $(addprefix tests/,$(DECIDES)) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin -p embedmesh
	$(BIN)/lint-imports

#: Promises (minutes each; the last line is the verdict; ARGS="--help" lists options):
#: crash, batches    kill -9 gateways, node, engine, PostgreSQL; the ledger adds up; each line once
#: spenders          64 callers with money for 10, 100, 1,000 over three gateways; exactly as many pay
#: lives             10,000 requests' lives in virtual time, with gateways that die at any await
#: locks, confidential   10,000 locks nobody uses; 10,000 attacks on sealed calls: none is answered
#: streams, reload   streams cut, stalled, reset, left: all is paid right; settings change under load
#: fault, upstreams  nodes that lie, hang, break and vanish; real servers of other makes as nodes
#: wedge, starved    break the engine in every way; 24 busy loops beside a server
#: hostile           a stranger, a broke key and a paying tenant attack; others do not notice
#: strain            five times too much load, 2,000 stalled connections, a million requests
#: soak, scale       100,000 texts through a node; a store of ten million entries
#: mutate            change the ledger, holds, keys and limits in small ways; a test notices
#: conformance, clients, sim   wrong nodes behind gateways; other SDKs; our scheduler beside routers
#: Speed (minutes each; peers are installed in .bench):
#: guard             has a request become dearer? each stage of the gateway over mere forwarding
#: bench-engine, bench-rerank, bench-quality, bench-engines   the engine beside peers; STS-B; Daft, Ray
#: bench-gateway, bench-generation   beside nginx, routers, LiteLLM, Portkey; streams, a slow reader
#: bench-fleet, bench-two-models   unequal nodes behind us and other routers; models on the same cores
#: bench-cached, bench-store, bench-confidential, bench-client   known texts; holds; sealed; clients

$(BENCHES): $(VENV)/.setup $(VENV)/.dev
$(VIRTUAL): $(VENV)/.dev
$(BENCHES) $(VIRTUAL):
	$(BIN)/python -m bench.$(@:bench-%=%) $(ARGS)

confidential: $(VENV)/.dev
	$(BIN)/python -m bench.middle $(ARGS)

crash: $(VENV)/.setup $(VENV)/.dev
	$(BIN)/python -m bench.crash $(ARGS)
	$(BIN)/python -m bench.crash --store postgres $(ARGS)
	$(BIN)/python -m bench.crash --store postgres --receipts --kills 10 $(ARGS)
	$(BIN)/python -m bench.crash_streams
	$(BIN)/python -m bench.crash_streams --store postgres

batches: $(VENV)/.setup $(VENV)/.dev
	$(BIN)/python -m bench.batches $(ARGS)
	$(BIN)/python -m bench.batches --store postgres $(ARGS)

locks scale bench-store: $(VENV)/.dev
	$(BIN)/python -m bench.$(@:bench-%=%) $(ARGS)
	$(BIN)/python -m bench.$(@:bench-%=%) --store postgres $(ARGS)

bench-two-models: $(VENV)/.setup $(VENV)/.dev
	$(BIN)/python -m bench.two_models $(ARGS)

docs: $(VENV)/.dev
	@$(BIN)/python -m bench.site $(ARGS)

platforms: $(VENV)/.dev
	$(BIN)/python -m bench.platforms $(ARGS)

guard: $(VENV)/.setup $(VENV)/.dev
	$(BIN)/python -m bench.gateway.guard $(ARGS)

bench-fleet: $(VENV)/.setup $(VENV)/.dev
	$(BIN)/python -m bench.choosing $(ARGS)
	$(BIN)/python -m bench.choosing.real

bench-rerank: $(VENV)/.setup $(VENV)/.dev
	$(BIN)/python -m bench.rerank $(ARGS)
	$(BIN)/python -m bench.rerank.spread

#: docs, ships, platforms, lock, wheel, clean   the site (ARGS=serve); deploy/; pins; *.lock; tidy up

lock:
	requirements/lock.sh

wheel: $(VENV)/.dev
	$(BIN)/python -m hatchling build -t wheel

clean:
	rm -rf $(VENV) .bench bench/results dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache node_modules

# -- set-up: each step leaves a stamp, so that a second run is instant ------------------------------------------------

$(VENV)/bin/pip:
	@echo "embedmesh: making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit("embedmesh needs Python 3.11 or newer; this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements/install.lock pyproject.toml hatch_build.py $(KERNELS).c | $(VENV)/bin/pip
	@echo "embedmesh: installing pinned, hash-checked dependencies"
	@$(BIN)/pip install --disable-pip-version-check --require-hashes --no-deps -r requirements/install.lock \
		| sed -u -n -E 's/^(Collecting [^ ]+|Installing collected packages).*/  \1/p'
	@$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@test -e $(KERNELS).so || echo "  without kernels of our own (they need cc, on Linux x86-64): models run on OpenVINO"
	@touch $@

$(VENV)/.setup: $(VENV)/.installed
	@$(BIN)/embedmesh setup
	@touch $@

$(VENV)/.dev: requirements/dev.lock $(VENV)/.installed
	@echo "embedmesh: installing what the tests need"
	@$(BIN)/pip install --disable-pip-version-check --quiet --require-hashes --no-deps -r requirements/dev.lock
	@touch $@
