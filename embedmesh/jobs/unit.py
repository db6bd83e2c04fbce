"""One unit of a batch: its lines go through the spine's own steps, each in a turn of its own, and their results are put
together for the step that charges them.

Nothing is written here. What ends before that step was not charged, and is done again.
"""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from embedmesh.fleet.leftover import Leftover, NodeTurn
from embedmesh.fleet.slices import FleetOfTurn
from embedmesh.flow.bill import Bill
from embedmesh.flow.deliver import Request, charge_of, work_under
from embedmesh.flow.operation import Bound, Operation
from embedmesh.flow.world import World
from embedmesh.http.failures import envelope, status_and_type
from embedmesh.jobs.endpoints import CountedLine, counted_line, used_tokens
from embedmesh.jobs.lines import BadLine, BatchLine, LineFinder, read_line
from embedmesh.rules.batches import Batch, BatchUnit, UsedTokens, line_request_id
from embedmesh.rules.errors import BadNodeResponse, Failure, InternalError, ModelNotFound, Overloaded, Retry
from embedmesh.rules.exchange import Reply, RequestHead
from embedmesh.rules.holds import Charge, Hold, HoldEnd, Meter
from embedmesh.rules.money import bill_nanousd
from embedmesh.rules.ports import Caller

log = logging.getLogger("embedmesh.jobs")

WRONG_ANSWERS_MAX = 3  # of one line: each comes after several nodes have failed at it
AGAIN_FIRST_S, AGAIN_MAX_S = 0.25, 10.0  # between two tries of a line: a node that restarts is back in a second
INPUT_WAITS_S = 2.0  # each input of a large line may need a turn of its own, and a turn comes once a second at least
ROOM_AGAIN_S = 0.05  # until the reply to a line is tried again that there was no room for
HEAD = RequestHead()


class LineResult(NamedTuple):
    """A line of the output file, or of the error file; what it is charged."""

    output: bytes | None
    error: bytes | None
    charge: Charge | None = None
    used: UsedTokens = UsedTokens()


class StoppedLine(Exception):
    """The batch was cancelled, or its time is over, before the line had its turn."""


class CollectedCharge:
    """In place of the ledger for a line's bill, which is charged with the unit. Implements the protocol `HoldEnds`."""

    def __init__(self) -> None:
        self.charge: Charge | None = None

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        self.charge = charge

    def release(self, hold: Hold, why: HoldEnd) -> None: ...


class Stopping:
    """That a batch is to begin nothing more, and why: the code for its lines that are not done."""

    def __init__(self) -> None:
        self.code = ""
        self.waiting: set[asyncio.Future[None]] = set()  # those that are told

    def stop(self, code: str) -> None:
        """Lines that wait for their turn give up."""
        self.code = self.code or code
        for each in list(self.waiting):
            _tell(each)

    def stops(self) -> bool:
        """Whether nothing more is to begin."""
        return bool(self.code)

    def future(self) -> "asyncio.Future[None]":
        """A future that is done when the batch is to stop. It is to be awaited, or cancelled."""
        made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.add(made)
        made.add_done_callback(self.waiting.discard)
        if self.code:
            _tell(made)
        return made

    async def pause(self, seconds: float) -> None:
        """Wait that long, or until the batch is to stop."""
        over = self.future()
        timer = asyncio.get_running_loop().call_later(seconds, _tell, over)
        try:
            await over
        finally:
            timer.cancel()


