"""The story of a bulk run: cut texts into units, request several at one time, hand them over in input order."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TypeVar

import numpy as np

from embedmesh.client.bulk.options import BulkCall, BulkProgress, Chunk
from embedmesh.client.bulk.packing import Packer, Packing, Text, Unit
from embedmesh.client.bulk.posting import Post
from embedmesh.client.bulk.replies import FLOAT32, Rows
from embedmesh.client.bulk.requests import BulkRequests, EmbeddedUnit, MakeRows
from embedmesh.client.bulk.window import CongestionWindow
from embedmesh.client.errors import InputRefused, NotEmbeddings, WrongCall

log = logging.getLogger("embedmesh.client")
T = TypeVar("T")
Texts = Iterable[Text] | AsyncIterable[Text]


class LoggedWaits:
    """What a run does, for its log."""

    def waiting(self, why: str, pause_s: float, requests: int) -> None:
        """A request is to be sent again."""
        log.info("%s; trying again in %.1f s (%d requests waiting)", why, pause_s, requests)

    def paid(self, tokens: int, cost_nanousd: int) -> None:
        """Counted when the unit is done."""


class BulkRun:
    """One run: its requests, and how far it is."""

    def __init__(self, call: BulkCall, post: Post, total: int | None) -> None:
        """Raises WrongCall."""
        self._call = call
        self.packing = Packing(call.batch_size)
        self.window = CongestionWindow(call.concurrency)
        self._requests = BulkRequests(
            post,
            call.fields,
            packing=self.packing,
            window=self.window,
            observer=LoggedWaits(),
            dice=call.dice,
            trust=call.trust,
            idempotent=call.idempotent,
        )
        self._began = time.monotonic()
        self._width: int | None = None
        self._progress = BulkProgress(0, total, 0, 0, 0, 0.0)

    @property
    def ahead(self) -> int:
        """Units that are begun and not handed over, at most: some are whole and wait for one before them."""
        return self.window.size + max(2, self.window.size // 2)

    async def embed(self, unit: Unit, make_rows: MakeRows | None = None) -> EmbeddedUnit:
        """Request the vectors of a unit. Raises as BulkRequests.embed."""
        return await self._requests.embed(unit, make_rows)

    def take(self, unit: Unit, embedded: EmbeddedUnit) -> Chunk:
        """A unit is done. Raises InputRefused, NotEmbeddings."""
        width = embedded.vectors.shape[1]
        self._width = self._width or width
        if width not in (0, self._width):
            raise NotEmbeddings(f"The endpoint's vectors changed from {self._width} to {width} components.")
        for at, problem in sorted(embedded.refused.items()):
            if self._call.on_refused is None:
                raise InputRefused(unit.start + at, problem)
            self._call.on_refused(unit.start + at, problem)
        before = self._progress
        self._progress = BulkProgress(
            before.texts + len(unit.texts),
            before.total,
            before.refused + len(embedded.refused),
            before.tokens + embedded.tokens,
            before.cost_nanousd + embedded.cost_nanousd,
            time.monotonic() - self._began,
        )
        if self._call.progress is not None:
            self._call.progress(self._progress)
        return Chunk(unit.start, embedded.vectors)


class Table:
    """The array that a run of known length fills; made when the first reply tells how wide it is."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._array: Rows | None = None
        self._without: list[slice] = []  # wholly refused

    def rows(self, unit: Unit) -> MakeRows:
        """Where the vectors of a unit go."""
        return lambda width: self._made(width)[unit.start : unit.start + len(unit.texts)]

    def took(self, chunk: Chunk) -> None:
        """A unit is done."""
        if chunk.vectors.shape[1] == 0:
            self._without.append(slice(chunk.start, chunk.start + len(chunk.vectors)))

    def whole(self) -> Rows:
        """When every unit is done."""
        array = self._made(0)
        for rows in self._without:
            array[rows] = np.nan
        return array

    def _made(self, width: int) -> Rows:
        if self._array is None:
            self._array = np.empty((self._count, width), FLOAT32)
        elif width not in (0, self._array.shape[1]):
            raise NotEmbeddings(f"The endpoint's vectors changed from {self._array.shape[1]} to {width} components.")
        return self._array


async def embed_all(call: BulkCall, post: Post, texts: Sequence[Text]) -> Rows:
    """One array (texts, width) in input order; (0, dimensions or 0) where there is no text."""
    if not texts:
        return np.empty((0, call.fields.get("dimensions") or 0), FLOAT32)
    run, table = BulkRun(call, post, len(texts)), Table(len(texts))
    units = run.packing.units(texts)
    begun = in_order(units, lambda unit: run.embed(unit, table.rows(unit)), lambda: 2 * run.ahead)
    async with aclosing(begun):
        async for unit, embedded in begun:
            table.took(run.take(unit, embedded))
    return table.whole()


async def embed_stream(call: BulkCall, post: Post, texts: Texts) -> AsyncGenerator[Chunk, None]:
    """Chunks in input order, as they are done. No more texts are taken than are in flight, and some more."""
    run = BulkRun(call, post, length_of(texts))
    units = run.packing.units(texts) if isinstance(texts, Iterable) else _units(texts, Packer(run.packing))
    async with aclosing(in_order(units, run.embed, lambda: run.ahead)) as begun:
        async for unit, embedded in begun:
            yield run.take(unit, embedded)


async def in_order(
    units: Iterable[Unit] | AsyncIterable[Unit], start: Callable[[Unit], Awaitable[T]], ahead: Callable[[], int]
) -> AsyncGenerator[tuple[Unit, T], None]:
    """Start every unit, at most `ahead()` before the first that is not done; each with what came of it, in order.

    What is under way is cancelled, and has ended, when this ends.
    """
    begun: deque[tuple[Unit, asyncio.Future[T]]] = deque()
    try:
        async for unit in _each(units):
            begun.append((unit, asyncio.ensure_future(start(unit))))
            while len(begun) >= ahead():
                yield begun[0][0], await begun[0][1]
                begun.popleft()
        while begun:
            yield begun[0][0], await begun[0][1]
            begun.popleft()
    finally:
        for _, task in begun:
            task.cancel()
        await asyncio.gather(*(task for _, task in begun), return_exceptions=True)


async def _each(units: Iterable[Unit] | AsyncIterable[Unit]) -> AsyncIterator[Unit]:
    if isinstance(units, AsyncIterable):
        async for unit in units:
            yield unit
    else:
        for unit in units:
            yield unit


async def _units(texts: AsyncIterable[Text], cut: Packer) -> AsyncIterator[Unit]:
    async for text in texts:
        if (unit := cut.add(text)) is not None:
            yield unit
    if (unit := cut.end()) is not None:
        yield unit


def length_of(texts: object) -> int | None:
    """How many there are, where they know it."""
    try:
        return len(texts)  # type: ignore[arg-type]
    except TypeError:
        return None


G = TypeVar("G")


def as_iterable(texts: G) -> G:
    """The texts. Raises WrongCall for a single text, which is an iterable of its letters."""
    if isinstance(texts, str | bytes):
        raise WrongCall("texts must be a list of texts: put the one text into a list.")
    return texts


def as_sequence(texts: Iterable[Text]) -> Sequence[Text]:
    """Texts whose number is known. Raises as `as_iterable`."""
    return as_iterable(texts) if isinstance(texts, Sequence) else list(texts)
