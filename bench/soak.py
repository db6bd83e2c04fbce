"""Does a node keep its memory, and its answers, over many texts? `python -m bench.soak [--texts N] [--json]`.

A real node over its socket, and several callers that send texts of every length in calls of every size; now and then
a caller hangs up in the middle. Memory of node and worker is sampled on the way. The bound is on what is resident.
Growth is the slope of a straight line through the second half of what is resident and anonymous, because pages of the
weights file come and go by tens of MB as the kernel likes. Each call has a text whose vector was taken at the start,
alone, and must come back the same. Writes `bench/results/soak.json`. Exit code 1 when a promise is broken.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from bench.engine.contenders import Server
from bench.rig.command import bench, model_folder, progress, wrong
from bench.rig.corpus import Name, corpus
from bench.rig.figures import slope
from bench.rig.http import Reply, Wire
from bench.rig.processes import EMBEDMESH
from embedmesh.engine.threads import threads_here

CALLERS = 6
SIZES = (1, 1, 1, 2, 8, 32, 64, 200)  # texts a call
CANCELLED = 0.05  # of the calls
HANG_UP_S = (0.0, 0.1)  # after asking: before, while and after its batch runs
KNOWN = 200  # texts whose vectors are taken at the start
POOL: dict[Name, int] = {"X": 3_000, "S": 600, "M": 300, "L": 100}  # distinct texts; every length from 5 to 256 tokens
SAMPLE_S = 0.5
SEED = 1

ERROR_MAX = 1e-6  # a text alone and in any batch, component by component
MB_MAX = 320.0
GROWTH_MB_MAX = 1.0  # for 10,000 texts


Sample = tuple[int, float, float]


class Figures(msgspec.Struct, frozen=True):
    """What was found. `samples` are (texts answered, resident MB, anonymous MB) of node and worker together."""

    texts: int
    calls: int
    cancelled: int
    compared: int
    seconds: float
    refused: dict[str, int]
    error_max: float
    end_mb: float
    growth_mb: float
    samples: list[Sample]

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        conditions: dict[str, object] = {
            f"{self.end_mb:.0f} MB at the end, above {MB_MAX:.0f}": self.end_mb > MB_MAX,
            f"grew by {self.growth_mb:.2f} MB for 10,000 texts": self.growth_mb > GROWTH_MB_MAX,
            f"vectors moved by {self.error_max:.1e}": not self.error_max <= ERROR_MAX,
            f"not answered: {self.refused}": bool(self.refused),
        }
        return wrong(conditions)


class NodeSoak:
    """What the callers share."""

    def __init__(self, node: Server, texts_max: int) -> None:
        """Takes the known vectors, one text a call."""
        self.node, self.texts_max = node, texts_max
        self.pool = [text for name, count in POOL.items() for text in corpus(name, count)]
        known = Random(SEED).sample(self.pool, KNOWN)
        with Wire(node.address) as wire:
            self.known = {text: node.ask(wire, node.request([text]))[1].vectors()[0] for text in known}
        self.lock = threading.Lock()
        self.texts = self.calls = self.cancelled = self.compared = 0
        self.error_max = 0.0
        self.refused: Counter[str] = Counter()

    @property
    def ended(self) -> bool:
        """Whether enough was answered, or nothing is any more."""
        return self.texts >= self.texts_max or self.refused.total() > CALLERS

    def call(self, dice: Random) -> None:
        """Request after request, each on a new or a kept connection, until it has ended."""
        while not self.ended:
            try:
                with Wire(self.node.address) as wire:
                    while not self.ended and self._ask(wire, dice):
                        pass
            except (OSError, EOFError) as error:
                with self.lock:
                    self.refused[type(error).__name__] += 1

    def _ask(self, wire: Wire, dice: Random) -> bool:
        """One call; False when it hung up."""
        size = dice.choice(SIZES)
        texts = [dice.choice(list(self.known)), *dice.choices(self.pool, k=size - 1)]
        dice.shuffle(texts)
        deadline = wire.send(self.node.request(texts))
        if dice.random() < CANCELLED:
            time.sleep(dice.uniform(*HANG_UP_S))
            with self.lock:
                self.cancelled += 1
            return False
        self._note(texts, wire.receive(deadline))
        return True

    def _note(self, texts: list[str], reply: Reply) -> None:
        with self.lock:
            if reply.status != 200:
                self.refused[reply.outcome] += 1
                return
            found = reply.vectors()
            if len(found) != len(texts):
                self.refused["another number of vectors"] += 1
                return
            pairs = [
                (vector, self.known[text]) for vector, text in zip(found, texts, strict=True) if text in self.known
            ]
            self.error_max = max([self.error_max, *(float(np.abs(ours - right).max()) for ours, right in pairs)])
            self.compared += len(pairs)
            self.texts += len(texts)
            self.calls += 1


def growth_mb(samples: Sequence[Sample]) -> float:
    """MB for 10,000 texts: the slope of the least-squares line through the second half of the texts."""
    return 10_000 * slope([(texts, mb) for texts, _, mb in samples if texts >= samples[-1][0] / 2])


def measure(texts: int = 100_000) -> Figures:
    """The whole run. Raises Broke when the node does not start."""
    model_folder()
    with tempfile.TemporaryDirectory(prefix="embedmesh-") as runs:
        path = Path(runs) / "node.sock"
        node = Server(
            "node", [*EMBEDMESH, "node", "--uds", str(path), "--data-dir", runs], path, Path(runs), threads_here()
        )
        try:
            return _soak(node, texts)
        finally:
            node.stop()


def _soak(node: Server, texts_max: int) -> Figures:
    soak = NodeSoak(node, texts_max)
    callers = [threading.Thread(target=soak.call, args=(Random(f"{SEED} {at}"),), daemon=True) for at in range(CALLERS)]
    samples = [(0, *node.memory_mb())]
    begun = time.monotonic()
    for caller in callers:
        caller.start()
    with progress() as bar:
        task = bar.add_task("texts", total=texts_max)
        while any(caller.is_alive() for caller in callers):  # each call has a deadline
            time.sleep(SAMPLE_S)
            samples.append((soak.texts, *node.memory_mb()))
            bar.update(task, completed=min(soak.texts, texts_max), description=f"texts, {samples[-1][1]:.0f} MB")
    return Figures(
        texts=soak.texts,
        calls=soak.calls,
        cancelled=soak.cancelled,
        compared=soak.compared,
        seconds=time.monotonic() - begun,
        refused=dict(soak.refused),
        error_max=soak.error_max,
        end_mb=samples[-1][1],
        growth_mb=growth_mb(samples),
        samples=samples,
    )


if __name__ == "__main__":
    bench(measure, file="soak.json", texts="to be answered in all")
