"""How fast the engine is, beside other people's: `python -m bench.engine [--quick] [--json]`.

Throughput on four corpora, one short text at a time, start, memory, and the share of the machine's arithmetic peak, of
our tiers in process and of a node over its socket; against sentence-transformers (as it is, and with MKL made to use
AVX-512), FastEmbed and Infinity, all on the same weights, the same threads and in the same interleaved run. The peers
are installed under `.bench/` at the first run; one that does not install, or whose vectors differ, is named and left
out. Writes `bench/results/engine.json` and `engine.svg`. Exit code 1 when a target is missed by more than GATE.
"""

import argparse
import contextlib
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.engine import figures as f
from bench.engine.contenders import Broke, Contender, Runner, Server, free_port
from bench.engine.figures import Figures
from bench.engine.flops import flops
from bench.engine.install import CHECKOUT, HOME, NotInstalled, build_shim, install, onnx_folder, python_of
from bench.engine.measure import Clock, Job, compare, node_figures, row, warm_up
from bench.engine.peak import Peaks
from bench.engine.plot import plot
from bench.engine.show import show
from bench.live import MODEL
from bench.quality import with_int8
from embedmesh.engine.folder import read_folder
from embedmesh.engine.precision import tiers_here
from embedmesh.engine.served import usable_cores
from tests.data import find_model_folder

RESULTS = CHECKOUT / "bench" / "results"
ROUNDS, QUICK_ROUNDS = 5, 2
QUICK_SCALE = 0.25  # of the texts
ROUNDS_S = 330.0  # no round begins that would end later; with starts and the node's figures, a run takes 8 minutes
QUERIES, QUICK_QUERIES = 120, 40  # short ones beside a bulk job
STARTS, QUICK_STARTS = 5, 2  # of a node
OURS = (f.EXACT, f.FAST, f.INT8, f.NODE)


class Field:
    """The contenders, started one by one; who cannot take part is in `left_out` with the reason."""

    def __init__(self, folder: Path, int8_folder: Path, threads: int, runs: Path) -> None:
        """`int8_folder` has an `int8.json`, if this CPU can use it. `runs` is for sockets; a folder of a short name."""
        self._folder, self._threads, self._runs = folder, threads, runs
        self.starters: dict[str, Callable[[], Contender]] = {
            f.EXACT: lambda: self._ours(f.EXACT, folder),
            f.FAST: lambda: self._ours(f.FAST, folder),
            f.INT8: lambda: self._ours(f.INT8, int8_folder),
            f.NODE: self.start_node,
            f.ST: lambda: self._sentence_transformers(f.ST, {}),
            f.ST_TUNED: lambda: self._sentence_transformers(f.ST_TUNED, {"LD_PRELOAD": str(build_shim())}),
            f.FASTEMBED: self._fastembed,
            f.INFINITY: self._infinity,
        }
        self.left_out: dict[str, str] = {}

    def start_node(self) -> Server:
        """A node of our own, with the default catalogue, on a new socket."""
        path = self._runs / f"{time.monotonic_ns()}.sock"
        command = [sys.executable, "-m", "embedmesh", "node", "--uds", str(path), "--threads", str(self._threads)]
        return Server(f.NODE, "", command, path, "/v1/embeddings", MODEL, self._threads)

    def start_node_again(self) -> float:
        """Seconds from a process to its first vector."""
        node = self.start_node()
        node.stop()
        return node.start_s

    def _ours(self, tier: str, folder: Path) -> Runner:
        return Runner(tier, Path(sys.executable), tier, folder, self._threads)

    def _sentence_transformers(self, name: str, environ: dict[str, str]) -> Runner:
        install("sentence-transformers")
        python = python_of("sentence-transformers")
        return Runner(name, python, "sentence-transformers", self._folder, self._threads, environ)

    def _fastembed(self) -> Runner:
        install("sentence-transformers")  # its torch exports the ONNX form
        install("fastembed")
        return Runner(f.FASTEMBED, python_of("fastembed"), "fastembed", onnx_folder(self._folder), self._threads)

    def _infinity(self) -> Server:
        install("infinity")
        port = free_port()
        options = "--engine torch --device cpu --no-bettertransformer --no-model-warmup --host 127.0.0.1"
        command = [str(python_of("infinity").with_name("infinity_emb")), "v2", "--model-id", str(self._folder)]
        command += ["--served-model-name", MODEL, "--port", str(port), *options.split()]
        return Server(f.INFINITY, "", command, ("127.0.0.1", port), "/embeddings", MODEL, self._threads)


