"""One client embeds the texts of a file: `python drive.py NAME JOB`, by the interpreter that has the client.

It needs nothing but the client, numpy and the standard library. It prints one JSON object, and writes the vectors.
"""

import asyncio
import json
import os
import resource
import sys
import time

import numpy as np


def openai(job, texts):
    """The way of every tutorial: tasks, and a semaphore."""
    from openai import AsyncOpenAI

    async def run():
        gate = asyncio.Semaphore(job["concurrency"])
        async with AsyncOpenAI(base_url=job["base_url"], api_key=job["api_key"], timeout=600) as client:

            async def ask(some):
                async with gate:
                    reply = await client.embeddings.create(model=job["model"], input=some)
                return np.array([item.embedding for item in reply.data], dtype=np.float32)

            size = job["batch_size"]
            parts = [texts[at : at + size] for at in range(0, len(texts), size)]
            return np.concatenate(await asyncio.gather(*map(ask, parts)))

    return lambda: asyncio.run(run())


def baseten(job, texts, **more):
    """Its own function, with as many requests of the same size. It asks for floats, as `numpy()` needs them."""
    from baseten_performance_client import PerformanceClient, RequestProcessingPreference

    client = PerformanceClient(base_url=job["base_url"].removesuffix("/v1"), api_key=job["api_key"])
    preference = None
    if not more:
        preference = RequestProcessingPreference(
            batch_size=job["batch_size"],
            max_concurrent_requests=job["concurrency"],
            max_chars_per_request=job["chars_max"],
        )
    return lambda: client.embed(input=texts, model=job["model"], preference=preference).numpy()


def baseten_default(job, texts):
    """As it comes: few texts a request, many requests."""
    return baseten(job, texts, default=True)


def embedmesh(job, texts):
    """Ours, with as many requests of the same size."""
    return _ours(job, texts, batch_size=job["batch_size"], concurrency=job["concurrency"])


def embedmesh_default(job, texts):
    """As it comes."""
    return _ours(job, texts)


def _ours(job, texts, **options):
    from embedmesh.client import Client

    client = Client(base_url=job["base_url"], api_key=job["api_key"])
    return lambda: client.embed(texts, model=job["model"], **options)


def embedmesh_stream(job, texts):
    """Ours, a chunk at a time, none of which is kept: the vectors are counted here, and not checked."""
    from embedmesh.client import Client

    client = Client(base_url=job["base_url"], api_key=job["api_key"])
    options = {"batch_size": job["batch_size"], "concurrency": job["concurrency"]}

    def run():
        total = np.zeros(1, dtype=np.float64)
        for _, vectors in client.embed_stream(iter(texts), model=job["model"], **options):
            total += len(vectors)
        return total

    return run


CLIENTS = {
    "openai": openai,
    "baseten": baseten,
    "baseten, as it comes": baseten_default,
    "embedmesh": embedmesh,
    "embedmesh, as it comes": embedmesh_default,
    "embedmesh, stream": embedmesh_stream,
}


def cpu_s():
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main():
    """Embed a few texts to warm up, and then all."""
    name, file = sys.argv[1:]
    with open(file) as opened:
        job = json.load(opened)
    texts = job["texts"]
    CLIENTS[name](job, texts[: job["batch_size"] * 2])()
    work = CLIENTS[name](job, texts)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began, used = time.perf_counter(), cpu_s()
    vectors = work()
    seconds, used = time.perf_counter() - began, cpu_s() - used
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if vectors.ndim == 2:
        np.save(job["vectors"], vectors.astype("<f4", copy=False))
    said = {"seconds": seconds, "cpu_s": used, "before_mb": before_mb, "peak_mb": peak_mb, "pid": os.getpid()}
    print(json.dumps(said | {"count": int(vectors[0]) if vectors.ndim == 1 else len(vectors)}))


main()
