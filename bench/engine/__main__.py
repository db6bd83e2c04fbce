"""How fast the engine is, beside other people's: `python -m bench.engine [--quick] [--add] [--json]`.

Throughput on five corpora, one short text alone, start, memory and the share of what the cores' registers do at most,
of our tiers in process and of a node over its socket; against sentence-transformers (as it comes, and with its fast
path forced), FastEmbed, onnxruntime and Infinity, all on the same weights and the same threads, in interleaved rounds.
Rounds go on until the ratios are settled (see rounds.py) or the minutes are over; `--add` goes on where a run ended.
The peers are installed under `.bench/` at the first run; one that does not install, or whose vectors differ, is named
and left out. Writes `bench/results/engine.json` and `engine.svg`. Exit code 1 when a target is missed.
"""

import contextlib
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.engine import figures as f
from bench.engine.contenders import Broke, Contender, Runner, Server
from bench.engine.field import Field
from bench.engine.large import measure_large
from bench.engine.measure import Job, cosines_to, differences, node_figures, one_round, row, warm_up
from bench.engine.models import has_int8, takes_512
from bench.engine.peak import Peaks
from bench.engine.rounds import Rounds, engine_digest, saved_rounds
from bench.engine.show import plot, show
from bench.engine.targets import targets
from bench.rig.command import RESULTS, bench, check_names, model_folder, progress, save
from bench.rig.http import Vectors
from bench.rig.install import NotInstalled
from bench.rig.processes import OtherWork
from embedmesh.engine.precision import tiers_here
from embedmesh.engine.threads import threads_here
from embedmesh.process import python_in_words

CPU_INFO = Path("/proc/cpuinfo")
QUICK_SCALE = 0.25  # of the texts
QUICK_MINUTES = 1.0  # of rounds
ROUNDS_FILE = RESULTS / "engine-rounds.json"

Started = tuple[list[Contender], dict[str, dict[str, Vectors]], dict[str, tuple[float, float]]]


def measure(
    quick: bool = False,
    minutes: float = 20.0,
    add: bool = False,
    only: list[str] | None = None,
    large: Path | None = None,
) -> f.Figures:
    """The whole run. Raises Broke when the engine itself, or a contender in the middle of it, does not answer."""
    folder, threads, flags = model_folder(), threads_here(), cpu_flags()
    model = takes_512(folder)
    made_by = {"CPU": machine(), "kind of CPU": kind_of(flags), "threads": str(threads), "engine": engine_digest()}
    rounds = saved_rounds(ROUNDS_FILE, made_by) if add else Rounds(made_by)
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as ending:
        runs = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-")))
        int8_model = has_int8(model) if f.INT8 in tiers_here() and _wanted(f.INT8, only) else None
        field = Field(model, int8_model, threads, runs)
        check_names(only or (), list(field.starters))
        names = [name for name in field.starters if name == f.EXACT or _wanted(name, only)]
        bar = ending.enter_context(progress())
        task = bar.add_task("corpora", total=None)

        def step(words: str) -> None:
            bar.update(task, description=words, advance=1)

        job = Job(QUICK_SCALE if quick else 1.0)
        contenders, vectors, cosines = _start(field, names, job, step, ending, left_out)
        peaks = _peaks(flags, threads, left_out)
        until = time.monotonic() + 60 * (QUICK_MINUTES if quick else minutes)
        _run_rounds(rounds, contenders, job, until, peaks, step)
        rounds.save(ROUNDS_FILE)
        by_precision = {name: peaks.gflops(name) for name in ("f32", "bf16")} if peaks else {}
        rows = [row(each, rounds, job, cosines[each.name], model, by_precision) for each in contenders]
        by_name = {each.name: each for each in contenders}
        exact, node, at_node = by_name[f.EXACT], by_name.get(f.NODE), None
        if isinstance(node, Server) and isinstance(exact, Runner):
            step("one text on its way, a query beside a bulk job, starts of a node")
            at_node = node_figures(node, exact, job, folder, field.start_node_again, quick)
        differ = differences(exact, job, vectors[f.EXACT], vectors.get(f.ST, {}))
        for each in contenders:
            each.stop()  # what follows needs the memory
        at_large = measure_large(large, field, quick, step, left_out) if large is not None else None
    ratios = [ratio for name in f.ROWS for ratio in rounds.ratios(name)]
    kind = kind_of(flags)
    figures = f.Figures(
        machine=machine(),
        kind=kind,
        threads=threads,
        tokens={name: sum(counts) for name, counts in job.counts.items()},
        peaks=peaks.found if peaks else {},
        rows=rows,
        ratios=ratios,
        disturbed_rounds=rounds.disturbed,
        node=at_node,
        differences=differ,
        large=at_large,
        left_out=left_out,
        targets=targets(kind, ratios, rows, at_node, differ, at_large),
    )
    save("engine.svg", plot(figures, f.OURS))
    return figures


