"""Bulk runs for programs without an event loop, and for those that have one and cannot wait on it, as notebooks."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self, TypeVar

from embedmesh.client.bulk.options import BulkCall, Chunk
from embedmesh.client.bulk.packing import Text, Unit
from embedmesh.client.bulk.replies import Rows
from embedmesh.client.bulk.requests import EmbeddedUnit
from embedmesh.client.bulk.run import BulkRun, embed_all, length_of
from embedmesh.client.bulk.wire import BulkWire

T = TypeVar("T")


def embed_all_waiting(call: BulkCall, texts: Sequence[Text]) -> Rows:
    """As `embed_all`, in this thread; in another one where this one's event loop runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_embed_all(call, texts))
    with LoopThread() as loop:
        return loop.submit(_embed_all(call, texts)).result()


async def _embed_all(call: BulkCall, texts: Sequence[Text]) -> Rows:
    wire = BulkWire(call.access, call.within_s)
    try:
        return await embed_all(call, wire.post, texts)
    finally:
        wire.close()


def embed_stream_waiting(call: BulkCall, texts: Iterable[Text]) -> Generator[Chunk, None, None]:
    """As `embed_stream`. Texts are taken, and chunks given, in the caller's thread; requests go on meanwhile."""
    with LoopThread() as loop:
        wire = BulkWire(call.access, call.within_s)
        run = BulkRun(call, wire.post, length_of(texts))
        begun: deque[tuple[Unit, Future[EmbeddedUnit]]] = deque()
        try:
            for unit in run.packing.units(texts):
                begun.append((unit, loop.submit(run.embed(unit))))
                while len(begun) >= run.ahead:
                    unit, future = begun.popleft()
                    yield run.take(unit, future.result())
            while begun:
                unit, future = begun.popleft()
                yield run.take(unit, future.result())
        finally:
            loop.at_end(wire.close)


class LoopThread:
    """An event loop in a thread of its own, while the block lasts. What still runs at its end is cancelled."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._at_end: list[Callable[[], None]] = []
        # A daemon: a generator that is never finished must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="embedmesh-client", daemon=True)

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def at_end(self, work: Callable[[], None]) -> None:
        """Do it there when all else has ended."""
        self._at_end.append(work)

    def start(self) -> None:
        """Begin to run."""
        self._thread.start()

    def stop(self) -> None:
        """End, soon: what still runs is cancelled there."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._loop.stop)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._end(asyncio.all_tasks(self._loop)))
        finally:
            self._loop.close()

    async def _end(self, tasks: "set[asyncio.Task[Any]]") -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for work in self._at_end:
            work()
        await asyncio.sleep(0)  # what was aborted is closed
