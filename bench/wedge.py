"""Break the engine in every way we know, under load: `python -m bench.wedge [--rounds N] [--json]`.

A real node serves the default model, of which one rare word's embedding is not a number. Callers send requests without
pause, and its engine process is killed, stopped, starved of memory, or given that word in one batch with others' texts.
What must hold, whatever happens to the engine:

* no call is open longer than its deadline, and no innocent call is refused or gets a wrong vector;
* /readyz stops saying 200 within 2 s of an engine that does not embed, and says it again within 5 s of the fault.

The last line is the verdict; the exit code is 0 when all of it held.
"""

import asyncio
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from bench.rig.command import CannotRun, bench, model_folder, track
from bench.rig.processes import EMBEDMESH, Process, children_of
from embedmesh.engine.folder import digest, read_folder
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.forwarding import Part
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model
from embedmesh.upstream.pools import unix_pool

POISON = 6  # [unused5] in BERT's vocabulary: no text gives it
CALLERS = 4
TEXTS_A_CALL = (1, 2, 8, 32)
READY_AGAIN_S = 5.0
TRUTH_S = 2.0
LOOK_S = 0.02
START_S = 30.0
SETTLE_S = 1.0
SAME = 1e-5  # between two batches with other neighbours
SEED = 20_261_123


class Round(msgspec.Struct, frozen=True):
    """One fault. Seconds; None where the engine was ready again before anybody could see that it was not."""

    fault: str
    untrue_s: float | None  # from the fault until /readyz said no
    back_s: float  # from the fault until /readyz said yes for good
    longest_call_s: float
    calls: int
    failed: int  # innocent calls that got no vectors, or wrong ones


