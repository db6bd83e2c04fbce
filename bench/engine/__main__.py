"""How fast the engine is, beside other people's: `python -m bench.engine [--quick] [--json]`.

Throughput on four corpora, one short text at a time, start, memory, and the share of the machine's arithmetic peak, of
our tiers in process and of a node over its socket; against sentence-transformers (as it is, and with MKL made to use
AVX-512), FastEmbed and Infinity, all on the same weights, the same threads and in the same interleaved run. The peers
are installed under `.bench/` at the first run; one that does not install, or whose vectors differ, is named and left
out. Writes `bench/results/engine.json` and `engine.svg`. Exit code 1 when a target is missed by more than GATE.
"""

import contextlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.engine import figures as f
from bench.engine.contenders import Broke, Contender, Runner, Server
from bench.engine.figures import Figures
from bench.engine.measure import Job, Peaks, Stopwatch, cosines_to, node_figures, row, warm_up
from bench.engine.show import plot, show
from bench.quality import with_int8
from bench.rig.command import bench, model_folder, progress, save
from bench.rig.http import MODEL
from bench.rig.install import HOME, NotInstalled, infinity, install, run_step
from bench.rig.processes import EMBEDMESH, HOST, free_port
from embedmesh.engine.folder import read_folder
from embedmesh.engine.precision import tiers_here
from embedmesh.engine.threads import threads_here
from embedmesh.process import python_in_words

ROUNDS, QUICK_ROUNDS = 5, 2
QUICK_SCALE = 0.25  # of the texts
ROUNDS_S = 330.0  # no round begins that would end later; with starts and the node's figures, a run takes 8 minutes
QUERIES, QUICK_QUERIES = 120, 40  # short ones beside a bulk job
STARTS, QUICK_STARTS = 5, 2  # of a node
OURS = (f.EXACT, f.FAST, f.INT8, f.NODE)


SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
"""MKL gives AVX-512 to CPUs whose vendor is Intel, and calls this function of its own to learn the vendor."""


def build_shim() -> Path:
    """A library that, loaded before MKL, makes it use AVX-512 on any CPU that has it. Raises NotInstalled."""
    source, library = HOME / "mkl_avx512.c", HOME / "mkl_avx512.so"
    source.write_text(SHIM)
    run_step(["cc", "-shared", "-fPIC", "-o", str(library), str(source)])
    return library


def onnx_folder(model: Path) -> Path:
    """`model` with an ONNX form of its weights, exported by sentence-transformers' torch. Raises NotInstalled."""
    python, folder = install("sentence-transformers"), HOME / "onnx" / model.name
    if not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        part = folder / "model.onnx.part"
        run_step([str(python), str(Path(__file__).with_name("export.py")), str(model), str(part)])
        part.rename(folder / "model.onnx")
    return folder


class Field:
    """The contenders, started one by one; those that cannot take part are in `left_out` with the reason."""

    def __init__(self, model: Path, int8_model: Path, threads: int, folder: Path) -> None:
        """`int8_model` has an `int8.json`, if this CPU can use it. `folder`, of a short name, is for sockets, logs."""
        self._model, self._threads, self._folder = model, threads, folder
        self.starters: dict[str, Callable[[], Contender]] = {
            f.EXACT: lambda: self._runner(f.EXACT, Path(sys.executable), f.EXACT),
            f.FAST: lambda: self._runner(f.FAST, Path(sys.executable), f.FAST),
            f.INT8: lambda: self._runner(f.INT8, Path(sys.executable), f.INT8, int8_model),
            f.NODE: self.start_node,
            f.ST: lambda: self._runner(f.ST, install(f.ST), f.ST),
            f.ST_TUNED: lambda: self._runner(f.ST_TUNED, install(f.ST), f.ST, LD_PRELOAD=str(build_shim())),
            f.FASTEMBED: lambda: self._runner(f.FASTEMBED, install("fastembed"), "fastembed", onnx_folder(model)),
            f.INFINITY: self._infinity,
        }
        self.left_out: dict[str, str] = {}

    def start_node(self) -> Server:
        """A node of our own, with the default catalogue, on a new socket."""
        path = self._folder / f"{time.monotonic_ns()}.sock"
        where = ["--uds", str(path), "--data-dir", str(self._folder)]
        command = [*EMBEDMESH, "node", *where, "--threads", str(self._threads)]
        return Server(f.NODE, command, path, self._folder, self._threads)

    def start_node_again(self) -> float:
        """Seconds from a process to its first vector."""
        node = self.start_node()
        node.stop()
        return node.start_s

    def _runner(self, name: str, python: Path, kind: str, model: Path | None = None, **environment: str) -> Runner:
        return Runner(name, python, kind, model or self._model, self._folder, self._threads, environment)

    def _infinity(self) -> Server:
        port = free_port()
        command = infinity(self._model, MODEL, port)
        return Server(f.INFINITY, command, (HOST, port), self._folder, self._threads, "/embeddings")


def measure(quick: bool = False) -> Figures:
    """The whole run. Raises Broke when the engine itself, or a contender in the middle of it, does not answer."""
    folder, threads = model_folder(), threads_here()
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with contextlib.ExitStack() as ending:
        runs = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-")))
        int8_folder = ending.enter_context(with_int8(folder)) if f.INT8 in tiers_here() else folder
        field = Field(folder, int8_folder, threads, runs)
        bar = ending.enter_context(progress())
        task = bar.add_task("corpora", total=len(field.starters) * (rounds + 2))

        def step(words: str) -> None:
            bar.update(task, description=words, advance=1)

        job = Job(QUICK_SCALE if quick else 1.0)
        contenders, cosines = _start(field, job, step, ending)
        peaks = Peaks(["f32", *(["bf16"] if f.FAST in cosines else [])], threads, runs)
        ending.callback(peaks.stop)
        clock, done, longest_s = Stopwatch(contenders, job), 0, 0.0
        ends = time.monotonic() + ROUNDS_S
        while done < rounds and (not done or time.monotonic() + longest_s <= ends):
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
    m_flops = f.flops(read_folder(folder).config, job.counts["M"])
    figures = Figures(
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
    save("engine.svg", plot(figures, OURS))
    return figures


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
            cosines[name] = cosines_to(name, found, right)
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
            return f"{line.partition(':')[2].strip()}, {python_in_words()}"
    return f"{platform.machine()}, {python_in_words()}"


if __name__ == "__main__":
    bench(measure, show=show, file="engine.json", quick="fewer rounds and texts: two minutes")
