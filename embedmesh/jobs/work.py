"""What is done with one batch while its lease lasts: validation, units, the end.

Whatever the store, the disk or object storage cannot do now is tried again, until the lease is lost or the batch's own
time is over.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from embedmesh.fleet.leftover import Leftover
from embedmesh.flow.operation import Operation
from embedmesh.flow.world import World
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.endpoints import Endpoints, at_prices, sum_of_used, token_price
from embedmesh.jobs.files import READ_AT_ONCE_BYTES, FileStore
from embedmesh.jobs.finish import write_outputs
from embedmesh.jobs.unit import LineResult, Stopping, UnitWork
from embedmesh.jobs.validate import BadFile, BatchTerms, Validation
from embedmesh.rules.batches import Batch, BatchLease, BatchPlan, BatchState, BatchUnit, LeaseLost, LineError, UnitEnd
from embedmesh.rules.errors import Failure, InsufficientQuota, Retry
from embedmesh.rules.file_failures import TooMuchKept
from embedmesh.rules.metrics import MetricReadings
from embedmesh.rules.ports import Caller, Catalogue
from embedmesh.rules.shares import Shares
from embedmesh.storage.batch_steps import UnitResults
from embedmesh.storage.batches import Batches

log = logging.getLogger("embedmesh.jobs")

UNITS_OF_BATCH_MAX = 3  # while one is written and settled, nodes have the next
UNITS_A_LOOK = 16
AGAIN_FIRST_S, AGAIN_MAX_S = 0.25, 5.0  # between two tries of the store or the disk
SHARE_LOOK_S = 0.1  # at whether there is room for one more unit, or validation
NODES_LOOK_S = 1.0  # at whether the model has a node again
LOST_S = 600.0  # for a unit whose results were lost: then its lines are told to be
NO_NODE_S = 60.0  # without any, after which a unit gives its room to others

T = TypeVar("T")


class BatchCounts:
    """What the batches of one gateway came to since its start, by the names of its metrics."""

    def __init__(self, on_bug: Callable[[], object]) -> None:
        self.on_bug = on_bug  # called for each bug of ours that a batch meets
        self._ended: Counter[tuple[str, ...]] = Counter()
        self._lines: Counter[tuple[str, ...]] = Counter()
        self._tokens: Counter[tuple[str, ...]] = Counter()
        self._nanousd: Counter[tuple[str, ...]] = Counter()

    def ended(self, state: BatchState) -> None:
        """A batch is over."""
        self._ended[state.value,] += 1

    def settled(self, model: str, unit: UnitResults) -> None:
        """A unit is done and charged."""
        self._lines[model, "completed"] += unit.completed
        self._lines[model, "failed"] += unit.failed
        self._tokens[model,] += unit.used.input + unit.used.output
        self._nanousd[model,] += sum(charge.cost_nanousd for _, charge in unit.charges)

    def readings(self) -> MetricReadings:
        """All of it."""
        return {
            "batches_ended": self._ended,
            "batch_lines": self._lines,
            "batch_tokens": self._tokens,
            "batch_charged_nanousd": self._nanousd,
        }


OfBatch = Callable[[Operation, str], Operation]
"""The operation for the lines of the batch of that id."""


def as_it_is(operation: Operation, batch_id: str) -> Operation:
    """The endpoint's own."""
    return operation


class BatchTools(NamedTuple):
    """What the work on any batch of one gateway needs. `world` is the one for lines, `known` the models of batches.

    `validations` and `units` are how many there may be at one time; each account has a share.
    """

    batches: Batches
    files: FileStore
    world: World
    endpoints: Endpoints
    leftover: Leftover
    terms: BatchTerms
    known: Catalogue
    validations: Shares
    units: Shares
    counts: BatchCounts
    of_batch: OfBatch = as_it_is


