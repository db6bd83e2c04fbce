"""Ray: a callable class for `ray.data.Dataset.map_batches`, and nodes on a cluster's workers while a job lasts."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from embedmesh.client.bulk.options import BulkOptions
from embedmesh.client.bulk.shared import SharedClient
from embedmesh.client.errors import InputRefused, WrongCall

NODE_READY_S = 300.0  # a large model is compiled at its first start
NODE_STOP_S = 10.0  # a node answers what it has for eight
LOG_LINES = 20  # of a node that did not start
JOINED = "joined "  # in the node's log, once the gateway has taken it


class Embedder:
    """Adds vectors to batches: `ds.map_batches(Embedder, fn_constructor_kwargs={"model": …}, batch_size=1024)`.

    Each actor works on several batches at one time (four, unless RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY says
    otherwise), which share its connections; when the endpoint is busy they wait, and Ray gives it no more.
    """

    def __init__(
        self,
        *,
        model: str,
        column: str = "text",
        output: str = "embedding",
        errors: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        **options: Unpack[BulkOptions],
    ) -> None:
        """`column` has texts; `output` gets float32 rows, of NaN where a text is None or was refused.

        `errors` is a column for why a text was refused, None for the others; without it the first refusal raises
        InputRefused and ends the job. `base_url` and `api_key` as of Client, `options` as of Client.embed: requests
        in flight are those of one actor. Raises WrongCall.
        """
        self._client = SharedClient(model=model, base_url=base_url, api_key=api_key, **options)
        self._column, self._output, self._errors = column, output, errors

    async def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with `output`, float32 (rows, width). Raises subclasses of EmbedmeshError."""
        if not isinstance(batch, Mapping):
            raise WrongCall("Embedder takes batches of NumPy arrays: leave out batch_format, or say 'numpy'.")
        if self._column not in batch:
            raise WrongCall(f"There is no column {self._column}; there are: {', '.join(sorted(batch))}.")
        texts = np.asarray(batch[self._column]).tolist()
        done = await asyncio.wrap_future(self._client.embed(texts))
        more: dict[str, Any] = {self._output: done.vectors}
        if self._errors is not None:
            more[self._errors] = np.array([None] * len(texts), object)
            for at, problem in done.refused.items():
                more[self._errors][at] = f"{problem.message} ({problem.code})"
        elif done.refused:
            raise InputRefused(*min(done.refused.items()))
        return {**batch, **more}


@contextmanager
def nodes(
    gateway: str,
    invites: Sequence[str],
    *,
    num_cpus: float = 1,
    model: Sequence[str] = (),
    ready_within_s: float = NODE_READY_S,
    **ray_options: Any,
) -> Iterator[None]:
    """A node on the workers for each invite, while the block lasts: it dials out to the gateway and joins it.

    `gateway` is its URL without `/v1`, `invites` are tokens of `embedmesh nodes invite`, one a node, `model` those to
    serve instead of all. Workers need embedmesh, set up. `num_cpus` and `ray_options` are Ray's, for each node; its
    engine has as many threads. Raises RuntimeError with the end of a node's log where one does not join in time.
    """
    import ray

    place = {"num_cpus": num_cpus, "scheduling_strategy": "SPREAD", **ray_options}
    actor = ray.remote(**place)(RayNode)
    threads = max(1, int(num_cpus))
    begun = [actor.remote(gateway, invite, tuple(model), threads) for invite in invites]
    try:
        ray.get([node.joined.remote(ready_within_s) for node in begun], timeout=2 * ready_within_s)
        yield
    finally:
        ray.wait([node.stop.remote() for node in begun], num_returns=len(begun), timeout=2 * NODE_STOP_S)
        for node in begun:
            ray.kill(node)


class RayNode:
    """An actor that has a node beside it. The node ends when the actor does, however that ends."""

    def __init__(self, gateway: str, invite: str, model: Sequence[str], threads: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="embedmesh-node-")
        lifeline, self._held = os.pipe()  # the node ends when nobody holds its other end any more
        options = ["--gateway", gateway, "--data-dir", str(Path(self._folder) / "data"), "--threads", str(threads)]
        options += ["--lifeline-fd", str(lifeline), *(word for name in model for word in ("--model", name))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "embedmesh", "node", *options],
            pass_fds=(lifeline,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EMBEDMESH_JOIN": invite},  # other users of the machine see arguments
        )
        os.close(lifeline)
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._told = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)
            if JOINED in line:
                self._told.set()
        self._told.set()

    def joined(self, within_s: float) -> None:
        """Wait until it is a node of the gateway. Raises RuntimeError with the end of its log."""
        until = time.monotonic() + within_s
        self._told.wait(until - time.monotonic())
        if not any(JOINED in line for line in self._log):
            raise RuntimeError(f"the node did not join {within_s:.0f} s long:\n{''.join(self._log)}")

    def stop(self) -> None:
        """Let it answer what it has, then end it."""
        os.close(self._held)
        try:
            self._process.wait(NODE_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
