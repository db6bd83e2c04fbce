"""The parent's side of one worker process: start it, give it batches one by one, end it.

A batch begins and ends without a coroutine: `begin` writes its frame, and the read that completes the answer calls
back. After a batch this program's code is in no cache any more, so that each function on the way costs several times
what it would cost again.

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
from typing import Protocol, cast

from embedmesh.engine import frames, kernel
from embedmesh.engine.frames import FrameError, FromWorker, Loading, LoadModel, LoadRefused, Ready, RunBatch, Vectors
from embedmesh.engine.output import WorkerOutput
from embedmesh.engine.watch import WATCH_LOOK_S, Sample
from embedmesh.rules.errors import SetupError

# One malloc arena: the worker has one thread that allocates from Python; more arenas only keep freed memory. Blocks of
# 4 MB and more go back when they are freed: else growing texts leave gaps, a third of the states of 3,000 tokens.
WORKER_ENV = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(4 * 1024 * 1024)}
WORKER_END_S = 2.0  # a killed process is gone in milliseconds, unless a disk hangs or it gets no CPU
TIMER_SLACK_S = 0.002  # a loop's clock stands still within a turn, and its timers count in milliseconds
END_LOOK_S = 0.5  # at most, between two looks whether it is gone


class WorkerBroke(Exception):
    """The worker gave no good answer and must be killed. The text, for logs, continues a sentence on "the engine"."""


class WorkerStuck(WorkerBroke):
    """It did not answer, and will not."""


Look = Callable[[Sample | None], str | None]
"""Judges a look at a worker that has not answered yet: what is wrong with it, or None. See `Watch.look`."""

Done = Callable[[FromWorker | WorkerBroke], None]
"""Called once with an answer or what went wrong, unless the worker is killed before. Never called within `begin`."""


OnLoading = Callable[[Loading], None]
"""Called with each step of a load."""


class Worker(Protocol):
    """What a supervisor needs of a worker."""

    @property
    def pid(self) -> int: ...

    async def load(self, load: LoadModel, look: Look, on_loading: OnLoading) -> None: ...

    def begin(self, batch: RunBatch, look: Look, done: Done) -> None: ...

    def kill(self) -> None: ...

    async def gone(self, within_s: float) -> bool: ...


class WorkerProcess:
    """A worker: `load` its model, then `begin` batches, one at a time."""

    def __init__(self, process: subprocess.Popen[bytes], sample: Callable[[int], Sample | None]) -> None:
        self._process = process
        self._sample = sample
        self._loop = asyncio.get_running_loop()
        self._socket = AnswerSocket(self._heard, self._lost)
        self._look: Look | None = None
        self._on_loading: OnLoading | None = None  # while it loads
        self._done: Done | None = None  # while it owes an answer
        self._begun = 0.0  # on the loop's clock: the message that it owes an answer to
        self._timer: asyncio.TimerHandle | None = None  # kept over batches: most are done before it fires
        self._telling: asyncio.Task[None] | None = None  # how it ended
        self._wrong = ""  # what it said unasked
        self._killed_for_memory = kernel.killed_for_memory()
        self._output = WorkerOutput(process.pid)

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
                stderr=subprocess.PIPE,
            )
            assert process.stderr is not None
        ours.setblocking(False)
        try:
            made = cls(process, sample)
            await made._loop.create_unix_connection(lambda: made._socket, sock=ours)
            await made._loop.connect_read_pipe(lambda: made._output, process.stderr)
        except BaseException:
            process.kill()
            ours.close()
            process.stderr.close()
            await asyncio.shield(_gone(process, WORKER_END_S))
            raise
        return made

    @property
    def pid(self) -> int:
        """The process id, for operators and tests."""
        return self._process.pid

    async def load(self, load: LoadModel, look: Look, on_loading: OnLoading = lambda loading: None) -> None:
        """Have it load a model and embed a first text. Raises SetupError when it refuses the folder, or WorkerBroke.

        `on_loading` is called at each step.
        """
        answered: asyncio.Future[FromWorker | WorkerBroke] = self._loop.create_future()
        self._on_loading = on_loading
        self._begin(load, look, lambda said: None if answered.done() else answered.set_result(said))
        answer = await answered
        self._on_loading = None
        if isinstance(answer, WorkerBroke):
            raise answer
        if isinstance(answer, LoadRefused):
            raise SetupError(answer.message)
        if not isinstance(answer, Ready):
            raise WorkerBroke("answered out of turn")

    def begin(self, batch: RunBatch, look: Look, done: Done) -> None:
        """Run a batch. `look` is called while it lasts long."""
        self._begin(batch, look, done)

    def kill(self) -> None:
        """End it now; nobody is called any more. May be called twice."""
        self._look = self._done = None
        if self._timer is not None:
            self._timer.cancel()
        if self._telling is not None:
            self._telling.cancel()
        self._process.kill()
        self._socket.close()
        self._output.close()

    async def gone(self, within_s: float) -> bool:
        """Wait until a killed process has left the process table, `within_s` at most; whether it has."""
        return await _gone(self._process, within_s)

    def _begin(self, message: LoadModel | RunBatch, look: Look, done: Done) -> None:
        self._look, self._done = look, done
        if self._wrong:
            self._loop.call_soon(self._end, WorkerBroke(self._wrong))
        elif not self._socket.write(frames.encode(message)):
            self._lost()
        else:
            self._begun = self._loop.time()
            if self._timer is None:
                self._timer = self._loop.call_later(WATCH_LOOK_S, self._look_at_it)

    def _look_at_it(self) -> None:
        self._timer = None
        if self._look is None:
            return
        young_s = self._begun + WATCH_LOOK_S - self._loop.time()
        if young_s > TIMER_SLACK_S:
            self._timer = self._loop.call_later(young_s, self._look_at_it)
            return
        wrong = self._look(self._sample(self.pid))
        if wrong is None:
            self._timer = self._loop.call_later(WATCH_LOOK_S, self._look_at_it)
        else:
            self._end(WorkerStuck(wrong))

    def _heard(self, answer: FromWorker | FrameError) -> None:
        if isinstance(answer, Loading) and self._on_loading is not None:
            self._on_loading(answer)
        elif self._done is None:
            self._wrong = "answered out of turn"
        else:
            self._end(WorkerBroke("answered nonsense") if isinstance(answer, FrameError) else answer)

    def _lost(self) -> None:
        """It has closed its socket."""
        if self._done is not None and self._telling is None:
            self._telling = self._loop.create_task(self._tell_why_ended())

    def _end(self, said: FromWorker | WorkerBroke) -> None:
        done, self._look, self._done = self._done, None, None
        if done is not None:
            done(said)

    async def _tell_why_ended(self) -> None:
        why = await self._why_ended()
        self._end(WorkerBroke(why))

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


class AnswerSocket(asyncio.Protocol):
    """Our end of a worker's socket: frames go out, each whole frame that comes is an answer."""

    def __init__(self, heard: Callable[[FromWorker | FrameError], None], lost: Callable[[], None]) -> None:
        self._heard = heard
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._chunks: list[bytes] = []  # of a frame that is not whole
        self._size = 0
        self._whole = frames.FRAME_LENGTH_BYTES  # bytes of the frame, or of its length while that is not there

    def write(self, frame: bytes) -> bool:
        """Send a frame; False if the socket is closed."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(frame)
        return True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # of a socket
        self._transport.set_write_buffer_limits(high=0)  # or a frame would leave only when this turn of the loop ends

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        while self._size >= self._whole:
            data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            self._chunks = [data]
            try:
                end = frames.FRAME_LENGTH_BYTES + frames.body_bytes(data[: frames.FRAME_LENGTH_BYTES])
                if self._size < end:
                    self._whole = end
                    return
                answer: FromWorker | FrameError = frames.decode_from_worker(
                    memoryview(data)[frames.FRAME_LENGTH_BYTES : end]
                )
            except FrameError as error:
                answer, end = error, self._size  # nothing that follows can be read
            self._chunks, self._size = ([data[end:]] if self._size > end else []), self._size - end
            self._whole = frames.FRAME_LENGTH_BYTES
            self._heard(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost()


def rows_of(answer: Vectors, count: int, width: int) -> list[bytes | None]:
    """One vector a sequence; None for those that are not finite. Raises WorkerBroke for another number of them."""
    size = width * 4
    if len(answer.data) != count * size:
        raise WorkerBroke("answered with a wrong number of components")
    if count == 1 and not answer.bad:
        return [answer.data]
    bad = set(answer.bad)
    return [None if at in bad else answer.data[at * size : (at + 1) * size] for at in range(count)]


async def _gone(process: subprocess.Popen[bytes], within_s: float) -> bool:
    pause_s, left_s = 0.001, within_s
    while process.poll() is None and left_s > 0:
        await asyncio.sleep(pause_s)
        left_s -= pause_s
        pause_s = min(2 * pause_s, END_LOOK_S)
    return process.returncode is not None