class UnitWork:
    """Works off units of one batch."""

    def __init__(
        self,
        world: World,
        operation: Operation,
        batch: Batch,
        caller: Caller,
        leftover: Leftover,
        stopping: Stopping,
        on_bug: Callable[[], object] = lambda: None,
    ) -> None:
        """`world` has the batch's prices. `on_bug` is called for each bug of ours."""
        self._world = world
        self._operation = operation
        self._batch = batch
        self._caller = caller
        self._leftover = leftover
        self._stopping = stopping
        self._feeding = asyncio.Lock()
        self._on_bug = on_bug

    async def results(self, unit: BatchUnit, pieces: AsyncIterator[bytes]) -> list[LineResult]:
        """The results of all lines of a unit, in their order; `pieces` are its bytes."""
        tasks: list[asyncio.Task[LineResult]] = []
        finder = LineFinder(unit.first_byte)
        try:
            async with self._feeding:  # lines wait for their turns in order, and the first unit is done first
                async for piece in pieces:
                    for found in finder.feed(piece):
                        tasks.append(self._begin(unit, len(tasks), found.data))
                        await asyncio.sleep(0)  # each line takes its moment of the loop by itself
                for found in finder.end():
                    tasks.append(self._begin(unit, len(tasks), found.data))
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, unit: BatchUnit, at: int, data: bytes | None) -> asyncio.Task[LineResult]:
        return asyncio.create_task(self._result(unit.first_line + at, data))

    async def _result(self, line_number: int, data: bytes | None) -> LineResult:
        line = read_line(data, self._batch.endpoint)
        request_id = line_request_id(self._batch.batch_id, line_number)
        try:
            counted = await self._counted(line)
            return await self._tries(line, counted, request_id)
        except StoppedLine:
            return LineResult(None, undone_line(self._batch.batch_id, line_number, line.custom_id, self._stopping.code))
        except Failure as failure:
            return LineResult(None, _refused_line(request_id, line.custom_id, failure))
        except Exception as error:  # noqa: BLE001 - a bug of ours: this line fails, the others do not
            self._on_bug()
            log.error("internal error: %s [%s]", where(error), request_id, extra={"request_id": request_id})
            return LineResult(None, _refused_line(request_id, line.custom_id, InternalError("A bug of ours.")))

    async def _counted(self, line: BatchLine) -> CountedLine:
        """Raises the Failure that the line ends with, and StoppedLine."""
        while True:
            try:
                counted = await counted_line(self._world, self._operation, self._caller, line.body)
                model = counted.call.model
                if model.id != self._batch.model:  # the catalogue has changed: its prices are others, too
                    raise ModelNotFound("The name means another model now than when the batch began.", param="model")
                if (model.search_price is None) == (Meter.SEARCHES.value in self._batch.prices):
                    raise ModelNotFound("The model is paid in another way than when the batch began.", param="model")
                return counted
            except Overloaded:
                await self._pause(ROOM_AGAIN_S)

    async def _tries(self, line: BatchLine, counted: CountedLine, request_id: str) -> LineResult:
        """Try until the line is answered, or is known to fail. Raises StoppedLine, or the Failure that it ends with."""
        again_s, wrong_answers, tries = AGAIN_FIRST_S, 0, 0
        bound = counted.call.bound(self._world, self._caller, claimed=True)
        while True:
            try:
                tries += 1
                return await self._try(line, counted, bound, request_id, again=tries > 1)
            except Failure as failure:
                wrong_answers += isinstance(failure, BadNodeResponse)
                if failure.retry is not Retry.LATER or wrong_answers == WRONG_ANSWERS_MAX:
                    raise
            await self._pause(again_s)
            again_s = min(2 * again_s, AGAIN_MAX_S)

    async def _try(
        self, line: BatchLine, counted: CountedLine, bound: Bound, request_id: str, *, again: bool
    ) -> LineResult:
        caller, call = self._caller, counted.call
        turn, size = await self._turn(counted, again=again)
        world = msgspec.structs.replace(self._world, fleet=FleetOfTurn(self._leftover, turn))
        try:
            amount, until_ms = bill_nanousd(bound.metered), self._batch.expires_ms
            hold = Hold(request_id, caller.account_id, amount, until_ms, caller.key_id)
            ledger, now = CollectedCharge(), world.clock.monotonic()
            bill = Bill(ledger, hold, now + bound.within_s + INPUT_WAITS_S * counted.inputs)
            request = Request(now, caller, HEAD, line.body, call, self._operation)
            done = await work_under(world, request, bill)
            assert isinstance(done.reply, Reply)  # no line is a stream
            bill.capture(charge_of(world, caller, call, bill))
            assert bill.metered is not None
            output = _answered_line(request_id, line.custom_id, done.reply.body)
            return LineResult(output, None, ledger.charge, used_tokens(bill.metered))
        finally:
            turn.over()
            world.replies.give_back(caller.account_id, size)

    async def _turn(self, counted: CountedLine, *, again: bool) -> tuple[NodeTurn, int]:
        """A turn, and the bytes of room that were taken for the reply. Raises StoppedLine.

        The room is taken last: what waits for a turn, perhaps for hours, leaves it to requests of the same account.
        """
        account_id, size = self._caller.account_id, counted.call.reply_bytes_max
        while True:
            if self._stopping.code:
                raise StoppedLine
            began = self._stopping.future()
            begin = partial(_tell, began)
            turn = self._leftover.wait(account_id, counted.call.model, counted.tokens, begin, again=again)
            try:
                await began
                if turn.node_id is None:
                    raise StoppedLine
                if self._world.replies.take(account_id, size):
                    return turn, size
            except BaseException:
                turn.over()
                raise
            turn.over()
            await self._pause(ROOM_AGAIN_S)
            again = True

    async def _pause(self, seconds: float) -> None:
        """Raises StoppedLine as soon as the batch is to stop."""
        await self._stopping.pause(seconds)
        if self._stopping.code:
            raise StoppedLine