def cpu_flags() -> frozenset[str]:
    """The CPU's flags as Linux lists them; none elsewhere."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())


def kind_of(flags: frozenset[str]) -> f.Kind:
    """Whose targets hold."""
    return "AVX-512" if "avx512f" in flags else "AVX2" if {"avx2", "fma"} <= flags else "other"


def _wanted(name: str, only: list[str] | None) -> bool:
    return only is None or name in only


def _start(
    field: Field,
    names: list[str],
    job: Job,
    step: Callable[[str], None],
    ending: contextlib.ExitStack,
    left_out: dict[str, str],
) -> Started:
    """Who takes part, warmed up and checked against exact, which is the first; their vectors, and cosines to it."""
    contenders: list[Contender] = []
    vectors: dict[str, dict[str, Vectors]] = {}
    cosines: dict[str, tuple[float, float]] = {}
    for name in names:
        step(f"{name}: starting (a first run installs it)")
        try:
            contender = field.starters[name]()
            ending.callback(contender.stop)
            step(f"{name}: warming up")
            found = warm_up(contender, job)
            cosines[name] = cosines_to(name, found, vectors.get(f.EXACT, found))
        except (NotInstalled, Broke) as why:
            if not contenders:
                raise Broke(f"the engine itself did not start: {why}") from None
            left_out[name] = str(why)
        else:
            contenders.append(contender)
            vectors[name] = found
    return contenders, vectors, cosines


def _peaks(flags: frozenset[str], threads: int, left_out: dict[str, str]) -> Peaks | None:
    try:
        return Peaks(flags, threads)
    except NotInstalled as why:
        left_out["the peak of the cores"] = str(why)
        return None


def _run_rounds(
    rounds: Rounds,
    contenders: list[Contender],
    job: Job,
    until: float,
    peaks: Peaks | None,
    step: Callable[[str], None],
) -> None:
    """Rounds of rows that are not done, those with the fewest first, until all are or the time is over.

    A round begins only where the row's longest so far would end in time.
    """
    tried, longest_s = dict.fromkeys(f.ROWS, 0), dict.fromkeys(f.ROWS, 0.0)
    while left := [row for row in f.ROWS if not rounds.is_done(row) and time.monotonic() + longest_s[row] < until]:
        name = min(left, key=lambda row: len(rounds.rows[row]) + tried[row])
        if peaks is not None and name == f.ROWS[0]:
            peaks.measure()
        step(f"round {len(rounds.rows[name]) + 1} of {f.IN_WORDS[name]}")
        begun, other = time.monotonic(), OtherWork()
        rounds.add(name, one_round(name, contenders, job, len(rounds.rows[name])), other.share())
        tried[name] += 1
        longest_s[name] = max(longest_s[name], time.monotonic() - begun)
    if peaks is not None:
        peaks.measure()


def machine() -> str:
    """The CPU and this Python, in words."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {python_in_words()}"


if __name__ == "__main__":
    bench(
        measure,
        show=show,
        file="engine.json",
        width=150,
        quick="fewer rounds and texts, to see that it runs: peers cannot sort so few, and look slow",
        minutes="of rounds, at most",
        add="to the rounds of the last run, which was of this machine and this engine",
        only="contenders by name, besides exact; the others' targets are then not measured",
        large="a folder of a large model, measured besides",
    )
