"""The interleaved run: in each round of a row every contender does it, one after the other, so that what else the
machine does meets all alike; who is first differs from round to round. Before the first round each does all of it once:
that warms it up and checks its vectors.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.engine.contenders import CALL_TEXTS, CALLS_AT_ONCE, Broke, Contender, Runner, Server
from bench.engine.figures import (
    CORPORA,
    EXACT,
    FAST,
    INT8,
    ONE,
    ContenderRow,
    Differences,
    NodeFigures,
    flops,
)
from bench.engine.rounds import Rounds
from bench.quality import parts_of
from bench.rig.command import run_async
from bench.rig.corpus import Name, corpus, token_counts
from bench.rig.figures import Spread, median_interval, percentile
from bench.rig.http import Vectors, Wire
from bench.rig.processes import meanwhile
from embedmesh.engine.folder import read_folder
from embedmesh.engine.plan import pad_length

TEXTS: dict[Name, int] = {"S": 512, "M": 128, "L": 32, "512": 16, "X": 256}
"""A second or two of work each. Of unequal lengths there are several batches of a peer (32 texts): fewer could not be
sorted by length, and padding would make the peer look slow. They are several calls of a node, too."""

TOKENS_MAX = {name: 512 if name == "512" else 256 for name in CORPORA}  # of a text
SINGLES = 20  # short texts, one by one, in each round
COSINE_MIN = 0.999  # below that a peer does not compute the same thing
REST_S = 0.1  # between two contenders: their threads spin for a moment when they have nothing to do
ALONE_TEXTS = 128  # of each corpus, embedded alone too: one in ten differs at all
WAY_WARM, WAY_ROUNDS = 30, 200  # requests to the engine's process and to the node, in turns
QUERIES = 120  # short ones beside a bulk job
QUERY_EVERY_S = 0.05
BATCH_L_TEXTS = 4  # of 256 tokens: a full batch of 1,024 without padding
BATCH_REPEATS = 15
STARTS = 5  # of a node


class Job:
    """What is to be embedded: texts by corpus, and tokens of each text."""

    def __init__(self, scale: float) -> None:
        """`scale` of the usual number of texts."""
        self.texts = {name: corpus(name, round(count * scale)) for name, count in TEXTS.items()}
        self.counts = {name: token_counts(texts) for name, texts in self.texts.items()}
        self.singles = self.texts["S"][:SINGLES]

    def of(self, contender: Contender) -> list[Name]:
        """The corpora whose texts its model takes."""
        return [name for name in CORPORA if TOKENS_MAX[name] <= contender.takes_tokens]


def warm_up(contender: Contender, job: Job) -> dict[str, Vectors]:
    """One pass, whose vectors are then checked."""
    contender.singles(job.singles)
    return {name: contender.vectors(job.texts[name]) for name in job.of(contender)}


def cosines_to(name: str, found: Mapping[str, Vectors], right: Mapping[str, Vectors]) -> tuple[float, float]:
    """Smallest and mean cosine to the vectors of exact.

    Raises Broke where they should be the same and are not; int8 is judged by `make bench-quality`.
    """
    cosines = np.concatenate([_cosine(found[corpus], right[corpus]) for corpus in found])
    least = float(cosines.min())
    if name != INT8 and not least >= COSINE_MIN:
        raise Broke(f"its vectors differ from ours (smallest cosine {least:.4f})")
    return least, float(cosines.mean())


def differences(exact: Contender, job: Job, ours: Mapping[str, Vectors], theirs: Mapping[str, Vectors]) -> Differences:
    """Of exact: to `theirs`, which are transformers' (none where it is left out), and alone to in a batch."""
    transformers = max((float(np.abs(ours[name] - theirs[name]).max()) for name in theirs), default=None)
    alone = 0.0
    for name in job.of(exact):
        for at, text in enumerate(job.texts[name][:ALONE_TEXTS]):
            alone = max(alone, float(np.abs(exact.vectors([text])[0] - ours[name][at]).max()))
    return Differences(transformers, alone)


def one_round(row: str, contenders: Sequence[Contender], job: Job, number: int) -> dict[str, float]:
    """Seconds of each contender in a row; for one text alone their median. `number` decides who is first."""
    taken = {}
    first = number % len(contenders)
    for contender in (*contenders[first:], *contenders[:first]):
        if row == ONE:
            time.sleep(REST_S)
            taken[contender.name] = statistics.median(contender.singles(job.singles))
        elif (name := next((each for each in job.of(contender) if each == row), None)) is not None:
            time.sleep(REST_S)
            taken[contender.name] = contender.seconds(job.texts[name])
    return taken


