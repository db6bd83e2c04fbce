"""One client embeds the texts of a file: `python drive.py NAME JOB`, by the interpreter that has the client.

It needs nothing but the client, numpy and the standard library. It prints one JSON object, and writes the vectors.
"""

import asyncio
import json
import os
import resource
import sys
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Work = Callable[[], Any]
"""Embeds all texts: an array (texts, width), or how many there were."""


def openai(job: Job, texts: list[str]) -> Work:
    """The way of every tutorial: tasks, and a semaphore."""
    from openai import AsyncOpenAI

    async def run() -> Any:
        gate = asyncio.Semaphore(job["concurrency"])
        async with AsyncOpenAI(base_url=job["base_url"], api_key=job["api_key"], timeout=600) as client:

            async def ask(some: list[str]) -> Any:
                async with gate:
                    reply = await client.embeddings.create(model=job["model"], input=some)
                return np.array([item.embedding for item in reply.data], dtype=np.float32)

            size = job["batch_size"]
            parts = [texts[at : at + size] for at in range(0, len(texts), size)]
            return np.concatenate(await asyncio.gather(*map(ask, parts)))

    return lambda: asyncio.run(run())


def baseten(job: Job, texts: list[str], *, as_it_comes: bool = False) -> Work:
    """Its own function, with as many requests of the same size. It asks for floats, as `numpy()` needs them."""
    from baseten_performance_client import PerformanceClient, RequestProcessingPreference

    client = PerformanceClient(base_url=job["base_url"].removesuffix("/v1"), api_key=job["api_key"])
    preference = None
    if not as_it_comes:
        preference = RequestProcessingPreference(
            batch_size=job["batch_size"],
            max_concurrent_requests=job["concurrency"],
            max_chars_per_request=job["chars_max"],
        )
    return lambda: client.embed(input=texts, model=job["model"], preference=preference).numpy()


def baseten_base64(job: Job, texts: list[str]) -> Work:
    """As many requests of the same size, whose base64 it hands on as it is: that is decoded here."""
    from baseten_performance_client import PerformanceClient, RequestProcessingPreference

    client = PerformanceClient(base_url=job["base_url"].removesuffix("/v1"), api_key=job["api_key"])
    preference = RequestProcessingPreference(
        batch_size=job["batch_size"],
        max_concurrent_requests=job["concurrency"],
        max_chars_per_request=job["chars_max"],
    )

    def run() -> Any:
        reply = client.embed(input=texts, model=job["model"], encoding_format="base64", preference=preference)
        return np.frombuffer(b"".join([b64decode(item.embedding) for item in reply.data]), "<f4").reshape(
            len(texts), -1
        )

    return run


def baseten_default(job: Job, texts: list[str]) -> Work:
    """As it comes: few texts a request, many requests."""
    return baseten(job, texts, as_it_comes=True)


def embedmesh(job: Job, texts: list[str]) -> Work:
    """Ours, with as many requests of the same size."""
    return _ours(job, texts, batch_size=job["batch_size"], concurrency=job["concurrency"])


def embedmesh_default(job: Job, texts: list[str]) -> Work:
    """As it comes."""
    return _ours(job, texts)


def _ours(job: Job, texts: list[str], **options: Any) -> Work:
    from embedmesh.client import Client

    client = Client(base_url=job["base_url"], api_key=job["api_key"])
    return lambda: client.embed(texts, model=job["model"], **options)


def embedmesh_stream(job: Job, texts: list[str]) -> Work:
    """Ours, a chunk at a time, none of which is kept: the vectors are counted here, and not checked."""
    from embedmesh.client import Client

    client = Client(base_url=job["base_url"], api_key=job["api_key"])
    options = {"batch_size": job["batch_size"], "concurrency": job["concurrency"]}

    def run() -> Any:
        total = np.zeros(1, dtype=np.float64)
        for _, vectors in client.embed_stream(iter(texts), model=job["model"], **options):
            total += len(vectors)
        return total

    return run


CLIENTS = {
    "openai": openai,
    "baseten": baseten,
    "baseten, base64": baseten_base64,
    "baseten, as it comes": baseten_default,
    "embedmesh": embedmesh,
    "embedmesh, as it comes": embedmesh_default,
    "embedmesh, stream": embedmesh_stream,
}


def resident_mb() -> float:
    """The most that was resident so far. The kernel's `ru_maxrss` would have that of the parent in it."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def cpu_s() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Embed a few texts to warm up, and then all."""
    name, file = sys.argv[1:]
    with Path(file).open() as opened:
        job = json.load(opened)
    texts = job["texts"]
    CLIENTS[name](job, texts[: job["batch_size"] * 2])()
    work = CLIENTS[name](job, texts)
    before_mb = resident_mb()
    began, used = time.perf_counter(), cpu_s()
    vectors = work()
    seconds, used = time.perf_counter() - began, cpu_s() - used
    peak_mb = resident_mb()
    if vectors.ndim == 2:
        np.save(job["vectors"], vectors.astype("<f4", copy=False))
    said = {"seconds": seconds, "cpu_s": used, "before_mb": before_mb, "peak_mb": peak_mb, "pid": os.getpid()}
    print(json.dumps(said | {"count": int(vectors[0]) if vectors.ndim == 1 else len(vectors)}))


if __name__ == "__main__":
    main()
