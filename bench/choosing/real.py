"""`python -m bench.choosing.real [--rounds N]`: two real nodes, one a core, on one large request; beside one alone.

The gateway and this client share the two cores with the nodes; where one node works alone, the other core is theirs.
"""

import argparse
import asyncio
import base64
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import track

from bench.choosing.load import MODEL, REPLY_BYTES_MAX
from bench.corpus import corpus
from bench.fault.rig import HOST, Node, Rig, rigged
from embedmesh.gateway.nodes.pools import tcp_pool
from embedmesh.rules.embeddings import EmbedReply

INPUTS = 2_048
ADDED_MIN = 1.7  # one node's time over two nodes'
SAME = 1e-5
JOIN_S = 30.0


@asynccontextmanager
async def pinned_node(rig: Rig, core: int) -> AsyncIterator[Node]:
    """A real node on one core, which has joined by dialling out."""
    token = (await rig.ask("POST", "/v1/admin/invites"))["token"]
    folder = rig.folder / f"core-{core}"
    command = ["-m", "embedmesh", "node", "--gateway", f"http://{HOST}:{rig.port}", "--join", token, "--threads", "1"]
    before = {one["node_id"] for one in (await rig.ask("GET", "/v1/admin/nodes"))["data"]}
    with folder.with_suffix(".log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            "--data-dir",
            str(folder),
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        begun = time.monotonic()
        while time.monotonic() - begun < JOIN_S:
            nodes = (await rig.ask("GET", "/v1/admin/nodes"))["data"]
            new = [one["node_id"] for one in nodes if one["node_id"] not in before and one["state"] == "ready"]
            if new:
                yield Node(process, new[0])
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"the node did not join: {folder.with_suffix('.log').read_text()[-2000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def measure(rounds: int, console: Console) -> tuple[list[float], list[float]]:
    """Seconds of one request with one node, and with both, in turns."""
    texts = corpus("X", INPUTS)
    body = msgspec.json.encode({"model": MODEL, "input": texts, "encoding_format": "base64"})
    decode = msgspec.json.Decoder(EmbedReply).decode
    one_s: list[float] = []
    two_s: list[float] = []
    first: np.ndarray | None = None
    with tempfile.TemporaryDirectory(prefix="embedmesh-spread-") as scratch:
        async with rigged(Path(scratch)) as rig, pinned_node(rig, 0), pinned_node(rig, 1) as second:
            pool = tcp_pool(HOST, rig.port)
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {rig.credentials.api_key}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            for number in track(range(-1, rounds), "measuring", console=console, transient=True):
                for times, action in ((one_s, "drain"), (two_s, "resume")):
                    await rig.act(second, action)
                    begun = time.perf_counter()
                    reply = await pool.exchange(lambda: head.encode() + body, REPLY_BYTES_MAX)
                    took = time.perf_counter() - begun
                    if reply.status != 200:
                        raise RuntimeError(f"{reply.status} {reply.body[:300]!r}")
                    vectors = np.array([_row(item.embedding) for item in decode(reply.body).data])
                    first = vectors if first is None else first
                    if np.abs(vectors - first).max() > SAME:
                        raise RuntimeError("two nodes give other vectors than one")
                    if number >= 0:  # the first round warms shapes up
                        times.append(took)
            pool.close()
    return one_s, two_s


def _row(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.choosing.real", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    console = Console()
    one_s, two_s = uvloop.run(measure(asked.rounds, console))
    ratio = statistics.median(one / two for one, two in zip(one_s, two_s, strict=True))
    console.print(f"{INPUTS} texts: one node {statistics.median(one_s):.2f} s, two {statistics.median(two_s):.2f} s")
    console.print(f"Two nodes are {ratio:.2f}x one (target {ADDED_MIN}x): {'met' if ratio >= ADDED_MIN else 'MISSED'}.")
    return 0 if ratio >= ADDED_MIN else 1


if __name__ == "__main__":
    sys.exit(main())
