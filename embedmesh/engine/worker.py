"""The child process that owns one running model: `python -m embedmesh.engine.worker FD`.

It may crash, hang or be killed at any moment, so it holds nothing that must survive. It ends when its socket closes,
and the kernel kills it when its parent dies while it computes: it never outlives its node.
"""

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from embedmesh.engine import frames
from embedmesh.engine.folder import Folder, digest, read_folder
from embedmesh.engine.frames import Failed, Loading, LoadModel, LoadRefused, Ready, RunBatch, Step, Vectors
from embedmesh.engine.progress import STEPS
from embedmesh.engine.runtime import RunningModel, make_model
from embedmesh.engine.threads import engine_threads
from embedmesh.logs.setup import catch_uncaught
from embedmesh.rules.errors import SetupError
from embedmesh.system import call_c

PR_SET_PDEATHSIG = 1
OOM_SCORE = 500  # short of memory, the kernel shall take the worker, which comes back in a second


def main(fd: int) -> None:
    """Load what the first message names, then answer batches until the socket closes."""
    catch_uncaught()
    begun = time.monotonic()
    _tie_to_parent()
    sock = socket.socket(fileno=fd)
    stream = sock.makefile("rb")
    load = frames.receive(stream, msgspec.msgpack.Decoder(LoadModel))
    if load is None:
        return
    try:
        model, reranks = _load(load, lambda step: sock.sendall(frames.encode(Loading(step, STEPS[step]))))
    except SetupError as error:
        sock.sendall(frames.encode(LoadRefused(str(error))))
        return
    sock.sendall(frames.encode(Ready(load_ms=round((time.monotonic() - begun) * 1000))))
    batches = msgspec.msgpack.Decoder(RunBatch)
    while (batch := frames.receive(stream, batches)) is not None:
        sock.sendall(frames.encode(_answer(model, batch, may_be_zero=reranks)))


def _load(load: LoadModel, on_step: Callable[[Step], None]) -> tuple[RunningModel, bool]:
    """The model, and whether it reranks. Raises SetupError."""
    on_step("checks its files")
    path = Path(load.folder)
    if digest(path) != load.digest:
        raise SetupError(
            f"Model folder {path.name} is not the model that the catalogue names (its digest differs). "
            "Run `embedmesh setup` to fetch it again, or correct the catalogue."
        )
    folder = read_folder(path)
    _compare(load, folder)
    return make_model(folder, engine_threads(load.threads).number, load.tier, on_step), folder.reranks


def _compare(load: LoadModel, folder: Folder) -> None:
    """The catalogue and the folder must agree on what a caller can see."""
    name = folder.path.name
    if load.width != folder.width:
        raise SetupError(f"The catalogue gives {name} a width of {load.width}; its folder says {folder.width}.")
    if load.max_tokens > folder.max_tokens:
        raise SetupError(f"The catalogue gives {name} {load.max_tokens} tokens; its folder allows {folder.max_tokens}.")


def _answer(model: RunningModel, batch: RunBatch, *, may_be_zero: bool) -> Vectors | Failed:
    begun = time.process_time()
    try:
        vectors = model.run(batch.sequences, batch.rows, batch.length)
    except Exception as error:  # noqa: BLE001 - whatever it is, the node replaces this process
        return Failed(batch.number, type(error).__name__)
    if len(vectors) == 1:
        squares = [float(vectors[0].dot(vectors[0]))]  # an eighth of what the general way costs
    else:
        squares = np.einsum("ij,ij->i", vectors, vectors).tolist()
    least = 0.0 if may_be_zero else math.ulp(0.0)
    bad = [at for at, square in enumerate(squares) if not least <= square < math.inf]  # also one that is not a number
    data = vectors.astype("<f4", copy=False).tobytes()
    return Vectors(batch.number, data, bad, time.process_time() - begun)


def _tie_to_parent() -> None:
    # The node drains on these and then closes our socket; a terminal or an init system sends them to the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    call_c("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # elsewhere it ends when its batch is done
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    except OSError:
        return  # not Linux, or not allowed: then the kernel chooses by size, which is mostly the worker too


if __name__ == "__main__":
    # Without tidying up: OpenVINO's threads may be in any state, and there is nothing to save.
    main(int(sys.argv[1]))
    os._exit(0)