def undone_line(batch_id: str, line_number: int, custom_id: str, code: str) -> bytes:
    """The line of the error file for one that was not done: `batch_cancelled`, `batch_expired`."""
    error = LineNotDone(code, WHY_NOT_DONE[code])
    return _encoded(_id_of(line_request_id(batch_id, line_number)), custom_id, None, error)


async def undone_lines(batch: Batch, unit: BatchUnit, pieces: AsyncIterator[bytes], code: str) -> list[bytes]:
    """The lines of the error file for a unit that was not done."""
    finder = LineFinder(unit.first_byte)
    undone: list[bytes] = []

    def add(found_lines: Sequence[bytes | None]) -> None:
        for data in found_lines:
            try:
                custom_id = read_line(data, batch.endpoint).custom_id
            except BadLine:  # of a batch whose validation did not see its end
                continue
            undone.append(undone_line(batch.batch_id, unit.first_line + len(undone), custom_id, code))

    async for piece in pieces:
        add([found.data for found in finder.feed(piece)])
    add([found.data for found in finder.end()])
    return undone


class LineNotDone(msgspec.Struct):
    """Why a line has no response."""

    code: str
    message: str


WHY_NOT_DONE = {
    "batch_cancelled": "The batch was cancelled before this line was done. It costs nothing.",
    "batch_expired": "The batch's time was over before this line was done. It costs nothing. Send it again.",
    "results_lost": "The result of this line was lost on the gateway's disk, and could not be made again in time. If "
    "the line was answered, it was charged: ask the operator for a credit, and send it again.",
}


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _ResultLine(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: LineNotDone | None


ENCODE = msgspec.json.Encoder().encode


def _answered_line(request_id: str, custom_id: str, body: bytes) -> bytes:
    return _encoded(_id_of(request_id), custom_id, _Response(200, request_id, msgspec.Raw(body)), None)


def _refused_line(request_id: str, custom_id: str, failure: Failure) -> bytes:
    status, _ = status_and_type(failure)
    return _encoded(_id_of(request_id), custom_id, _Response(status, request_id, msgspec.Raw(envelope(failure))), None)


def _encoded(line_id: str, custom_id: str, response: _Response | None, error: LineNotDone | None) -> bytes:
    return ENCODE(_ResultLine(line_id, custom_id, response, error)) + b"\n"


def _id_of(request_id: str) -> str:
    return "batch_" + request_id


def where(error: BaseException) -> str:
    """The type of an error and the place where it was raised, without values: for the log."""
    last = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    place = f"{last.filename.rpartition('/')[2]}:{last.lineno}" if last is not None else "?"
    return f"{type(error).__name__} at {place}"


def _tell(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
