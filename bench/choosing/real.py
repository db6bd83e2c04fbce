"""Two real nodes, one a core, on one large request; beside one alone: `python -m bench.choosing.real [--rounds N]`.

The gateway and this client share the two cores with the nodes; where one node works alone, the other core is theirs.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np

from bench.rig import fleet
from bench.rig.command import CannotRun, bench, model_folder, track
from bench.rig.corpus import corpus
from bench.rig.fleet import Fleet
from bench.rig.http import MODEL, AsyncClient, Vectors
from bench.rig.processes import EMBEDMESH, HOST, Process

INPUTS = 2_048
ADDED_MIN = 1.7  # one node's time over two nodes'
SAME = 1e-5
JOIN_S = 30.0


class Figures(msgspec.Struct, frozen=True):
    """Seconds of one request, by round: with one node, and with both."""

    one_s: list[float]
    two_s: list[float]

    @property
    def ratio(self) -> float:
        """The median of the rounds'."""
        return statistics.median(one / two for one, two in zip(self.one_s, self.two_s, strict=True))

    @property
    def broken(self) -> list[str]:
        """The target, if it was missed."""
        return [f"two nodes are {self.ratio:.2f}x one, not {ADDED_MIN}x"] if self.ratio < ADDED_MIN else []


@asynccontextmanager
async def pinned_node(nodes: Fleet, core: int) -> AsyncIterator[str]:
    """A real node on one core, which has joined by dialling out; its id."""
    token = (await nodes.ask("POST", "/v1/admin/invites"))["token"]
    folder = nodes.folder / f"core-{core}"
    command = [*EMBEDMESH, "node", "--gateway", f"http://{HOST}:{nodes.port}", "--join", token, "--threads", "1"]
    before = {one["node_id"] for one in (await nodes.ask("GET", "/v1/admin/nodes"))["data"]}
    with Process([*command, "--data-dir", str(folder)], folder.with_suffix(".log"), core=core) as process:
        begun = time.monotonic()
        while time.monotonic() - begun < JOIN_S:
            found = (await nodes.ask("GET", "/v1/admin/nodes"))["data"]
            if new := [one["node_id"] for one in found if one["node_id"] not in before and one["state"] == "ready"]:
                yield new[0]
                return
            await asyncio.sleep(0.1)
        raise CannotRun(f"the node did not join: {process.log_tail()}")


async def measure(rounds: int = 3) -> Figures:
    """One request with one node, and with both, in turns."""
    model_folder()
    body = msgspec.json.encode({"model": MODEL, "input": corpus("X", INPUTS), "encoding_format": "base64"})
    figures, first = Figures([], []), None
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-spread-"))
        nodes = await stack.enter_async_context(fleet.running(Path(folder)))
        _, second = [await stack.enter_async_context(pinned_node(nodes, core)) for core in (0, 1)]
        client = AsyncClient(nodes.port, nodes.credentials.api_key)
        stack.callback(client.close)
        for number in track(range(-1, rounds), "measuring"):
            for times, action in ((figures.one_s, "drain"), (figures.two_s, "resume")):
                await nodes.ask("POST", f"/v1/admin/nodes/{second}/{action}")
                begun = time.perf_counter()
                reply = await client.ask("POST", "/v1/embeddings", body)
                took = time.perf_counter() - begun
                if reply.status != 200:
                    raise CannotRun(f"{reply.status} {reply.body[:300]!r}")
                vectors: Vectors = reply.vectors()
                first = vectors if first is None else first
                if np.abs(vectors - first).max() > SAME:
                    raise RuntimeError("two nodes give other vectors than one")
                if number >= 0:  # the first round warms shapes up
                    times.append(took)
    return figures


if __name__ == "__main__":
    bench(measure)
