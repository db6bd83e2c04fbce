"""How fast our reranker is, beside other people's: `python -m bench.rerank [--quick] [--json]`.

One query with 1 to 1,000 documents, short, long and mixed: at our engine in process, at a gateway with a node behind
it, and at sentence-transformers' CrossEncoder, FastEmbed's TextCrossEncoder and Infinity, on the same weights (the
default model's, under a head that is made up) and the same threads, in interleaved rounds. Every contender's logits are
checked first; our tier `fast`, whose logits differ a little, is shown beside them. At last the peak memory of each with
1,000 documents of 499 tokens. The peers are installed under `.bench/` at the first run; one that does not install, or
whose logits differ, is named and left out. Exit code 1 when a target is missed.
"""

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from bench.engine.__main__ import machine
from bench.engine.contenders import Broke, Contender
from bench.engine.figures import FAST
from bench.engine.measure import REST_S
from bench.engine.rounds import Rounds
from bench.rerank import figures as f
from bench.rerank.field import OURS, Rerankers
from bench.rerank.model import cross_encoder
from bench.rig.command import bench, check_names, model_folder, say, track
from bench.rig.corpus import Name, corpus
from bench.rig.http import Vectors
from bench.rig.install import NotInstalled
from bench.rig.processes import OtherWork, family_of, meanwhile, memory_mb_of
from embedmesh.engine.threads import threads_here

CHECKED = 100  # documents of each kind whose scores are compared
SAME = 1e-3  # logits that differ by more are of another computation
LOOK_S = 0.1  # between two looks at memory

Texts = Mapping[Name, Sequence[str]]


def measure(quick: bool = False, rounds: int = 5, only: list[str] | None = None) -> f.RerankFigures:
    """The whole run. Raises Broke when one of ours, or a contender in the middle of it, does not answer."""
    folder, threads = cross_encoder(model_folder()), threads_here()
    asks = (*f.FEW, *f.HUNDRED) if quick else (*f.FEW, *f.HUNDRED, *f.THOUSAND, f.LARGEST)
    texts = {kind: corpus(kind, max(ask.documents for ask in asks)) for kind in f.KINDS}
    taken, peak_mb = Rounds({}, rows={ask.words: [] for ask in asks}), {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as ending:
        runs = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-")))
        field = Rerankers(folder, threads, runs)
        check_names(only or (), list(field.starters))
        names = [name for name in field.starters if only is None or name in only]
        contenders, difference = _start(field, names, texts, ending, left_out)
        other_work = _run_rounds(taken, contenders, texts, rounds)
        if f.LARGEST in asks:
            found = {each.name: _peak(each, texts[f.LARGEST.kind]) for each in track(contenders, "memory")}
            peak_mb = {name: mb for name, (mb, _) in found.items()}
            taken.add(f.LARGEST.words, {name: seconds for name, (_, seconds) in found.items()})
    return f.RerankFigures(
        machine=machine(),
        threads=threads,
        other_work=other_work,
        versions={each.name: each.version for each in contenders},
        difference=difference,
        peak_mb=peak_mb,
        requests=f.rows_of(asks, taken, [each.name for each in contenders]),
        left_out=left_out,
        targets=f.targets_of([ask for ask in asks if ask in f.JUDGED], taken, difference, peak_mb),
    )


def _start(
    field: Rerankers, names: Sequence[str], texts: Texts, ending: contextlib.ExitStack, left_out: dict[str, str]
) -> tuple[list[Contender], dict[str, float]]:
    """Who takes part, warmed up and checked against the first, which is CrossEncoder; largest differences to it."""
    contenders: list[Contender] = []
    difference: dict[str, float] = {}
    right: Vectors | None = None
    for name in names:
        say(f"{name}: starting (a first run installs it)")
        try:
            contender = field.start(name)
            ending.callback(contender.stop)
            scores = np.concatenate([contender.vectors(texts[kind][:CHECKED]) for kind in f.KINDS])
            right = scores if right is None else right
            difference[name] = float(np.abs(scores - right).max())
            if name != FAST and not difference[name] <= SAME:
                raise Broke(f"its logits differ by {difference[name]:.3g}")
        except (NotInstalled, Broke) as why:
            if name in OURS:
                raise
            left_out[name] = str(why)
        else:
            contenders.append(contender)
    return contenders, difference


def _run_rounds(taken: Rounds, contenders: Sequence[Contender], texts: Texts, rounds: int) -> float:
    """All but the largest request, `rounds` times; the largest share of the cores that others had in one of them."""
    other_work = 0.0
    asks = [ask for ask in (*f.FEW, *f.HUNDRED, *f.THOUSAND) if ask.words in taken.rows]
    for number, ask in track([(number, ask) for number in range(rounds) for ask in asks], "rounds"):
        other = OtherWork()
        taken.add(ask.words, dict(_one_round(ask, contenders, texts[ask.kind], number)))
        other_work = max(other_work, other.share())
    return other_work


def _one_round(
    ask: f.Ask, contenders: Sequence[Contender], documents: Sequence[str], number: int
) -> Iterator[tuple[str, float]]:
    """Seconds of each, in turns; `number` decides who is first."""
    first = number % len(contenders)
    calls = [documents[at * ask.documents :][: ask.documents] for at in range(ask.calls)]
    for contender in (*contenders[first:], *contenders[:first]):
        time.sleep(REST_S)
        yield contender.name, statistics.median(contender.seconds(call) for call in calls)


def _peak(contender: Contender, documents: Sequence[str]) -> tuple[float, float]:
    """The most MB that are seen while it reranks, and its seconds."""
    seen = [0.0]

    def look(stop: threading.Event) -> None:
        while not stop.wait(LOOK_S):
            with suppress(OSError):  # one of its processes has just ended
                seen.append(memory_mb_of(family_of(contender.pid))[0])

    with meanwhile(look):
        seconds = contender.seconds(documents)
    return max(seen), seconds


if __name__ == "__main__":
    bench(
        measure,
        file="rerank.json",
        quick="no request of 1,000 documents, and no memory: to see that it runs",
        rounds="of all requests",
        only="contenders by name; the first one's scores are what the others' are compared with",
    )
