"""The interleaved run: every contender does every corpus in each round, one after the other, so that what else the
machine does meets all alike. Before the first round each does all of it once: that warms it up and checks its vectors.
"""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.engine.contenders import CALL_TEXTS, CALLS_AT_ONCE, Broke, Contender, Runner, Server
from bench.engine.figures import INT8, ContenderRow, NodeFigures
from bench.engine.runner import MATMUL, MATMULS
from bench.rig.corpus import Name, corpus, token_counts
from bench.rig.figures import Spread, percentile
from bench.rig.http import Vectors, Wire
from bench.rig.processes import meanwhile

TEXTS: dict[Name, int] = {"S": 512, "M": 96, "L": 48, "X": 256}  # a second of work or two, each
SINGLES = 60  # short texts, one by one, in each round
COSINE_MIN = 0.999  # below that a peer does not compute the same thing
REST_S = 0.1  # between two contenders: their threads spin for a moment when they have nothing to do
QUERY_EVERY_S = 0.05
BATCH_L_TEXTS = 4  # of 256 tokens: a full batch of 1,024 without padding
BATCH_REPEATS = 15
PEAK_REPEATS = 8  # products of 58 GFLOP in each round


class Job:
    """What is to be embedded: texts by corpus, and tokens of each text."""

    def __init__(self, scale: float) -> None:
        """`scale` of the usual number of texts."""
        self.texts = {name: corpus(name, round(count * scale)) for name, count in TEXTS.items()}
        self.counts = {name: token_counts(texts) for name, texts in self.texts.items()}
        self.singles = self.texts["S"][: round(SINGLES * scale)]


def warm_up(contender: Contender, job: Job) -> dict[str, Vectors]:
    """One pass, whose vectors are then checked."""
    contender.singles(job.singles)
    return {name: contender.vectors(texts) for name, texts in job.texts.items()}


def cosines_to(name: str, found: Mapping[str, Vectors], right: Mapping[str, Vectors]) -> tuple[float, float]:
    """Smallest and mean cosine to the vectors of exact.

    Raises Broke where they should be the same and are not; int8 is judged by `make bench-quality`.
    """
    cosines = np.concatenate([_cosine(found[corpus], right[corpus]) for corpus in right])
    least = float(cosines.min())
    if name != INT8 and not least >= COSINE_MIN:
        raise Broke(f"its vectors differ from ours (smallest cosine {least:.4f})")
    return least, float(cosines.mean())


class Peaks:
    """The machine's own limit: how many GFLOP/s a large matrix product reaches in the same OpenVINO, by precision.

    It is the best of the run: a peak is what was reached once, and so it counts against us.
    """

    def __init__(self, precisions: Sequence[str], threads: int, folder: Path) -> None:
        """`folder` is for logs."""
        self._runners = {
            name: Runner(f"peak {name}", Path(sys.executable), f"peak-{name}", Path(), folder, threads)
            for name in precisions
        }
        self.gflops = dict.fromkeys(precisions, 0.0)

    def measure(self) -> None:
        """Once more."""
        work = 2 * MATMUL**3 * MATMULS / 1e9
        for name, runner in self._runners.items():
            best = max(work / seconds for seconds in runner.singles([""] * PEAK_REPEATS))
            self.gflops[name] = max(self.gflops[name], best)

    def stop(self) -> None:
        """End the processes."""
        for runner in self._runners.values():
            runner.stop()


class Stopwatch:
    """Seconds of each contender and corpus, one a round, and of single texts."""

    def __init__(self, contenders: Sequence[Contender], job: Job) -> None:
        self.corpora: dict[str, dict[str, list[float]]] = {
            each.name: {name: [] for name in job.texts} for each in contenders
        }
        self.singles: dict[str, list[float]] = {each.name: [] for each in contenders}

    def round(self, contenders: Sequence[Contender], job: Job, step: Callable[[str], None]) -> None:
        """Each contender once."""
        for contender in contenders:
            step(contender.name)
            time.sleep(REST_S)
            for name, texts in job.texts.items():
                self.corpora[contender.name][name].append(contender.seconds(texts))
            self.singles[contender.name] += contender.singles(job.singles)


def row(contender: Contender, clock: Stopwatch, job: Job, cosines: tuple[float, float]) -> ContenderRow:
    """The figures of one contender, at the end of the run."""
    times, singles = clock.corpora[contender.name], clock.singles[contender.name]
    return ContenderRow(
        contender.name,
        contender.version,
        {name: _rates(len(texts), times[name]) for name, texts in job.texts.items()},
        {name: _rates(sum(counts), times[name]) for name, counts in job.counts.items()},
        1000 * percentile(singles, 50),
        1000 * percentile(singles, 99),
        contender.start_s,
        contender.memory_mb()[0],
        cosines,
    )


def query_beside_bulk(node: Server, job: Job, queries: int) -> float:
    """p95, in ms, of one short text every QUERY_EVERY_S while a bulk client keeps CALLS_AT_ONCE calls in flight."""
    bulk = node.request((job.texts["M"] * 2)[:CALL_TEXTS])

    def work(stop: threading.Event) -> None:
        with Wire(node.address) as wire:
            while not stop.is_set():
                node.ask(wire, bulk)

    times = []
    with meanwhile(*[work] * CALLS_AT_ONCE), Wire(node.address) as wire:
        for text in (job.texts["S"] * queries)[:queries]:
            time.sleep(QUERY_EVERY_S)
            times.append(node.ask(wire, node.request([text]))[0])
    return 1000 * percentile(times, 95)


def node_figures(
    node: Server, exact: Runner, job: Job, start_again: Callable[[], float], queries: int, starts: int
) -> NodeFigures:
    """What only a node has. `start_again` starts another and gives the seconds to its first vector."""
    batches = [exact.seconds(job.texts["L"][:BATCH_L_TEXTS]) for _ in range(BATCH_REPEATS)]
    query_ms = query_beside_bulk(node, job, queries)
    return NodeFigures(query_ms, 1000 * statistics.median(batches), [start_again() for _ in range(starts)])


def _rates(count: int, seconds: Sequence[float]) -> Spread:
    return Spread.of([count / each for each in seconds])


def _cosine(ours: Vectors, theirs: Vectors) -> Vectors:
    """ContenderRow by row."""
    if ours.shape != theirs.shape:
        raise Broke(f"vectors of shape {ours.shape}, not {theirs.shape}")
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines: Vectors = (ours * theirs).sum(axis=1) / norms
    return cosines