def poisoned_copy(source: Path, target: Path) -> Path:
    """The model's folder with one embedding that is not a number."""
    shutil.copytree(source, target, symlinks=False)
    weights = target / "model.safetensors"
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    entry = header["embeddings.word_embeddings.weight"]
    width = entry["shape"][1] * 4
    row = start + entry["data_offsets"][0] + POISON * width
    data[row : row + width] = np.full(width // 4, np.nan, "<f4").tobytes()
    weights.write_bytes(data)
    return target


class Wedged:
    """The node, its engine's process, and callers that note what they see."""

    def __init__(self, process: Process, model: Model, uds: Path) -> None:
        self.process = process
        self.model = model
        self.pool = unix_pool(str(uds))
        self.link = OwnLink(self.pool, SystemClock())
        self.dice = Random(SEED)
        self.texts = [
            [1_000 + self.dice.randrange(20_000) for _ in range(self.dice.choice((6, 30, 90)))] for _ in range(64)
        ]
        self.right: np.ndarray = np.zeros((0, 0), np.float32)
        self.calls = self.failed = 0
        self.longest_s = 0.0

    async def start(self) -> None:
        """Wait until it is ready, and learn what each text's vector is."""
        ends = time.monotonic() + START_S
        while not await self.ready():
            if time.monotonic() > ends or not self.process.lives:
                raise CannotRun(f"the node did not become ready: {self.process.log_tail()}")
            await asyncio.sleep(0.05)
        self.right = await self.ask(list(range(len(self.texts))))

    async def ask(self, which: list[int]) -> np.ndarray:
        """The node's vectors of some of the texts, [len(which), width]."""
        reply = await self.embed([self.texts[at] for at in which])
        return np.frombuffer(reply.data, "<f4").reshape(len(which), self.model.width)

    async def ready(self) -> bool:
        """Whether /readyz says 200."""
        try:
            reply = await self.pool.exchange(lambda: b"GET /readyz HTTP/1.1\r\nHost: node\r\n\r\n", 10_000)
        except NodeFailure:
            return False
        return reply.status == 200

    async def embed(self, ids: list[list[int]]) -> EmbedVectors:
        """The node's answer to these ids."""
        part = Part("n", tuple(range(len(ids))), 0, 0.1)
        return await self.link.embed(part, self.model, Counted(lengths=[0] * len(ids), ids=ids), "req_0")

    async def call_for_ever(self) -> None:
        """One caller: sends a request, checks the reply, and again."""
        while True:
            which = self.dice.sample(range(len(self.texts)), self.dice.choice(TEXTS_A_CALL))
            begun = time.monotonic()
            self.calls += 1
            try:
                got = await self.ask(which)
            except NodeFailure:
                self.failed += 1
            else:
                self.failed += bool(np.abs(got - self.right[which]).max() > SAME)
            self.longest_s = max(self.longest_s, time.monotonic() - begun)

    def engine(self) -> int:
        """The engine's process id; waits for it while it is being replaced."""
        while not (found := children_of(self.process.pid)):
            time.sleep(LOOK_S)
        return found[0]


async def kill(node: Wedged) -> None:
    """kill -9."""
    os.kill(node.engine(), signal.SIGKILL)


async def stop(node: Wedged) -> None:
    """SIGSTOP: it hangs for ever."""
    os.kill(node.engine(), signal.SIGSTOP)


async def starve(node: Wedged) -> None:
    """No more memory than it has: the next kernel or batch that needs some cannot have it."""
    pid = node.engine()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    lengths = [3 + 7 * n for n in range(35)]  # shapes that it may not have met
    fresh = [[2_000 + n] * n for n in lengths]
    await node.embed(fresh)  # innocent too: it must be answered


async def poison(node: Wedged) -> None:
    """A text whose vector is not a number, among others."""
    with suppress(NodeFailure):
        await node.embed([[POISON]])
        raise RuntimeError("a vector that is not a number was delivered")


FAULTS: dict[str, Callable[[Wedged], Coroutine[Any, Any, None]]] = {
    "kill -9": kill,
    "SIGSTOP": stop,
    "no memory": starve,
    "not a number": poison,
}


async def one_round(node: Wedged, fault: str) -> Round:
    """Break it once under load, and watch until it is well."""
    node.calls = node.failed = 0
    node.longest_s = 0.0
    callers = [asyncio.create_task(node.call_for_ever()) for _ in range(CALLERS)]
    await asyncio.sleep(SETTLE_S)
    begun = time.monotonic()
    breaking = asyncio.create_task(FAULTS[fault](node))
    untrue_s: float | None = None
    back_s = 0.0
    try:
        while time.monotonic() - begun < READY_AGAIN_S + TRUTH_S or not breaking.done():
            if not await node.ready():
                untrue_s = untrue_s if untrue_s is not None else time.monotonic() - begun
                back_s = time.monotonic() - begun + LOOK_S
            if time.monotonic() - begun > START_S:
                break
            await asyncio.sleep(LOOK_S)
        try:
            await asyncio.wait_for(breaking, START_S)
        except NodeFailure:
            node.failed += 1
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return Round(fault, untrue_s, back_s, node.longest_s, node.calls, node.failed)


class Figures(msgspec.Struct, frozen=True):
    """All rounds."""

    rounds: list[Round]

    @property
    def broken(self) -> list[str]:
        """What did not hold, in words."""
        missed = []
        for one in self.rounds:
            if one.back_s > READY_AGAIN_S:
                missed.append(f"{one.fault}: ready again only after {one.back_s:.1f} s")
            if one.longest_call_s > REQUEST_MIN_S:
                missed.append(f"{one.fault}: a call was open for {one.longest_call_s:.1f} s")
            if one.failed:
                missed.append(f"{one.fault}: {one.failed} of {one.calls} innocent calls failed")
            if one.fault == "SIGSTOP" and (one.untrue_s is None or one.untrue_s > TRUTH_S):
                missed.append(f"{one.fault}: /readyz said yes for more than {TRUTH_S:.0f} s")
        return missed


def catalogue(model: Model, path: Path) -> None:
    """Write a catalogue that has this model."""
    fields = {name: getattr(model, name) for name in ("id", "folder", "width", "max_tokens", "price", "digest")}
    path.write_text("[[models]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items()))


async def measure(rounds: int = 5) -> Figures:
    """All faults, `rounds` times, in turn."""
    source = model_folder()
    with tempfile.TemporaryDirectory(prefix="embedmesh-wedge-") as name:
        scratch = Path(name)
        folder = poisoned_copy(source, scratch / "model")
        read = read_folder(folder)
        model = Model(
            id="poisoned",
            folder=str(folder),
            width=read.width,
            max_tokens=read.max_tokens,
            price=0,
            digest=digest(folder),
        )
        catalogue(model, scratch / "models.toml")
        uds = scratch / "node.sock"
        where = ["--uds", str(uds), "--data-dir", str(scratch)]
        command = [*EMBEDMESH, "node", *where, "--catalogue", str(scratch / "models.toml")]
        with Process(command, scratch / "log") as process:
            node = Wedged(process, model, uds)
            await node.start()
            order = [fault for _ in range(rounds) for fault in FAULTS]
            return Figures([await one_round(node, fault) for fault in track(order, "breaking the engine")])


if __name__ == "__main__":
    bench(measure, rounds="of each fault (10 s each)")
