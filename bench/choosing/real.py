"""Two real nodes, one a core, on one large request; beside one alone: `python -m bench.choosing.real [--rounds N]`.

The gateway and this client share the two cores with the nodes; where one node works alone, the other core is theirs.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np

from bench.rig import fleet
from bench.rig.command import CannotRun, bench, model_folder, track
from bench.rig.corpus import corpus
from bench.rig.fleet import Fleet
from bench.rig.http import MODEL, AsyncClient, Reply, Vectors
from bench.rig.processes import EMBEDMESH, HOST, Process

INPUTS = 2_048
ADDED_MIN = 1.7  # one node's time over two nodes'
SAME = 1e-5
JOIN_S = 30.0


class Figures(msgspec.Struct, frozen=True):
    """Seconds of one request, by round: with one node, and with both. `shares`: of the tokens, by node."""

    one_s: list[float]
    two_s: list[float]
    shares: list[float]

    @property
    def ratio(self) -> float:
        """The median of the rounds'."""
        return statistics.median(one / two for one, two in zip(self.one_s, self.two_s, strict=True))

    @property
    def broken(self) -> list[str]:
        """The target, if it was missed."""
        return [f"two nodes are {self.ratio:.2f}x one, not {ADDED_MIN}x"] if self.ratio < ADDED_MIN else []


@asynccontextmanager
async def pinned_node(nodes: Fleet, core: int, options: Sequence[str] = ()) -> AsyncIterator[str]:
    """A real node on one core, which has joined by dialling out; its id."""
    token = (await nodes.ask("POST", "/v1/admin/invites"))["token"]
    folder = nodes.folder / f"core-{core}"
    command = [*EMBEDMESH, "node", "--gateway", f"http://{HOST}:{nodes.port}", "--join", token, "--threads", "1"]
    command += ["--data-dir", str(folder), *options]
    before = {one["node_id"] for one in (await nodes.ask("GET", "/v1/admin/nodes"))["data"]}
    with Process(command, folder.with_suffix(".log"), core=core) as process:
        begun = time.monotonic()
        while time.monotonic() - begun < JOIN_S:
            found = (await nodes.ask("GET", "/v1/admin/nodes"))["data"]
            if new := [one["node_id"] for one in found if one["node_id"] not in before and one["state"] == "ready"]:
                yield new[0]
                return
            await asyncio.sleep(0.1)
        raise CannotRun(f"the node did not join: {process.log_tail()}")


async def one_and_two(
    rounds: int, path: str, body: bytes, numbers: Callable[[Reply], Vectors], options: tuple[str, ...] = ()
) -> Figures:
    """One request with one node, and with both, in turns. `numbers` are those of a reply; `options` are everybody's."""
    one_s: list[float] = []
    two_s: list[float] = []
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-spread-"))
        nodes = await stack.enter_async_context(fleet.running(Path(folder), options))
        ids = [await stack.enter_async_context(pinned_node(nodes, core, options)) for core in (0, 1)]
        client = AsyncClient(nodes.port, nodes.credentials.api_key)
        stack.callback(client.close)
        first: Vectors | None = None
        done = np.zeros(len(ids))
        for number in track(range(-1, rounds), "measuring"):
            for times, action in ((one_s, "drain"), (two_s, "resume")):
                await nodes.ask("POST", f"/v1/admin/nodes/{ids[1]}/{action}")
                before, begun = await _tokens(nodes, ids), time.perf_counter()
                reply = await client.ask("POST", path, body)
                took = time.perf_counter() - begun
                if reply.status != 200:
                    raise CannotRun(f"{reply.status} {reply.body[:300]!r}")
                found = numbers(reply)
                first = found if first is None else first
                if np.abs(found - first).max() > SAME:
                    raise RuntimeError("two nodes give other numbers than one")
                if number >= 0:  # the first round warms shapes up
                    times.append(took)
                    done += (await _tokens(nodes, ids) - before) * (action == "resume")
    return Figures(one_s, two_s, (done / done.sum()).tolist())


async def _tokens(nodes: Fleet, ids: Sequence[str]) -> Vectors:
    """Of all answers of each node so far."""
    return np.array([(await nodes.ask("GET", f"/v1/admin/nodes/{one}"))["tokens"] for one in ids], np.float32)


async def measure(rounds: int = 3) -> Figures:
    """The whole run."""
    model_folder()
    body = msgspec.json.encode({"model": MODEL, "input": corpus("X", INPUTS), "encoding_format": "base64"})
    return await one_and_two(rounds, "/v1/embeddings", body, Reply.vectors)


if __name__ == "__main__":
    bench(measure)