class BatchWork:
    """The work on one batch."""

    def __init__(self, tools: BatchTools, lease: BatchLease, batch: Batch, stopping: Stopping) -> None:
        self._tools = tools
        self._batches, self._files, self._world = tools.batches, tools.files, tools.world
        self._lease = lease
        self._batch = batch
        self._stopping = stopping
        self._lost = Stopping()  # of units whose results were lost
        self._operation = tools.of_batch(tools.endpoints[batch.endpoint], batch.batch_id)
        self._caller = Caller(batch.account_id, batch.key_id, frozenset((self._operation.scope,)))

    async def advance(self) -> None:
        """Move the batch on until it has ended. Raises LeaseLost."""
        while not self._batch.state.final:
            if self._batch.state is BatchState.CANCELLING:
                self._stopping.stop("batch_cancelled")
            elif self._world.clock.unix_ms() >= self._batch.expires_ms:
                self._stopping.stop("batch_expired")
            try:
                self._batch = await again(self._step)
            except LeaseLost:  # or it was cancelled meanwhile
                self._batch = await again(lambda: self._batches.renew(self._lease))
                await asyncio.sleep(AGAIN_FIRST_S)
        log.info("batch %s: %s", self._batch.batch_id, self._batch.state.value)
        self._tools.counts.ended(self._batch.state)
        await self._files.drop_segments(self._batch.batch_id)

    async def _step(self) -> Batch:
        state = self._batch.state
        if self._stopping.stops() and state is not BatchState.FINALIZING:
            return await self._end()
        if state is BatchState.VALIDATING:
            async with self._share(self._tools.validations) as may:
                return await self._validate() if may else self._batch
        if state is BatchState.IN_PROGRESS:
            await self._work_units()
            if self._stopping.stops():
                return await self._end()
            return await again(lambda: self._batches.finalize(self._lease))
        return await self._end()

    # -- validation

    async def _validate(self) -> Batch:
        batch, lease = self._batch, self._lease
        await again(lambda: self._batches.clear_units(lease))

        async def add(units: Sequence[BatchUnit]) -> None:
            await again(lambda: self._batches.add_units(lease, units))

        terms, on_bug = self._tools.terms, self._tools.counts.on_bug
        validation = Validation(self._world, self._operation, batch.endpoint, self._caller, terms, add, on_bug)

        async def plan_file() -> BatchPlan:
            async with aclosing(self._files.read(batch.input_file_id, at_once=READ_AT_ONCE_BYTES)) as pieces:
                return await validation.plan(pieces)

        reading = asyncio.create_task(plan_file())
        stopped = self._stopping.future()
        try:
            either: list[asyncio.Future[Any]] = [reading, stopped]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return await again(lambda: self._batches.renew(lease))
            plan = reading.result()
            model = self._world.catalogue.find(plan.model)
            price = 0 if model is None else token_price(plan.prices, model)  # gone since: its lines will fail
            bytes_max = await again(lambda: self._files.bytes_for_output(batch.account_id, price))
            return await again(lambda: self._batches.begin(lease, plan, bytes_max=bytes_max))
        except BadFile as bad:
            return await self._fail(bad.errors, bad.total)
        except ContentsLost:
            return await self._fail((LineError("input_file_lost", "The input file cannot be read. Upload it again."),))
        except (InsufficientQuota, TooMuchKept) as failure:
            return await self._fail((LineError(failure.code, failure.message),))
        finally:
            stopped.cancel()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _fail(self, errors: tuple[LineError, ...], total: int = 0) -> Batch:
        return await again(lambda: self._batches.fail(self._lease, errors, total=total))

    # -- work

    async def _work_units(self) -> None:
        """Work off all units that are open, or until the batch is to stop. Raises LeaseLost."""
        work = self._unit_work(self._stopping)
        under_way: dict[int, asyncio.Task[None]] = {}
        try:
            after = -1
            while not self._stopping.stops():
                units = await self._open_units(after)
                if not units:
                    if not under_way and after < 0:
                        return  # none is open
                    await _ended(under_way, 0)
                    after = -1  # one that gave up its room is open still
                    continue
                for unit in units:
                    await _ended(under_way, UNITS_OF_BATCH_MAX - 1)
                    if self._stopping.stops():
                        break
                    under_way[unit.unit] = asyncio.create_task(self._unit(work, unit))
                after = units[-1].unit
            await _ended(under_way, 0)
        finally:
            for task in under_way.values():
                task.cancel()
            await asyncio.gather(*under_way.values(), return_exceptions=True)

    async def _open_units(self, after: int) -> list[BatchUnit]:
        return await again(lambda: self._batches.open_units(self._lease, after=after, limit=UNITS_A_LOOK))

    async def _unit(self, work: UnitWork, unit: BatchUnit) -> None:
        """Work off one unit and settle it, once there is room and a node. One that has no node for long is given up."""
        await self._until_served()
        async with self._share(self._tools.units) as may:
            if not may:
                return
            doing = asyncio.create_task(self._do(work, unit))
            left_s = NO_NODE_S
            try:
                while not doing.done() and left_s > 0:
                    await asyncio.wait([doing], timeout=NODES_LOOK_S)
                    left_s = NO_NODE_S if self._served else left_s - NODES_LOOK_S
                if doing.done():
                    doing.result()
            finally:
                doing.cancel()
                await asyncio.gather(doing, return_exceptions=True)

    async def _do(self, work: UnitWork, unit: BatchUnit) -> None:
        batch = self._batch
        try:
            results = await again(lambda: self._results(work, unit))
        except ContentsLost:
            log.critical("batch %s: its input file is lost; it is cancelled", batch.batch_id)
            await again(lambda: self._batches.cancel(batch.account_id, batch.batch_id))
            self._stopping.stop("batch_cancelled")
            return
        output = [each.output for each in results if each.output is not None]
        errors = [each.error for each in results if each.error is not None]
        segment = await again(lambda: self._files.write_segment(batch.batch_id, output, errors))
        used = sum_of_used([each.used for each in results])
        charges = [(unit.first_line + at, each.charge) for at, each in enumerate(results) if each.charge is not None]
        whole = UnitResults(unit.unit, segment, charges, len(output), len(errors), used)
        end = await again(lambda: self._batches.finish_unit(self._lease, whole))
        if end is UnitEnd.DONE:
            self._tools.counts.settled(batch.model or "", whole)
        elif end is UnitEnd.NO_MONEY:
            self._stopping.stop("batch_expired")

    @asynccontextmanager
    async def _share(self, shares: Shares) -> AsyncIterator[bool]:
        """One of what accounts share, once it can be had; False: the batch is to stop."""
        while not self._stopping.stops() and not shares.take(self._batch.account_id):
            await self._stopping.pause(SHARE_LOOK_S)
        if self._stopping.stops():
            yield False
            return
        try:
            yield True
        finally:
            shares.give_back(self._batch.account_id)

    @property
    def _served(self) -> bool:
        model = self._tools.known.find(self._batch.model or "")
        return model is not None and self._tools.leftover.scheduler.serves(model)

    async def _until_served(self) -> None:
        while not self._served and not self._stopping.stops():
            await self._stopping.pause(NODES_LOOK_S)

    # -- the end

    async def _end(self) -> Batch:
        """Write the output files, and end the batch."""
        code = self._stopping.code or "batch_cancelled"
        output, errors, failed = await again(
            lambda: write_outputs(self._batches, self._files, self._lease, self._batch, code, self._do_again)
        )
        return await again(lambda: self._batches.finish(self._lease, output, errors, failed=failed))

    async def _do_again(self, unit: BatchUnit) -> list[LineResult]:
        """The results of a unit that was paid, once more, and free. Raises ContentsLost."""
        late = asyncio.get_running_loop().call_later(LOST_S, self._lost.stop, "results_lost")
        try:
            return await self._results(self._unit_work(self._lost), unit)
        finally:
            late.cancel()

    def _unit_work(self, stopping: Stopping) -> UnitWork:
        world = at_prices(self._world, self._batch.prices, self._tools.known)
        leftover, on_bug = self._tools.leftover, self._tools.counts.on_bug
        return UnitWork(world, self._operation, self._batch, self._caller, leftover, stopping, on_bug)

    async def _results(self, work: UnitWork, unit: BatchUnit) -> list[LineResult]:
        """Raises ContentsLost, StorageFull."""
        first, stop = unit.first_byte, unit.first_byte + unit.bytes
        lines = self._files.read(self._batch.input_file_id, first, stop, READ_AT_ONCE_BYTES)
        async with aclosing(lines):
            return await work.results(unit, lines)


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """The result of some work; what cannot be done now is tried again. Raises any other Failure, and LeaseLost.

    It ends by being cancelled at the latest, when the lease is lost.
    """
    pause_s = AGAIN_FIRST_S
    while True:
        try:
            return await work()
        except Failure as failure:
            if failure.retry is not Retry.LATER:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, AGAIN_MAX_S)


async def _ended(tasks: "dict[int, asyncio.Task[None]]", left_max: int) -> None:
    """Wait until no more than that run. Raises what one of them has raised."""
    while True:
        for unit in [unit for unit, task in tasks.items() if task.done()]:
            tasks.pop(unit).result()
        if len(tasks) <= left_max:
            return
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
