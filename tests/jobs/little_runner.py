"""A runner of batches in a few lines: what every runner has to do, and nothing of models, nodes or HTTP.

Each line costs 10 nano-USD, or fails, as `luck` says, anew for each try.
"""

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.files import FileStore
from embedmesh.rules.batches import (
    Batch,
    BatchLease,
    BatchState,
    BatchUnit,
    FilePurpose,
    FileRow,
    LeaseLost,
    UnitEnd,
    UsedTokens,
)
from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.batch_steps import UnitResults
from embedmesh.storage.store import Store
from tests.storage.batching import ROOM, charge_of, plan_of

PRICE = 10
TRIES_MAX = 5

T = TypeVar("T")


class LittleRunner:
    """A gateway that works on batches."""

    def __init__(self, store: Store, files: FileStore, units: list[BatchUnit], luck: Callable[[], bool]) -> None:
        self.store = store
        self.files = files
        self.units = units
        self.luck = luck

    async def work(self) -> None:
        """Take a batch, if there is one, and bring it as far as it goes."""
        taken = await again(self.store.batches.lease)
        if taken is None:
            return
        lease, batch = taken
        try:
            if batch.state is BatchState.VALIDATING and not self.is_late(batch):
                await self.validate(lease)
            await self.work_off(lease)
            await self.finish(lease)
        except LeaseLost:
            await again(lambda: self.store.batches.release(lease))
        except ContentsLost:  # another gateway has finished the batch, and swept what it was made of
            with suppress(LeaseLost):
                await again(lambda: self.store.batches.renew(lease))
                raise

    def is_late(self, batch: Batch) -> bool:
        return self.store._clock.unix_ms() >= batch.expires_ms

    async def validate(self, lease: BatchLease) -> None:
        batches = self.store.batches
        await again(lambda: batches.clear_units(lease))
        for unit in self.units:
            await again(lambda unit=unit: batches.add_units(lease, [unit]))  # type: ignore[misc]
        await again(lambda: batches.begin(lease, plan_of(self.units, PRICE), bytes_max=ROOM))

    async def work_off(self, lease: BatchLease) -> None:
        batches = self.store.batches
        for unit in await again(lambda: batches.open_units(lease, limit=100)):
            batch = await again(lambda: batches.renew(lease))
            if batch.state is not BatchState.IN_PROGRESS or self.is_late(batch):
                return
            good: list[int] = []
            bad: list[int] = []
            for line in range(unit.first_line, unit.first_line + unit.lines):
                (good if self.luck() else bad).append(line)
            segment = await self.files.write_segment(lease.batch_id, _lines(good), _lines(bad))
            charges = [(line, charge_of(batch.key_id, PRICE)) for line in good]
            used = UsedTokens(input=len(good))
            results = UnitResults(unit.unit, segment, charges, len(good), len(bad), used)
            if await again(lambda results=results: batches.finish_unit(lease, results)) is UnitEnd.NO_MONEY:  # type: ignore[misc]
                return
        if (await again(lambda: batches.renew(lease))).state is BatchState.IN_PROGRESS:
            await again(lambda: batches.finalize(lease))

    async def finish(self, lease: BatchLease) -> None:
        batches, files = self.store.batches, self.files
        batch = await again(lambda: batches.renew(lease))
        done = await again(lambda: batches.done_units(lease, limit=100))
        rest = sorted({unit.unit for unit in self.units} - {each.unit.unit for each in done})
        output = [
            part for each in done async for part in files.read_segment(lease.batch_id, each.segment, errors=False)
        ]
        errors = [part for each in done async for part in files.read_segment(lease.batch_id, each.segment, errors=True)]
        errors += [line for unit in rest for line in _lines(_range(self.units[unit]))] if batch.units else []
        rows = [await self.keep(batch, output), await self.keep(batch, errors)]
        failed = sum(len(part.splitlines()) for part in errors)
        await again(lambda: batches.finish(lease, *rows, failed=failed))
        await files.drop_segments(lease.batch_id)
        await again(lambda: batches.sweep(lease.batch_id))

    async def keep(self, batch: Batch, parts: list[bytes]) -> FileRow | None:
        if not parts:
            return None
        writer = await self.files.create(
            batch.account_id,
            filename=f"{batch.batch_id}.jsonl",
            purpose=FilePurpose.BATCH_OUTPUT,
            expires_s=batch.output_expires_s,
            file_bytes_max=ROOM,
            kept_bytes_max=ROOM,
        )
        for part in parts:
            await writer.write(part)
        return await writer.seal()


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """Say the same until the store answers."""
    for _ in range(TRIES_MAX):
        try:
            return await call()
        except StoreUnavailable:
            continue
    raise AssertionError("the store does not answer")


def _range(unit: BatchUnit) -> list[int]:
    return list(range(unit.first_line, unit.first_line + unit.lines))


def _lines(numbers: list[int]) -> list[bytes]:
    return [json.dumps({"custom_id": number}).encode() + b"\n" for number in numbers]
