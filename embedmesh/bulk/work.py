"""Works off one unit: embeds its texts, writes its rows, and says what has become of them."""

import asyncio
import logging
import random
import threading
import time
from typing import Any

import msgspec
import numpy as np

from embedmesh.bulk.sinks import UnitTable, sink_for
from embedmesh.bulk.stops import Stopped, stopped_by
from embedmesh.bulk.units import REQUEST_TEXT_BYTES_MAX, REQUEST_TEXTS_MAX, JobPlan, JobUnit, pieces
from embedmesh.client.access import find_access
from embedmesh.client.bulk.packing import Packing, Unit
from embedmesh.client.bulk.replies import FLOAT32, Rows
from embedmesh.client.bulk.requests import BulkRequests, EmbeddedUnit
from embedmesh.client.bulk.threads import LoopThread
from embedmesh.client.bulk.window import CongestionWindow
from embedmesh.client.bulk.wire import BulkWire
from embedmesh.client.errors import EmbedmeshError
from embedmesh.rules.exchange import JOB_HEADER
from embedmesh.rules.limits import REQUEST_INPUTS_MAX

UNIT_REQUEST_S = 600.0  # the longest a gateway lets a request live
REFUSALS_KEPT_MAX = 5  # of a unit, in its row of the manifest; the output has them all

log = logging.getLogger("embedmesh.bulk")


class UnitWorker:
    """Works off units; one for a process, whose threads may share it. Call it with a unit as a dict.

    With a job at the gateway every request has an Idempotency-Key that follows from the unit, and so is charged once,
    however often the unit is worked off. Without, a unit that was not committed is paid again.
    """

    def __init__(self, plan: JobPlan | dict[str, Any]) -> None:
        """Raises WrongUsage where the output cannot be used, WrongCall where the gateway's address cannot."""
        self._plan = plan = msgspec.convert(plan, JobPlan) if isinstance(plan, dict) else plan
        self._sink = sink_for(plan.output)
        access = find_access(plan.base_url, plan.api_key, None)
        if plan.ledger_job is not None:
            access = msgspec.structs.replace(access, headers=access.headers | {JOB_HEADER: plan.ledger_job})
        wire = BulkWire(access, UNIT_REQUEST_S)
        self._requests = BulkRequests(
            wire.post,
            plan.fields,
            packing=Packing(REQUEST_INPUTS_MAX),
            window=CongestionWindow(),
            observer=self,
            dice=random.Random(),
        )
        self._gate = threading.Lock()  # what is submitted is so before the loop is told to end
        self._is_closed = False
        self._loop = LoopThread()
        self._loop.at_end(wire.close)
        self._loop.__enter__()

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """The unit's row for the manifest; its rows are in the output then. Raises Stopped, WrongUsage, OSError."""
        return self.work(JobUnit.of_dict(unit))

    def work(self, unit: JobUnit) -> dict[str, Any]:
        """As a call."""
        began = time.monotonic()
        table, tokens, cost_nanousd = self._embedded(unit)
        output = self._sink.write(unit, table)
        refused = [(at, error) for at, error in enumerate(table.errors) if error is not None]
        return {
            "unit": unit.number,
            "key": unit.key,
            "rows": len(unit.texts),
            "refused": len(refused),
            "tokens": tokens,
            "cost_nanousd": cost_nanousd,
            "seconds": round(time.monotonic() - began, 3),
            "width": table.vectors.shape[1],
            "output": output,
            "refusals": [[unit.first + at, error] for at, error in refused[:REFUSALS_KEPT_MAX]],
        }

    def close(self) -> None:
        """What is under way is cancelled, and nothing else begins."""
        with self._gate:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._loop.__exit__()

    def _embedded(self, unit: JobUnit) -> tuple[UnitTable, int, int]:
        errors: list[str | None] = [None] * len(unit.texts)
        for at, code, message in unit.refused:
            errors[at] = f"{code}: {message}"
        sent = [at for at, error in enumerate(errors) if error is None]
        requests = requests_of(unit, sent)
        with self._gate:
            if self._is_closed:
                raise Stopped("the worker was closed")
            begun = self._loop.submit(self._embed(requests, unit.key))
        replies = begun.result()
        width = next((reply.vectors.shape[1] for reply in replies if reply.vectors.shape[1]), self._plan.width or 0)
        vectors: Rows = np.full((len(unit.texts), width), np.nan, FLOAT32)
        for request, reply in zip(requests, replies, strict=True):
            places = sent[request.start : request.start + len(request.texts)]
            if reply.vectors.shape[1] == width:
                vectors[places] = reply.vectors
            elif len(reply.refused) < len(places):
                raise Stopped(f"The endpoint's vectors changed from {width} to {reply.vectors.shape[1]} components")
            for at, problem in reply.refused.items():
                errors[places[at]] = f"{problem.code}: {problem.message}"
        ids: list[str | int | None] = unit.ids or list(range(unit.first, unit.first + len(unit.texts)))
        arrow = read_arrow(unit.arrow) if unit.arrow is not None else None
        columns = unit.columns if arrow is None else python_columns(arrow)
        table = UnitTable(unit.first, ids, unit.texts, vectors, errors, columns, arrow)
        return table, sum(reply.tokens for reply in replies), sum(reply.cost_nanousd for reply in replies)

    async def _embed(self, requests: list[Unit], key: str) -> list[EmbeddedUnit]:
        """Raises Stopped."""
        keyed = self._plan.ledger_job is not None
        tasks = [
            asyncio.create_task(self._requests.embed(request, key=f"{key}-{number}" if keyed else None))
            for number, request in enumerate(requests)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        except EmbedmeshError as error:
            raise stopped_by(error) from None
        finally:
            for task in tasks:
                task.cancel()

    # -- BulkObserver

    def waiting(self, why: str, pause_s: float, requests: int) -> None:
        """A request is to be sent again."""
        log.info("%s; trying again in %.1f s (%d requests waiting)", why, pause_s, requests)

    def paid(self, tokens: int, cost_nanousd: int) -> None:
        """Counted when the unit is done."""


def requests_of(unit: JobUnit, places: list[int]) -> list[Unit]:
    """The requests for the texts at these places of a unit: always the same, whatever was learned from replies."""
    texts = [unit.texts[at] for at in places]
    sizes = [len(text.encode()) for text in texts]
    cut = pieces(sizes, REQUEST_TEXTS_MAX, REQUEST_TEXT_BYTES_MAX)
    return [Unit(at.start, texts[at.start : at.stop], sum(sizes[at.start : at.stop])) for at in cut]


def read_arrow(stream: bytes) -> Any:
    """The record batch of a unit."""
    import pyarrow

    with pyarrow.ipc.open_stream(stream) as batches:
        return batches.read_next_batch()


def python_columns(batch: Any) -> dict[str, list[Any]]:
    """Values as Python has them."""
    return {name: python_values(batch.column(name)) for name in batch.schema.names}


def python_values(column: Any) -> list[Any]:
    """Of an Arrow column."""
    try:
        values: list[Any] = column.to_pylist()
    except ValueError:  # nanoseconds, which Python's own times do not have
        values = column.cast("string").to_pylist()
    return values
