"""A model, compiled and ready: padded ids in, vectors out. Only the worker process imports this (and so OpenVINO)."""

import ctypes
import gc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import openvino as ov

from embedmesh.engine.folder import Folder
from embedmesh.engine.models import build_graph
from embedmesh.engine.safetensors import WeightsFile

WEIGHTS_FILE = "model.safetensors"
KERNELS_CACHED_MAX = 1_024  # of each kind; the planner's shapes are far fewer, so that no kernel is made twice
RELEASE_EVERY_TOKENS = 8_192  # half a second of work, and about a millisecond to map the pages again


class CompiledModel:
    """fp32 on the CPU. Not for two threads at one time."""

    def __init__(self, folder: Folder, threads: int) -> None:
        """Build, compile, embed a first token, free what is not needed any more. Raises SetupError.

        `threads` 0 leaves their number to OpenVINO.
        """
        self._weights = WeightsFile(folder.path / WEIGHTS_FILE)
        compiled = ov.Core().compile_model(build_graph(folder, self._weights), "CPU", _options(threads))
        self._request = compiled.create_infer_request()
        self._tokens_since_release = 0
        self._shapes: set[tuple[int, int]] = set()
        self.run([[0]], rows=1, length=4)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def run(self, sequences: Sequence[Sequence[int]], rows: int, length: int) -> npt.NDArray[np.float32]:
        """Vectors [len(sequences), width] of token ids, special tokens included. The model sees `rows` x `length`."""
        ids = np.zeros((rows, length), np.int32)
        mask = np.zeros((rows, length), np.float32)
        mask[len(sequences) :, 0] = 1.0  # a padding row has one token, so that its mean is a number
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1.0
        self._request.infer([ids, mask], share_inputs=True)
        self._release_pages(rows, length)
        vectors: npt.NDArray[np.float32] = self._request.get_output_tensor(0).data[: len(sequences)].copy()
        return vectors

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


def _options(threads: int) -> dict[str, object]:
    """One stream over all threads: as fast as two streams, with half the latency and memory.

    The precision is always said: OpenVINO's default depends on the machine, and so would the vectors.
    """
    options: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "EXECUTION_MODE_HINT": "ACCURACY",
        "NUM_STREAMS": 1,
        "CPU_RUNTIME_CACHE_CAPACITY": KERNELS_CACHED_MAX,
    }
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return options
