"""The parent's side of one worker process: start it, give it batches one by one, end it.

Any doubt about it (it closes its socket, is stuck, answers nonsense) is a WorkerBroke. Its stream is then out of step:
its owner must kill it and start another, which is not decided here. A Watch decides from what the kernel says of it
whether it is stuck, or only slow.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Protocol

from embedmesh.engine import frames, kernel
from embedmesh.engine.frames import Failed, FrameError, FromWorker, LoadModel, LoadRefused, Ready, RunBatch, Vectors
from embedmesh.engine.watch import WATCH_LOOK_S, Sample, Watch
from embedmesh.rules.errors import SetupError

# One malloc arena: the worker has one thread that allocates from Python; more arenas only keep freed memory.
WORKER_ENV = {"MALLOC_ARENA_MAX": "1"}
WORKER_END_S = 2.0  # a killed process is gone in milliseconds, unless a disk hangs or it gets no CPU
END_LOOK_S = 0.5  # at most, between two looks whether it is gone


class WorkerBroke(Exception):
    """The worker gave no good answer and must be killed. The text, for logs, continues a sentence on "the engine"."""


class WorkerStuck(WorkerBroke):
    """It did not answer, and will not."""


class Worker(Protocol):
    """What a supervisor needs of a worker."""

    @property
    def pid(self) -> int: ...

    async def load(self, load: LoadModel, watch: Watch) -> None: ...

    async def run(self, batch: RunBatch, watch: Watch) -> Vectors: ...

    def kill(self) -> None: ...

    async def gone(self, within_s: float) -> bool: ...


class WorkerProcess:
    """A worker: `load` its model, then `run` batches. Not for two callers at one time."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        sample: Callable[[int], Sample | None],
    ) -> None:
        self._process = process
        self._sample = sample
        self._reader = reader
        self._writer = writer
        self._killed_for_memory = kernel.killed_for_memory()

    @classmethod
    async def spawn(cls, sample: Callable[[int], Sample | None] = kernel.sample) -> "WorkerProcess":
        """A new process, which has no model yet. `sample` looks at a process by its id."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "embedmesh.engine.worker", str(theirs.fileno())]
            process = subprocess.Popen(  # noqa: ASYNC220 - two milliseconds, and no loop's child watcher to depend on
                command,
                env=os.environ | WORKER_ENV,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        try:
            return cls(process, *await asyncio.open_unix_connection(sock=ours), sample)
        except BaseException:
            process.kill()
            ours.close()
            await asyncio.shield(_gone(process, WORKER_END_S))
            raise

    async def load(self, load: LoadModel, watch: Watch) -> None:
        """Have it load a model and embed a first text. Raises SetupError when it refuses the folder, or WorkerBroke."""
        answer = await self._exchange(load, watch)
        if isinstance(answer, LoadRefused):
            raise SetupError(answer.message)
        if not isinstance(answer, Ready):
            raise WorkerBroke("answered out of turn")

    @property
    def pid(self) -> int:
        """The process id, for operators and tests."""
        return self._process.pid

    async def run(self, batch: RunBatch, watch: Watch) -> Vectors:
        """The vectors of the batch. Raises WorkerBroke; being cancelled is as bad."""
        answer = await self._exchange(batch, watch)
        if isinstance(answer, Vectors) and answer.number == batch.number:
            return answer
        raise WorkerBroke(f"failed ({answer.why})" if isinstance(answer, Failed) else "answered out of turn")

    def kill(self) -> None:
        """End it now. May be called twice."""
        self._process.kill()
        self._writer.close()

    async def gone(self, within_s: float) -> bool:
        """Wait until a killed process has left the process table, `within_s` at most; whether it has."""
        return await _gone(self._process, within_s)

    async def _exchange(self, message: LoadModel | RunBatch, watch: Watch) -> FromWorker:
        loop = asyncio.get_running_loop()
        wrong: str | None = None
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal wrong, timer
            wrong = watch.look(self._sample(self.pid))
            if wrong is None:
                timer = loop.call_later(WATCH_LOOK_S, look)
            elif not ending.expired():
                ending.reschedule(loop.time())

        timer = loop.call_later(WATCH_LOOK_S, look)
        try:
            async with asyncio.timeout(None) as ending:
                self._writer.write(frames.encode(message))
                await self._writer.drain()
                prefix = await self._reader.readexactly(frames.FRAME_LENGTH_BYTES)
                return frames.decode_from_worker(await self._reader.readexactly(frames.body_bytes(prefix)))
        except TimeoutError:
            raise WorkerStuck(wrong) from None
        except FrameError:
            raise WorkerBroke("answered nonsense") from None
        except (OSError, EOFError):
            raise WorkerBroke(await self._why_ended()) from None
        finally:
            timer.cancel()

    async def _why_ended(self) -> str:
        """How it ended, in words."""
        await self.gone(WORKER_END_S)
        code = self._process.returncode
        if code is None:
            return "closed its connection"
        if code >= 0:
            return f"ended by itself (exit code {code}; see its output above)"
        if code == -signal.SIGKILL and kernel.killed_for_memory() > self._killed_for_memory:
            return "was killed by the system because memory ran out"
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"


async def _gone(process: subprocess.Popen[bytes], within_s: float) -> bool:
    pause_s, left_s = 0.001, within_s
    while process.poll() is None and left_s > 0:
        await asyncio.sleep(pause_s)
        left_s -= pause_s
        pause_s = min(2 * pause_s, END_LOOK_S)
    return process.returncode is not None
