"""The story of a run: read a batch, request it while other requests are in flight, write in input order."""

import asyncio
from collections import deque
from collections.abc import Callable

from embedmesh.bulk.lines import Batches, LineBatch, Refusal
from embedmesh.commands.bulk.client import IN_FLIGHT_MAX, BulkClient, Vector
from embedmesh.commands.bulk.output import FileOutput, Stdout

Sent = tuple[LineBatch, asyncio.Task[list[Vector | Refusal]]]
Report = Callable[[LineBatch, list[Vector | Refusal]], None]


async def run(batches: Batches, client: BulkClient, output: Stdout | FileOutput, report: Report) -> None:
    """Embed and write every batch; `report` gets each that is written.

    Raises Stopped and whatever the input and output raise. Whatever ends it, batches that are answered already, and
    so paid for, are still written.
    """
    sent: deque[Sent] = deque()
    try:
        async for batch in batches:
            sent.append((batch, asyncio.create_task(_embed(batch, client))))
            if len(sent) >= IN_FLIGHT_MAX:
                await _write_first(sent, output, report)
        while sent:
            await _write_first(sent, output, report)
    except BaseException as error:
        if not isinstance(error, OSError):  # an output that failed is not tried again
            while sent and _is_done(sent[0][1]):
                await _write_first(sent, output, report)
        raise
    finally:
        for _, task in sent:
            task.cancel()
        await asyncio.gather(*(task for _, task in sent), return_exceptions=True)


async def _embed(batch: LineBatch, client: BulkClient) -> list[Vector | Refusal]:
    """Request the lines that have a text; the others keep their refusals."""
    vectors = iter(await client.embed([line for line in batch.lines if isinstance(line, bytes)]))
    return [next(vectors) if isinstance(line, bytes) else line for line in batch.lines]


async def _write_first(sent: deque[Sent], output: Stdout | FileOutput, report: Report) -> None:
    batch, task = sent[0]
    outcomes = await task
    sent.popleft()
    output.write(batch, outcomes)
    report(batch, outcomes)


def _is_done(task: asyncio.Task[list[Vector | Refusal]]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
