"""The parent's side of one worker process: start it, give it batches one by one, end it.

Any doubt about it (it closes its socket, is late, answers nonsense) is a WorkerBroke. Its stream is then out of step:
whoever owns it must kill it and start another, which is not decided here.
"""

import asyncio
import os
import socket
import subprocess
import sys

from embedmesh.engine import frames
from embedmesh.engine.frames import Batch, Failed, FrameError, FromWorker, Load, Ready, Refused, Vectors
from embedmesh.rules.errors import SetupError

# One malloc arena: the worker has one thread that allocates from Python; more arenas only keep freed memory.
WORKER_ENV = {"MALLOC_ARENA_MAX": "1"}
END_S = 5.0  # a killed process is gone in milliseconds unless the disk hangs


class WorkerBroke(Exception):
    """The worker gave no good answer and must be killed. The text goes on after "the engine": words for logs."""


class WorkerProcess:
    """A worker that has loaded its model. Not for two callers at one time."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, load: Load, deadline_s: float) -> "WorkerProcess":
        """A worker that has embedded a first text. Raises SetupError when it refuses the folder, else WorkerBroke."""
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
            worker = cls(process, *await asyncio.open_unix_connection(sock=ours))
        except BaseException:
            process.kill()
            ours.close()
            await asyncio.shield(asyncio.to_thread(process.wait, END_S))
            raise
        try:
            answer = await worker._ask(load, deadline_s)
            if isinstance(answer, Refused):
                raise SetupError(answer.message)
            if not isinstance(answer, Ready):
                raise WorkerBroke("answered out of turn")
        except BaseException:
            worker.kill()
            await asyncio.shield(worker.gone())
            raise
        return worker

    @property
    def pid(self) -> int:
        """The process id, for operators and tests."""
        return self._process.pid

    async def run(self, batch: Batch, deadline_s: float) -> Vectors:
        """The vectors of the batch. Raises WorkerBroke; being cancelled is as bad."""
        answer = await self._ask(batch, deadline_s)
        if isinstance(answer, Vectors) and answer.number == batch.number:
            return answer
        raise WorkerBroke(answer.why if isinstance(answer, Failed) else "answered out of turn")

    def kill(self) -> None:
        """End it now. May be called twice."""
        self._process.kill()
        self._writer.close()

    async def gone(self) -> None:
        """Wait until a killed process has left the process table."""
        await asyncio.to_thread(self._process.wait, END_S)

    async def _ask(self, message: Load | Batch, deadline_s: float) -> FromWorker:
        try:
            async with asyncio.timeout(deadline_s):
                self._writer.write(frames.encode(message))
                await self._writer.drain()
                prefix = await self._reader.readexactly(frames.LENGTH_BYTES)
                return frames.decode_from_worker(await self._reader.readexactly(frames.body_bytes(prefix)))
        except TimeoutError:
            raise WorkerBroke("did not answer in time") from None
        except (OSError, EOFError, FrameError) as error:
            raise WorkerBroke(f"broke off ({type(error).__name__})") from None
