"""A client for the workers of engines: batches of texts come in several threads or event loops, and share one bulk run.

They share its connections, its congestion window and what it has learned of the endpoint, so that one batch's last
requests are in flight beside the next batch's first.
"""

import asyncio
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Unpack

import numpy as np

from embedmesh.client.bulk.options import BulkOptions, Chunk
from embedmesh.client.bulk.packing import Packing, Unit
from embedmesh.client.bulk.replies import FLOAT32
from embedmesh.client.bulk.requests import BulkRequests, EmbeddedUnit
from embedmesh.client.bulk.run import LoggedWaits, Table, in_order
from embedmesh.client.bulk.threads import LoopThread
from embedmesh.client.bulk.window import CongestionWindow
from embedmesh.client.bulk.wire import BulkWire
from embedmesh.client.calls import TIMEOUT_S, Calls
from embedmesh.client.errors import WrongCall
from embedmesh.client.models import served_width
from embedmesh.client.refusals import Problem


class SharedClient:
    """Embeds batches at one endpoint. Threads and event loops may share it; it ends when nobody refers to it any more.

    What callers have handed in is in memory, so it is they who bound it.
    """

    def __init__(
        self,
        *,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        **options: Unpack[BulkOptions],
    ) -> None:
        """Raises WrongCall. `progress` and `on_refused` are no options here: every batch is told by its own answer."""
        if unfit := options.keys() & {"progress", "on_refused", "confidential"}:
            raise WrongCall(f"{min(unfit)} is no option of an engine's client.")
        calls = Calls(
            base_url=base_url,
            api_key=api_key,
            confidential=False,
            pins=None,
            scheme="hpke-1",
            timeout=timeout,
            max_retries=0,
            ssl_context=None,
        )
        call = calls.begin_bulk(model, options)
        wire = BulkWire(call.access, call.within_s)
        self._access, self._model = call.access, model
        self._width: int | None = call.fields.get("dimensions")
        self._requests = BulkRequests(
            wire.post,
            call.fields,
            packing=Packing(call.batch_size),
            window=CongestionWindow(call.concurrency),
            observer=LoggedWaits(),
            dice=call.dice,
            idempotent=call.idempotent,
        )
        self._loop = LoopThread()
        self._loop.start()
        self._loop.at_end(wire.close)
        weakref.finalize(self, self._loop.stop)

    def embed(self, texts: Sequence[str | None]) -> "Future[EmbeddedUnit]":
        """The vectors of a batch, one row a text, with rows of NaN for those that are None or were refused.

        The future raises subclasses of EmbedmeshError; cancel it, and its requests are cancelled.
        """
        return self._loop.submit(self._embed(texts))

    async def _embed(self, texts: Sequence[str | None]) -> EmbeddedUnit:
        places = [at for at, text in enumerate(texts) if text is not None]
        table = Table(len(places))
        refused: dict[int, Problem] = {}
        tokens = cost_nanousd = 0
        units = self._requests.packing.units(text for text in texts if text is not None)

        async def start(unit: Unit) -> EmbeddedUnit:
            return await self._requests.embed(unit, table.rows(unit))

        async with aclosing(in_order(units, start, lambda: len(places) + 1)) as begun:
            async for unit, embedded in begun:
                table.took(Chunk(unit.start, embedded.vectors))
                refused |= {places[unit.start + at]: problem for at, problem in embedded.refused.items()}
                tokens, cost_nanousd = tokens + embedded.tokens, cost_nanousd + embedded.cost_nanousd
        vectors = table.whole()
        if len(places) < len(texts) or vectors.shape[1] == 0:
            width = vectors.shape[1] or await self._found_width()
            found, vectors = vectors, np.full((len(texts), width), np.nan, FLOAT32)
            if found.shape[1]:
                vectors[places] = found
        return EmbeddedUnit(vectors, refused, tokens, cost_nanousd)

    async def _found_width(self) -> int:
        """Of a batch without any vector."""
        if self._width is None:
            self._width = await asyncio.to_thread(served_width, self._access, self._model)
        return self._width