def measure(folder: Path, threads: int, quick: bool, console: Console) -> Figures:
    """The whole run. Raises Broke when the engine itself, or a contender in the middle of it, does not answer."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with contextlib.ExitStack() as ending:
        runs = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-")))
        int8_folder = ending.enter_context(with_int8(folder)) if f.INT8 in tiers_here() else folder
        field = Field(folder, int8_folder, threads, runs)
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        progress = ending.enter_context(Progress(*columns, console=console))
        task = progress.add_task("corpora", total=len(field.starters) * (rounds + 2))

        def step(words: str) -> None:
            progress.update(task, description=words, advance=1)
            if not console.is_terminal:
                console.print(words)

        job = Job(QUICK_SCALE if quick else 1.0)
        contenders, cosines = _start(field, job, step, ending)
        peaks = Peaks(["f32", *(["bf16"] if f.FAST in cosines else [])], threads)
        ending.callback(peaks.stop)
        clock, done, longest_s = Clock(contenders, job), 0, 0.0
        ends = time.monotonic() + ROUNDS_S
        for _ in range(rounds):
            if done and time.monotonic() + longest_s > ends:
                break
            begun = time.monotonic()
            peaks.measure()
            clock.round(contenders, job, step)
            done, longest_s = done + 1, max(longest_s, time.monotonic() - begun)
        rows = [row(each, clock, job, cosines[each.name]) for each in contenders]
        by_name = {each.name: each for each in contenders}
        exact, node, at_node = by_name[f.EXACT], by_name.get(f.NODE), None
        if isinstance(node, Server) and isinstance(exact, Runner):
            step("a query beside a bulk job; starts of a node")
            queries, starts = (QUICK_QUERIES, QUICK_STARTS) if quick else (QUERIES, STARTS)
            at_node = node_figures(node, exact, job, field.start_node_again, queries, starts)
        m_flops = flops(read_folder(folder).config, job.counts["M"])
        return Figures(
            machine=_machine(),
            threads=threads,
            rounds=done,
            texts={name: len(texts) for name, texts in job.texts.items()},
            tokens={name: sum(counts) for name, counts in job.counts.items()},
            peaks_gflops=peaks.gflops,
            rows=rows,
            node=at_node,
            left_out=field.left_out,
            targets=f.targets(clock.corpora, rows, at_node, m_flops, peaks.gflops),
        )


def _start(
    field: Field, job: Job, step: Callable[[str], None], ending: contextlib.ExitStack
) -> tuple[list[Contender], dict[str, tuple[float, float]]]:
    """Who takes part, warmed up and checked against exact, which is the first; and their cosines to it."""
    contenders: list[Contender] = []
    cosines: dict[str, tuple[float, float]] = {}
    right = None
    for name, start in field.starters.items():
        step(f"{name}: starting (a first run installs it)")
        try:
            contender = start()
            ending.callback(contender.stop)
            step(f"{name}: warming up")
            found = warm_up(contender, job)
            right = right or found
            cosines[name] = compare(name, found, right)
        except (NotInstalled, Broke) as why:
            if right is None:
                raise Broke(f"the engine itself did not start: {why}") from None
            field.left_out[name] = str(why)
        else:
            contenders.append(contender)
    return contenders, cosines


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and texts: two minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    asked: Any = parser.parse_args(arguments)
    folder = find_model_folder()
    if folder is None:
        print("the default model's files are not here; run `embedmesh setup` first", file=sys.stderr)
        return 1
    HOME.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no contender is left behind
    try:
        found = measure(folder, usable_cores(), asked.quick, Console(stderr=True))
    except Broke as broke:
        print(f"bench: {broke}", file=sys.stderr)
        return 1
    RESULTS.mkdir(exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(found), indent=1)
    (RESULTS / "engine.json").write_bytes(encoded)
    (RESULTS / "engine.svg").write_text(plot(found, OURS), encoding="utf-8")
    if asked.json:
        print(encoded.decode())
    else:
        show(found, Console())
    return 1 if found.missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
