"""The validation of a batch: its file is read once, line by line; then its price is known, and its units.

What is wrong with the form of a line (JSON, `custom_id`, `method`, `url`, the model) fails the whole batch, and nothing
is done. A request that the endpoint itself would refuse, such as a text that is too long, fails alone: its line is
answered in the error file, and costs nothing.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

from embedmesh.flow.operation import Bound, Operation
from embedmesh.flow.world import World
from embedmesh.jobs.endpoints import CountedLine, at_prices, counted_line, prices_now
from embedmesh.jobs.lines import BadLine, BatchLine, FoundLine, LineFinder, model_named, read_line
from embedmesh.jobs.seen_ids import SeenIds
from embedmesh.jobs.unit import where
from embedmesh.rules.batches import PRICE_RATIO_PPM, BatchPlan, BatchUnit, LineError
from embedmesh.rules.errors import Failure, Overloaded
from embedmesh.rules.limits import (
    BATCH_ERRORS_MAX,
    BATCH_INPUTS_MAX,
    BATCH_LINES_MAX,
    UNIT_BYTES_MAX,
    UNIT_LINES_MAX,
    UNIT_REPLY_BYTES_MAX,
    UNIT_TOKENS_MAX,
)
from embedmesh.rules.models import Model
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD, bill_nanousd
from embedmesh.rules.ports import Caller

UNITS_A_WRITE = 64  # so that little is kept here, and few writes are made
FRAME_BYTES = 512  # of a line of the output besides the reply and the `custom_id`, which may take six bytes a character
COUNT_AGAIN_S = 0.5  # until a line is counted again that there was no room for

log = logging.getLogger("embedmesh.jobs")

AddUnits = Callable[[Sequence[BatchUnit]], Awaitable[None]]


class BatchTerms(NamedTuple):
    """What an operator lets a batch be, and how much of the ordinary price it costs, in millionths."""

    lines_max: int = BATCH_LINES_MAX
    inputs_max: int = BATCH_INPUTS_MAX
    ratio_ppm: int = PRICE_RATIO_PPM


class BadFile(Exception):
    """The file is refused: `errors` say why."""

    def __init__(self, *errors: LineError, total: int = 0) -> None:
        super().__init__("the file is not right")
        self.errors = errors
        self.total = total  # lines that were read


class Validation:
    """The validation of one batch, as far as it is."""

    def __init__(
        self,
        world: World,
        operation: Operation,
        endpoint: str,
        caller: Caller,
        terms: BatchTerms,
        add_units: AddUnits,
        on_bug: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_bug` is called for each bug of ours."""
        self._world = world
        self._on_bug = on_bug
        self._operation = operation
        self._endpoint = endpoint
        self._caller = caller
        self._terms = terms
        self._add_units = add_units
        self._seen = SeenIds()
        self._cutter = UnitCutter()
        self._errors: list[LineError] = []
        self._model: Model | None = None
        self._prices: dict[str, int] = {}
        self._lines = self._inputs = self._amount = self._output_bytes = self._units = 0

    async def plan(self, pieces: AsyncIterator[bytes]) -> BatchPlan:
        """Read the whole file. Raises BadFile, and what reading it and adding units raise."""
        finder = LineFinder()
        async for piece in pieces:
            for found in finder.feed(piece):
                await self._take(found)
        for found in finder.end():
            await self._take(found)
        if self._errors:
            raise BadFile(*self._errors, total=self._lines)
        if self._model is None:
            raise BadFile(LineError("empty_file", "The file has no line. Give it one request a line."))
        if self._amount > AMOUNT_MAX_NANOUSD:
            raise BadFile(LineError("amount_too_large", "All lines together cost more than any account can have."))
        self._cutter.end()
        await self._add(all_of_them=True)
        return BatchPlan(
            model=self._model.id,
            prices=self._prices,
            amount_nanousd=self._amount,
            units=self._units,
            lines=self._lines,
            output_bytes=self._output_bytes,
        )

    async def _take(self, found: FoundLine) -> None:
        await asyncio.sleep(0)  # whatever else there is to do comes between two lines
        if self._lines == self._terms.lines_max:
            message = f"The file has more than {self._terms.lines_max:,} lines. Split it over several batches."
            raise BadFile(LineError("too_many_lines", message), total=self._lines)
        self._lines += 1
        try:
            line = read_line(found.data, self._endpoint)
            if not self._seen.add(line.custom_id):
                raise BadLine("duplicate_custom_id", "An earlier line has the same `custom_id`.", "custom_id")
            self._check_model(line)
        except BadLine as bad:
            self._errors.append(bad.at(found.row))
            if len(self._errors) == BATCH_ERRORS_MAX:
                raise BadFile(*self._errors, total=self._lines) from None
            return
        if self._errors:
            return  # nothing will be done: what it would cost does not matter
        await self._count(found, line)

    def _check_model(self, line: BatchLine) -> None:
        """Raises BadLine."""
        name = model_named(line.body)
        if name is None:
            raise BadLine("missing_required_parameter", "`body` names no `model`.", "body.model")
        model = self._world.catalogue.find(name)
        if model is None:
            message = "There is no model of that name here. GET /v1/models lists all."
            raise BadLine("model_not_found", message, "body.model")
        if self._model is None:
            if self._caller.models is not None and model.id not in self._caller.models:
                raise BadLine("insufficient_scope", "The batch's API key may not use this model.", "body.model")
            self._model = model
            self._prices = prices_now(self._world.prices, model, self._caller.account_id, self._terms.ratio_ppm)
            self._world = at_prices(self._world, self._prices)
        elif model.id != self._model.id:
            raise BadLine("mismatched_model", "The lines above are for another model. A batch has one.", "body.model")

    async def _count(self, found: FoundLine, line: BatchLine) -> None:
        assert found.data is not None
        tokens = reply_bytes = 0
        if (both := await self._counted(line)) is not None:
            counted, bound = both
            self._inputs += counted.inputs
            if self._inputs > self._terms.inputs_max:
                message = f"All lines together have more than {self._terms.inputs_max:,} inputs. Split the file."
                raise BadFile(LineError("too_many_inputs", message, found.row), total=self._lines)
            self._amount += bill_nanousd(bound.metered)
            tokens, reply_bytes = counted.tokens, counted.call.reply_bytes_max
        size = reply_bytes + FRAME_BYTES + 6 * len(line.custom_id)
        self._output_bytes += size
        self._cutter.add(found.start, len(found.data), tokens, size)
        await self._add()

    async def _counted(self, line: BatchLine) -> tuple[CountedLine, Bound] | None:
        """None for a request that will be refused."""
        while True:
            try:
                counted = await counted_line(self._world, self._operation, self._caller, line.body)
                return counted, counted.call.bound(self._world, self._caller, claimed=True)
            except Overloaded:
                await asyncio.sleep(COUNT_AGAIN_S)
            except Failure:
                return None
            except Exception as error:  # noqa: BLE001 - a bug of ours: that line fails when its turn comes, no other does
                self._on_bug()
                log.error("internal error: %s", where(error))
                return None

    async def _add(self, *, all_of_them: bool = False) -> None:
        """Hand over units that are whole, many at a time."""
        ready = self._cutter.ready
        while len(ready) >= UNITS_A_WRITE or (all_of_them and ready):
            units = ready[:UNITS_A_WRITE]
            del ready[:UNITS_A_WRITE]
            await self._add_units(units)
            self._units += len(units)


