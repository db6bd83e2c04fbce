"""The queue in front of a model, over a scripted engine: early refusal, order, and dropped work."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from embedmesh.engine.batch_queue import BatchQueue
from embedmesh.engine.isolate import Rows, RowsDone
from embedmesh.rules.errors import NodeBroke, Overloaded

BREAKS = 255  # as first id


class Engine:
    """Answers a batch when it is let; a sequence's vector is its first id, so that mix-ups show."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.free = asyncio.Event()
        self.free.set()
        self.failing = False
        self.runs: set[asyncio.Future[None]] = set()

    async def run(self, sequences: list[list[int]], rows: int, length: int) -> list[bytes | None]:
        self.batches.append(sequences)
        await self.free.wait()
        if self.failing:
            raise NodeBroke("broken")
        return [bytes([sequence[0]]) if sequence[0] != BREAKS else None for sequence in sequences]

    def begin(self, sequences: list[list[int]], rows: int, length: int, done: RowsDone) -> None:
        async def run() -> None:
            try:
                outcome: Rows | NodeBroke = await self.run(sequences, rows, length)
            except NodeBroke as failure:
                outcome = failure
            done(outcome)

        self.runs.add(asyncio.ensure_future(run()))


@asynccontextmanager
async def queueing(engine: Engine, *, tokens_max: int = 1_000_000) -> AsyncIterator[BatchQueue]:
    yield BatchQueue(engine.begin, tokens_max=tokens_max, on_batch=lambda plan, seconds: None)
    engine.free.set()
    await asyncio.gather(*engine.runs)  # no callback has failed


