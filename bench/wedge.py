"""Break the engine in every way we know, under load: `python -m bench.wedge [--rounds N] [--json]`.

A real node serves the default model, of which one rare word's embedding is not a number. Callers ask without pause, and
its engine process is killed, stopped, starved of memory, or given that word in one batch with others' texts. What must
hold, whatever happens to the engine:

* no call is open longer than its deadline, and none that is innocent is refused or gets a wrong vector;
* /readyz stops saying 200 within 2 s of an engine that does not embed, and says it again within 5 s of the fault.

The last line is the verdict; the exit code is 0 when all of it held.
"""

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random

import msgspec
import numpy as np
from embedmesh.rules.forwarding import Part
from rich.console import Console
from rich.progress import track
from rich.table import Table

from embedmesh.engine.folder import digest, read_folder
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.gateway.nodes.pools import unix_pool
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model
from tests.data import find_model_folder

POISON = 6  # [unused5] in BERT's vocabulary: no text gives it
CALLERS = 4
TEXTS_A_CALL = (1, 2, 8, 32)
READY_AGAIN_S = 5.0
TRUTH_S = 2.0
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


class Rig:
    """The node, its engine's process, and callers that note what they see."""

    def __init__(self, process: subprocess.Popen[bytes], model: Model, uds: Path) -> None:
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
            if time.monotonic() > ends or self.process.poll() is not None:
                raise RuntimeError("the node did not become ready")
            await asyncio.sleep(0.05)
        self.right = await self.ask(list(range(len(self.texts))))

    async def ask(self, which: list[int]) -> np.ndarray:
        """The vectors of some of the texts, [len(which), width]."""
        reply = await self.embed([self.texts[at] for at in which])
        return np.frombuffer(reply.data, "<f4").reshape(len(which), self.model.width)

    async def ready(self) -> bool:
        """What /readyz says."""
        try:
            reply = await self.pool.exchange(lambda: b"GET /readyz HTTP/1.1\r\nHost: node\r\n\r\n", 10_000)
        except NodeFailure:
            return False
        return reply.status == 200

    async def embed(self, ids: list[list[int]]) -> EmbedVectors:
        """What the node says to these ids."""
        part = Part("n", tuple(range(len(ids))), 0, 0.1)
        return await self.link.embed(part, self.model, Counted(lengths=[0] * len(ids), ids=ids), "req_0")

    async def call_for_ever(self) -> None:
        """One caller: asks, checks, asks again."""
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
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.01)
        return int(found[0])


async def kill(rig: Rig) -> None:
    """kill -9."""
    os.kill(rig.engine(), signal.SIGKILL)


async def stop(rig: Rig) -> None:
    """SIGSTOP: it hangs for ever."""
    os.kill(rig.engine(), signal.SIGSTOP)


async def starve(rig: Rig) -> None:
    """No memory more than it has: the next kernel or batch that needs some cannot have it."""
    pid = rig.engine()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    lengths = [3 + 7 * n for n in range(35)]  # shapes that it may not have met
    fresh = [[2_000 + n] * n for n in lengths]
    await rig.embed(fresh)  # innocent too: it must be answered


async def poison(rig: Rig) -> None:
    """A text whose vector is not a number, among others."""
    try:
        await rig.embed([[POISON]])
    except NodeFailure:
        return
    raise RuntimeError("a vector that is not a number was delivered")


FAULTS: dict[str, Callable[[Rig], Awaitable[None]]] = {
    "kill -9": kill,
    "SIGSTOP": stop,
    "no memory": starve,
    "not a number": poison,
}


async def one_round(rig: Rig, fault: str) -> Round:
    """Break it once under load, and watch until it is well."""
    rig.calls = rig.failed = 0
    rig.longest_s = 0.0
    callers = [asyncio.create_task(rig.call_for_ever()) for _ in range(CALLERS)]
    await asyncio.sleep(SETTLE_S)
    begun = time.monotonic()
    breaking = asyncio.create_task(FAULTS[fault](rig))
    untrue_s, back_s = None, 0.0
    try:
        while time.monotonic() - begun < READY_AGAIN_S + TRUTH_S or not breaking.done():
            if not await rig.ready():
                untrue_s = untrue_s if untrue_s is not None else time.monotonic() - begun
                back_s = time.monotonic() - begun + 0.02
            if time.monotonic() - begun > START_S:
                break
            await asyncio.sleep(0.02)
        try:
            await asyncio.wait_for(breaking, START_S)
        except NodeFailure:
            rig.failed += 1
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return Round(fault, untrue_s, back_s, rig.longest_s, rig.calls, rig.failed)


