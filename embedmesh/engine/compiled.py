"""A model, compiled and ready: padded ids in, vectors out. Only the worker process imports this (and so OpenVINO)."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from embedmesh.engine import int8
from embedmesh.engine.folder import Folder
from embedmesh.engine.frames import Step
from embedmesh.engine.memory import file_pages_bytes, release_freed
from embedmesh.engine.models import build_graph
from embedmesh.engine.precision import Rest, check_cpu, compile_graph
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.models import Tier

RELEASE_EVERY_TOKENS = 2_048  # 0.1 to 0.3 s of work, and less than a millisecond to map its pages again
RELEASE_BYTES = 64 * 1024 * 1024  # of files' pages, while loading: so much of what was read may be in memory
RELEASE_LOOK_S = 0.005  # between two looks at that: 20 microseconds each, and 50 MB are read meanwhile


class CompiledModel:
    """A model in one tier on the CPU. Not for two threads at one time."""

    def __init__(
        self, folder: Folder, threads: int, tier: Tier = "exact", on_step: Callable[[Step], None] = lambda step: None
    ) -> None:
        """Build, compile, embed a first token, free unused memory. Raises SetupError.

        `threads` 0 means what the machine lets us use. What a tier means and needs: `embedmesh.engine.precision`.
        `on_step` is called as each step begins.
        """
        check_cpu(tier)
        self._weights = Weights(folder.transformer)
        self._bound: _Bound | None = None
        self._width = folder.width
        self._tokens_since_release = 0
        self._shapes: set[tuple[int, int]] = set()
        with _releasing(self._weights):
            on_step("reads its weights")
            graph = build_graph(folder, self._weights)
            rest: Rest = "float32"
            if tier == "int8":
                ranges = int8.read(folder.path)
                int8.insert(graph, ranges, folder.path.name)
                rest = ranges.rest
            on_step("compiles it")
            self._request = compile_graph(graph, threads, tier, rest).create_infer_request()
            del graph
            on_step("packs its weights")
            self.run([[0]], rows=1, length=4)
        release_freed()

    def run(self, sequences: Sequence[Sequence[int]], rows: int, length: int) -> npt.NDArray[np.float32]:
        """Vectors [len(sequences), width] of token ids, special tokens included. The model sees `rows` x `length`."""
        bound = self._bound
        if bound is None or bound.shape != (rows, length):
            bound = self._bound = _Bound(rows, length, self._width)
            for at, tensor in enumerate(bound.inputs):
                self._request.set_input_tensor(at, tensor)
            self._request.set_output_tensor(0, bound.output)
        # Out of memory, OpenVINO may return at once and leave the last batch's vectors where these should be.
        bound.vectors.fill(np.nan)
        _write(bound.ids, bound.mask, sequences)
        self._request.infer(share_outputs=True, decode_strings=False)
        self._release_pages(rows, length)
        return bound.vectors[: len(sequences)].copy()

    def _release_pages(self, rows: int, length: int) -> None:
        """Give pages of the weights file back now and then: it is 90 MB, and little of it is in use at one time.

        OpenVINO reads the weights to make the kernels of a new shape and keeps its own packed copy; after that only
        the embeddings of the words that texts use are read.
        """
        self._tokens_since_release += rows * length
        if (rows, length) not in self._shapes or self._tokens_since_release > RELEASE_EVERY_TOKENS:
            self._shapes.add((rows, length))
            self._tokens_since_release = 0
            self._weights.release_pages()


@contextlib.contextmanager
def _releasing(weights: Weights) -> Iterator[None]:
    """Give the pages of weights back while they are read once, or the whole file would be in memory beside its copy."""
    done = threading.Event()
    before = file_pages_bytes()

    def release() -> None:
        while not done.wait(RELEASE_LOOK_S):
            if file_pages_bytes() - before > RELEASE_BYTES:
                weights.release_pages()

    thread = threading.Thread(target=release, name="release pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        weights.release_pages()


class _Bound:
    """Arrays of one shape that the graph reads and writes in place: to pass new ones costs a tenth of a millisecond."""

    def __init__(self, rows: int, length: int, width: int) -> None:
        self.shape = rows, length
        self.ids = np.zeros((rows, length), np.int32)
        self.mask = np.zeros((rows, length), np.float32)
        self.vectors = np.empty((rows, width), np.float32)
        self.inputs = [ov.Tensor(array, shared_memory=True) for array in (self.ids, self.mask)]
        self.output = ov.Tensor(self.vectors, shared_memory=True)


def pad(sequences: Sequence[Sequence[int]], rows: int, length: int) -> list[npt.NDArray[Any]]:
    """What a graph takes, both [rows, length]: ids (int32), and the mask (float32) that is 1 for tokens."""
    ids, mask = np.empty((rows, length), np.int32), np.empty((rows, length), np.float32)
    _write(ids, mask, sequences)
    return [ids, mask]


def _write(ids: npt.NDArray[np.int32], mask: npt.NDArray[np.float32], sequences: Sequence[Sequence[int]]) -> None:
    ids.fill(0)
    mask.fill(0.0)
    if len(sequences) < len(mask):
        mask[len(sequences) :, 0] = 1.0  # a padding row has one token, so that its mean is a number
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1.0