class UnitCutter:
    """Cuts the lines of a file into units. `ready` are those that are whole."""

    def __init__(self) -> None:
        self.ready: list[BatchUnit] = []
        self._made = 0
        self._first_line = self._lines = 0
        self._first_byte = self._end = 0
        self._tokens = self._reply_bytes = 0

    def add(self, start: int, size: int, tokens: int, reply_bytes: int) -> None:
        """The next line, which begins at the byte `start`."""
        if self._lines and (
            self._lines == UNIT_LINES_MAX
            or self._tokens + tokens > UNIT_TOKENS_MAX
            or self._reply_bytes + reply_bytes > UNIT_REPLY_BYTES_MAX
            or start + size - self._first_byte > UNIT_BYTES_MAX
        ):
            self.end()
        if not self._lines:
            self._first_byte = start
        self._lines += 1
        self._end = start + size
        self._tokens += tokens
        self._reply_bytes += reply_bytes

    def end(self) -> None:
        """The lines so far are a unit."""
        if not self._lines:
            return
        size = self._end - self._first_byte
        self.ready.append(BatchUnit(self._made, self._first_byte, size, self._first_line, self._lines, self._tokens))
        self._made += 1
        self._first_line += self._lines
        self._lines = self._tokens = self._reply_bytes = 0
