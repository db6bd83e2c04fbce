"""One engine embeds the texts of a file: `python drive.py NAME JOB`, by the interpreter that has the engine.

It prints one JSON object, and writes the vectors in the order of the texts.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ |= {"DO_NOT_TRACK": "true", "RAY_USAGE_STATS_ENABLED": "0"}
Job = dict[str, Any]
CLIENT, DAFT, DAFT_OPENAI, RAY = "embedmesh.client", "Daft", "Daft, its own provider", "Ray"
BATCH = 1_024


def client(job: Job, texts: list[str]) -> Any:
    """No engine."""
    from embedmesh.client import Client

    with Client(base_url=job["base_url"], api_key=job["api_key"]) as ours:
        return ours.embed(texts, model=job["model"])


def daft(job: Job, texts: list[str]) -> Any:
    """Our provider."""
    from embedmesh.daft import EmbedmeshProvider

    return _by_daft(texts, model=job["model"], provider=EmbedmeshProvider(**_access(job)))


def daft_openai(job: Job, texts: list[str]) -> Any:
    """Its own provider, unmodified."""
    import daft

    daft.set_provider("openai", **_access(job))
    return _by_daft(texts, model=job["model"])


def _by_daft(texts: list[str], **options: Any) -> Any:
    import daft
    from daft.functions import embed_text

    frame = daft.from_pydict({"at": list(range(len(texts))), "text": texts})
    found = frame.select(frame["at"], embed_text(frame["text"], **options).alias("embedding")).to_arrow()
    order = np.argsort(found.column("at").to_numpy())  # batches come in the order in which they are done
    return np.stack(found.column("embedding").to_numpy())[order]


def ray(job: Job, texts: list[str]) -> Any:
    """map_batches."""
    import pyarrow
    import ray

    from embedmesh.ray import Embedder

    table = pyarrow.table({"at": np.arange(len(texts)), "text": texts})
    data = ray.data.from_arrow(table).map_batches(
        Embedder,
        fn_constructor_kwargs={**_access(job), "model": job["model"]},
        batch_size=BATCH,
        concurrency=1,
        num_cpus=0.2,
    )
    batches = list(data.iter_batches(batch_size=None))  # `take_all` makes a dict of every row
    order = np.argsort(np.concatenate([batch["at"] for batch in batches]))
    return np.concatenate([batch["embedding"] for batch in batches])[order]


def _access(job: Job) -> Job:
    return {"base_url": job["base_url"], "api_key": job["api_key"]}


WAYS: dict[str, Callable[[Job, list[str]], Any]] = {CLIENT: client, DAFT: daft, DAFT_OPENAI: daft_openai, RAY: ray}


def main() -> None:
    """A few texts to warm up, and then all."""
    name, file = sys.argv[1:]
    job = json.loads(Path(file).read_text())
    if name == RAY:
        import ray as cluster

        cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        cluster.data.DataContext.get_current().enable_progress_bars = False
    WAYS[name](job, job["texts"][:8])
    began = time.perf_counter()
    vectors = WAYS[name](job, job["texts"])
    seconds = time.perf_counter() - began
    np.save(job["vectors"], vectors.astype("<f4", copy=False))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
