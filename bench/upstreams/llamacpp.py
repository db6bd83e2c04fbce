"""llama.cpp's HTTP server, which xllamacpp has inside, run by its own Python: `GGUF PORT KEY [generates|reranks]`."""

import signal
import sys

import xllamacpp  # type: ignore[import-not-found]

gguf, port, key, *does = sys.argv[1:]
generates, reranks = does == ["generates"], does == ["reranks"]
SLOTS, SLOT_TOKENS = 4, 4_096 if generates else 256  # calls at one time; what the model takes
params = xllamacpp.CommonParams()
params.model.path = gguf
params.hostnames = ["127.0.0.1"]
params.port = int(port)
if generates:
    params.endpoint_slots = True  # so that others see what it is doing
else:
    params.embedding = True
    pooling = xllamacpp.llama_pooling_type
    params.pooling_type = pooling.LLAMA_POOLING_TYPE_RANK if reranks else pooling.LLAMA_POOLING_TYPE_MEAN
params.n_parallel = SLOTS
params.kv_unified = False
params.n_ctx = SLOTS * SLOT_TOKENS
params.n_batch = params.n_ubatch = SLOTS * SLOT_TOKENS
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.offline = True
params.ui = False
params.warmup = False
params.api_keys = [key]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
server = xllamacpp.Server(params)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