async def settle() -> None:
    """Let every task go as far as it can without the engine."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_vectors_come_back_in_input_order() -> None:
    """Whatever order the batches took."""
    engine = Engine()
    async with queueing(engine) as queue:
        lengths = [3, 200, 17, 256, 90, 4, 4, 130] * 20
        sequences = [[n % 256] * length for n, length in enumerate(lengths)]
        vectors = await queue.embed(sequences)
    assert vectors == [bytes([sequence[0]]) for sequence in sequences]
    assert queue.waiting_tokens == 0


async def test_a_free_engine_gets_work_at_once() -> None:
    engine = Engine()
    async with queueing(engine) as queue:
        engine.free.clear()
        call = asyncio.create_task(queue.embed([[7] * 10]))
        await settle()
        assert engine.batches == [[[7] * 10]]
        behind = asyncio.create_task(queue.embed([[8] * 10]))
        await settle()
        assert queue.calls == (1, 1)  # one waits, one runs
        engine.free.set()
        assert [await call, await behind] == [[b"\x07"], [b"\x08"]]
        assert queue.calls == (0, 0)


async def test_a_full_queue_refuses_at_once_and_says_when_to_return() -> None:
    engine = Engine()
    async with queueing(engine, tokens_max=2_000) as queue:
        engine.free.clear()
        running = asyncio.create_task(queue.embed([[1] * 10]))
        await settle()
        waiting = asyncio.create_task(queue.embed([[2] * 250] * 7))
        await settle()
        assert queue.waiting_tokens == 7 * 256
        with pytest.raises(Overloaded) as refused:
            await queue.embed([[3] * 250])
        assert 0 < refused.value.retry_after_s <= 30
        engine.free.set()
        await asyncio.gather(running, waiting)
        assert queue.waiting_tokens == 0


async def test_a_call_larger_than_the_bound_is_taken_when_nothing_waits() -> None:
    engine = Engine()
    async with queueing(engine, tokens_max=1_024) as queue:
        assert len(await queue.embed([[1] * 250] * 50)) == 50


async def test_work_of_a_caller_who_has_gone_is_dropped() -> None:
    """Only the batch that was running already is computed."""
    engine = Engine()
    async with queueing(engine) as queue:
        engine.free.clear()
        gone = asyncio.create_task(queue.embed([[1] * 250] * 100))
        await settle()
        stays = asyncio.create_task(queue.embed([[2] * 10]))
        await settle()
        gone.cancel()
        await settle()
        assert queue.waiting_tokens == 12
        engine.free.set()
        assert await stays == [b"\x02"]
        await settle()
    assert [len(batch) for batch in engine.batches] == [4, 1]


async def test_a_short_query_passes_bulk_work() -> None:
    engine = Engine()
    async with queueing(engine) as queue:
        engine.free.clear()
        bulk = asyncio.create_task(queue.embed([[1] * 250] * 100))
        await settle()
        query = asyncio.create_task(queue.embed([[2] * 10]))
        await settle()
        engine.free.set()
        await asyncio.gather(query, bulk)
    assert engine.batches.index([[2] * 10]) == 1
    assert len(engine.batches) == 26


async def test_bulk_calls_end_in_the_order_they_came() -> None:
    """Each is done when the tokens before it and its own are: its deadline was set by those."""
    engine = Engine()
    async with queueing(engine) as queue:
        await asyncio.gather(*(queue.embed([[caller] * 250] * 40) for caller in range(5)))
    last_batch = [max(at for at, batch in enumerate(engine.batches) if batch[0][0] == caller) for caller in range(5)]
    for caller, at in enumerate(last_batch):  # ten batches each; the last one runs as a small call, in their turn
        assert at < 10 * (caller + 1) + 1


async def test_a_call_that_runs_alone_has_its_batches_for_itself() -> None:
    """Among calls of all sizes: a vector is the first id, so a batch tells whose rows it has."""
    engine = Engine()
    dice = Random(3)
    alone = {caller for caller in range(60) if dice.random() < 0.4}
    async with queueing(engine) as queue:
        calls = [
            queue.embed(
                [[caller] * dice.choice((4, 9, 30, 200)) for _ in range(dice.choice((1, 1, 3, 40)))],
                alone=caller in alone,
            )
            for caller in range(60)
        ]
        answers = await asyncio.gather(*calls)
    assert all(set(vectors) == {bytes([caller])} for caller, vectors in enumerate(answers))
    batches = [{sequence[0] for sequence in batch} for batch in engine.batches]
    assert all(len(callers) == 1 for callers in batches if callers & alone)
    assert any(len(callers) > 1 for callers in batches)


async def test_a_failed_batch_fails_its_calls_only() -> None:
    engine = Engine()
    async with queueing(engine) as queue:
        engine.failing = True
        with pytest.raises(NodeBroke):
            await queue.embed([[1] * 10])
        engine.failing = False
        assert await queue.embed([[2] * 10]) == [b"\x02"]
        assert queue.waiting_tokens == 0


async def test_who_broke_a_batch_fails_alone() -> None:
    """The others of that batch get their vectors; what else the failed call had waiting is dropped."""
    engine = Engine()
    async with queueing(engine) as queue:
        engine.free.clear()
        running = asyncio.create_task(queue.embed([[1] * 10]))
        await settle()
        texts: list[list[list[int]]] = [[[2] * 10], [[BREAKS] * 10, [3] * 200], [[4] * 10]]
        calls = [asyncio.create_task(queue.embed(sequences)) for sequences in texts]
        await settle()
        engine.free.set()
        outcomes = await asyncio.gather(running, *calls, return_exceptions=True)
        assert queue.waiting_tokens == 0
    assert outcomes[:2] == [[b"\x01"], [b"\x02"]]
    assert isinstance(outcomes[2], NodeBroke)
    assert outcomes[3] == [b"\x04"]


async def test_all_that_is_not_answered_can_be_failed_at_once() -> None:
    """Also a call whose batch is running: nobody may come to tell it."""
    engine = Engine()
    async with queueing(engine) as queue:
        engine.free.clear()
        running = asyncio.create_task(queue.embed([[1] * 10]))
        await settle()
        waiting = asyncio.create_task(queue.embed([[2] * 10]))
        await settle()
        queue.fail_all(NodeBroke("down"))
        outcomes = await asyncio.gather(waiting, running, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [NodeBroke, NodeBroke]
        engine.free.set()
        await queue.idle()
        assert queue.waiting_tokens == 0


async def test_idle_waits_for_the_last_answer() -> None:
    engine = Engine()
    async with queueing(engine) as queue:
        await queue.idle()
        engine.free.clear()
        running = asyncio.create_task(queue.embed([[1] * 10]))
        idle = asyncio.create_task(queue.idle())
        await settle()
        assert not idle.done()
        engine.free.set()
        await running
        await idle
