"""Who takes part, and how each is started."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.engine.contenders import Contender, Runner, Server
from bench.engine.figures import EXACT, FAST, FASTEMBED, INFINITY, INT8, NODE, ONNX, ST, ST_FAST
from bench.engine.models import as_onnx
from bench.rig.http import MODEL
from bench.rig.install import HOME, infinity, install, run_step
from bench.rig.processes import EMBEDMESH, HOST, free_port

NODE_TOKENS = 256  # of a text: a node serves the default catalogue's model as that says
SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
"""MKL chooses its kernels for AVX2 and AVX-512 where the vendor is Intel, and calls this function to learn the vendor.

Without it MKL runs other kernels on an AMD CPU: what it has chosen stands in the contender's version (`mkl_level`).
"""


def force_fast_path() -> Path:
    """A library that, loaded before MKL, makes it use all that the CPU has. Raises NotInstalled."""
    HOME.mkdir(exist_ok=True)
    source, library = HOME / "mkl_any_vendor.c", HOME / "mkl_any_vendor.so"
    source.write_text(SHIM)
    run_step(["cc", "-shared", "-fPIC", "-o", str(library), str(source)])
    return library


class Field:
    """The contenders by name; each starts when it is called, and may raise NotInstalled or Broke."""

    def __init__(self, model: Path, int8_model: Path | None, threads: int, folder: Path) -> None:
        """`int8_model`: None where this CPU has none. `folder`, of a short name, is for sockets and logs."""
        self._model, self._threads, self._folder = model, threads, folder
        self.starters: dict[str, Callable[[], Contender]] = {EXACT: lambda: self.ours(EXACT, model)}
        if int8_model is not None:
            self.starters |= {FAST: lambda: self.ours(FAST, model), INT8: lambda: self.ours(INT8, int8_model)}
        self.starters |= {
            NODE: self.start_node,
            ST: lambda: self.theirs(ST, model),
            ST_FAST: lambda: self.theirs(ST_FAST, model),
            FASTEMBED: lambda: self._runner(FASTEMBED, install("fastembed"), "fastembed", as_onnx(model)),
            ONNX: lambda: self._runner(ONNX, install("fastembed"), "onnxruntime", as_onnx(model)),
            INFINITY: self._infinity,
        }

    def ours(self, tier: str, model: Path) -> Runner:
        """A tier in process."""
        return self._runner(tier, Path(sys.executable), tier, model)

    def theirs(self, name: str, model: Path) -> Runner:
        """sentence-transformers, as it comes or with its fast path forced."""
        forced = {"LD_PRELOAD": str(force_fast_path())} if name == ST_FAST else {}
        return self._runner(name, install(ST), ST, model, **forced)

    def start_node(self) -> Server:
        """A node of our own, with the default catalogue, on a new socket."""
        path = self._folder / f"{time.monotonic_ns()}.sock"
        where = ["--uds", str(path), "--data-dir", str(self._folder)]
        command = [*EMBEDMESH, "node", *where, "--threads", str(self._threads)]
        node = Server(NODE, command, path, self._folder, self._threads)
        node.takes_tokens = NODE_TOKENS
        return node

    def start_node_again(self) -> float:
        """Seconds from a process to its first vector."""
        node = self.start_node()
        node.stop()
        return node.start_s

    def _runner(self, name: str, python: Path, kind: str, model: Path, **environment: str) -> Runner:
        return Runner(name, python, kind, model, self._folder, self._threads, environment)

    def _infinity(self) -> Server:
        port = free_port()
        command = infinity(self._model, MODEL, port)
        return Server(INFINITY, command, (HOST, port), self._folder, self._threads, "/embeddings")