def row(
    contender: Contender,
    rounds: Rounds,
    job: Job,
    cosines: tuple[float, float],
    model: Path,
    peaks: Mapping[str, float | None],
) -> ContenderRow:
    """The figures of one contender, at the end of the run. `peaks` in GFLOP/s, by precision."""
    taken = {name: rounds.taken(name, contender.name) for name in CORPORA}
    tokens: dict[str, Spread] = {name: _rates(sum(job.counts[name]), taken[name]) for name in CORPORA if taken[name]}
    singles = rounds.taken(ONE, contender.name)
    peak = peaks.get({EXACT: "f32", FAST: "bf16"}.get(contender.name, ""))
    config = read_folder(model).config
    shares: dict[str, float] = {}
    if peak:
        rates = {
            name: flops(config, job.counts[name]) / statistics.median(taken[name]) for name in CORPORA if taken[name]
        }
        shares = {name: each / 1e9 / peak for name, each in rates.items()}
    p50_ms, p99_ms = 1000 * percentile(singles, 50), 1000 * percentile(singles, 99)
    memory_mb = contender.memory_mb()[0]
    return ContenderRow(
        contender.name, contender.version, tokens, shares, p50_ms, p99_ms, contender.start_s, memory_mb, cosines
    )


def node_figures(
    node: Server, exact: Runner, job: Job, model: Path, start_again: Callable[[], float], quick: bool
) -> NodeFigures:
    """What only a node has. `start_again` starts another and gives the seconds to its first vector."""
    share = 4 if quick else 1
    engine_ms, node_ms = run_async(_way(node, job, model, WAY_ROUNDS // share))
    added_ms = [longer - shorter for shorter, longer in zip(engine_ms, node_ms, strict=True)]
    low, high = median_interval(added_ms) or (min(added_ms), max(added_ms))
    batches = [exact.seconds(job.texts["L"][:BATCH_L_TEXTS]) for _ in range(BATCH_REPEATS)]
    query_ms = _query_beside_bulk(node, job, QUERIES // share)
    return NodeFigures(
        percentile(engine_ms, 50),
        percentile(node_ms, 50),
        Spread(statistics.median(added_ms), low, high),
        percentile(node_ms, 99),
        query_ms,
        1000 * statistics.median(batches),
        [start_again() for _ in range(STARTS // share + 1)],
    )


async def _way(node: Server, job: Job, model: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of one short text: at an engine's process of our own, without HTTP; and at the node over its socket.

    In turns, text by text, tokenising included. The node's client blocks the event loop, which has nothing else to do.
    """
    tokenizer, worker = parts_of(model)
    engine_ms, node_ms = [], []
    await worker.start()
    try:
        with Wire(node.address) as wire:
            for number in range(WAY_WARM + rounds):
                text = job.singles[number % len(job.singles)]
                request = node.request([text])
                begun = time.perf_counter()
                ids = tokenizer.with_specials(tokenizer.ids([text])[0])
                await worker.run([ids], 1, pad_length(len(ids)))
                engine_s = time.perf_counter() - begun
                node_s = node.ask(wire, request)[0]
                if number >= WAY_WARM:
                    engine_ms.append(1000 * engine_s)
                    node_ms.append(1000 * node_s)
    finally:
        await worker.stop()
    return engine_ms, node_ms


def _query_beside_bulk(node: Server, job: Job, queries: int) -> float:
    """p95, in ms, of one short text every QUERY_EVERY_S while a bulk client keeps CALLS_AT_ONCE calls in flight."""
    bulk = node.request((job.texts["M"] * CALL_TEXTS)[:CALL_TEXTS])

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


def _rates(count: int, seconds: Sequence[float]) -> Spread:
    return Spread.of([count / each for each in seconds])


def _cosine(ours: Vectors, theirs: Vectors) -> Vectors:
    """Row by row."""
    if ours.shape != theirs.shape:
        raise Broke(f"vectors of shape {ours.shape}, not {theirs.shape}")
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines: Vectors = (ours * theirs).sum(axis=1) / norms
    return cosines