def faulty(rounds: Sequence[Round]) -> list[str]:
    """What did not hold, in words."""
    said = []
    for one in rounds:
        if one.back_s > READY_AGAIN_S:
            said.append(f"{one.fault}: ready again only after {one.back_s:.1f} s")
        if one.longest_call_s > REQUEST_MIN_S:
            said.append(f"{one.fault}: a call was open for {one.longest_call_s:.1f} s")
        if one.failed:
            said.append(f"{one.fault}: {one.failed} of {one.calls} innocent calls failed")
        if one.fault == "SIGSTOP" and (one.untrue_s is None or one.untrue_s > TRUTH_S):
            said.append(f"{one.fault}: /readyz said yes for more than {TRUTH_S:.0f} s")
    return said


def show(rounds: Sequence[Round], console: Console) -> None:
    """A line a fault."""
    table = Table(
        "fault", "rounds", "/readyz says no after", "ready again: median", "max", "longest call", "calls", "failed"
    )
    for fault in FAULTS:
        of = [one for one in rounds if one.fault == fault]
        seen = [one.untrue_s for one in of if one.untrue_s is not None]
        backs = [one.back_s for one in of]
        table.add_row(
            fault,
            str(len(of)),
            f"{max(seen):.2f} s" if seen else "never seen",
            f"{statistics.median(backs):.2f} s",
            f"{max(backs):.2f} s",
            f"{max(one.longest_call_s for one in of):.2f} s",
            str(sum(one.calls for one in of)),
            str(sum(one.failed for one in of)),
        )
    console.print(table)


async def run(rounds: int, quiet: bool) -> list[Round]:
    """All faults, `rounds` times, in turn."""
    source = find_model_folder()
    if source is None:
        raise RuntimeError("the default model's files are not here; run `embedmesh setup` first")
    with tempfile.TemporaryDirectory(prefix="embedmesh-wedge-") as scratch:
        folder = poisoned_copy(source, Path(scratch) / "model")
        read = read_folder(folder)
        model = Model(
            id="poisoned",
            folder=str(folder),
            width=read.width,
            max_tokens=read.max_tokens,
            price=0,
            digest=digest(folder),
        )
        catalogue, uds = Path(scratch) / "models.toml", Path(scratch) / "node.sock"
        members = {"id": model.id, "folder": model.folder, "width": model.width, "max_tokens": model.max_tokens}
        members |= {"price": 0, "digest": model.digest}
        catalogue.write_text(
            "[[models]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in members.items())
        )
        command = [sys.executable, "-m", "embedmesh", "node", "--uds", str(uds), "--catalogue", str(catalogue)]
        with (Path(scratch) / "log").open("wb") as log:
            process = subprocess.Popen(command, stderr=log)
        try:
            rig = Rig(process, model, uds)
            await rig.start()
            order = [fault for _ in range(rounds) for fault in FAULTS]
            return [await one_round(rig, fault) for fault in track(order, "breaking the engine", disable=quiet)]
        finally:
            process.terminate()
            process.wait(START_S)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.wedge", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each fault is made (10 s each)")
    parser.add_argument("--json", action="store_true", dest="as_json")
    told = parser.parse_args(arguments)
    try:
        rounds = asyncio.run(run(told.rounds, told.as_json))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = faulty(rounds)
    if told.as_json:
        print(msgspec.json.encode({"rounds": rounds, "wrong": wrong}).decode())
    else:
        console = Console()
        show(rounds, console)
        for line in wrong:
            console.print(line)
        console.print("The engine was broken, and nobody waited or was told wrong." if not wrong else "Not all held.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
