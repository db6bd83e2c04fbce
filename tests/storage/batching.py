"""Shorthands for tests of batches: an account with a key and a file, and the steps of a small batch."""

from collections.abc import Sequence

from embedmesh.rules.batches import (
    Batch,
    BatchLease,
    BatchPlan,
    BatchUnit,
    FilePurpose,
    FileRow,
    NewBatch,
    Segment,
    UnitEnd,
    UsedTokens,
)
from embedmesh.rules.holds import Charge, Payable
from embedmesh.storage.batch_steps import UnitResults
from embedmesh.storage.store import Store
from tests.storage.shop import Shop

HOUR_MS = 3_600_000
ROOM = 10**12  # bytes that an account may keep, where that is not what is tested


def new_file(shop: Shop, name: str = "file-1", *, account_id: str = "a", size: int = 100) -> FileRow:
    return FileRow(
        file_id=name,
        account_id=account_id,
        filename="in.jsonl",
        purpose=FilePurpose.BATCH,
        bytes=size,
        created_ms=shop.clock.now_ms,
        expires_ms=shop.clock.now_ms + 30 * 24 * HOUR_MS,
    )


def new_output(shop: Shop, name: str, *, account_id: str = "a") -> FileRow:
    return FileRow(
        file_id=name,
        account_id=account_id,
        filename=f"{name}.jsonl",
        purpose=FilePurpose.BATCH_OUTPUT,
        bytes=10,
        created_ms=shop.clock.now_ms,
        expires_ms=shop.clock.now_ms + 24 * HOUR_MS,
    )


def asks(key_id: str, *, account_id: str = "a", file_id: str = "file-1") -> NewBatch:
    return NewBatch(
        account_id=account_id,
        key_id=key_id,
        input_file_id=file_id,
        endpoint="/v1/embeddings",
        window_s=86_400,
        metadata={"for": "tests"},
        output_expires_s=30 * 86_400,
    )


def new_key(shop: Shop, account_id: str = "a", **limits: int) -> str:
    return shop.books.keys.create(account_id, ["embeddings"], **limits)[0].key_id  # type: ignore[arg-type]


def units_of(lines: Sequence[int]) -> list[BatchUnit]:
    """Units of so many lines each, a line of ten bytes and one token each."""
    units, first = [], 0
    for unit, count in enumerate(lines):
        units.append(BatchUnit(unit, 10 * first, 10 * count, first, count, count))
        first += count
    return units


def plan_of(units: Sequence[BatchUnit], price: int = 10) -> BatchPlan:
    """Each line costs `price` nano-USD."""
    lines = sum(unit.lines for unit in units)
    return BatchPlan(
        model="m",
        prices={"input": price * 1_000_000},
        amount_nanousd=lines * price,
        units=len(units),
        lines=lines,
        output_bytes=100 * lines,
    )


def charge_of(key_id: str, cost: int = 10, payable: int = 3) -> Charge:
    return Charge(
        cost_nanousd=cost,
        tokens=1,
        model="m",
        key_id=key_id,
        node_id="n1",
        price=cost * 1_000_000,
        payables=(Payable("n1", payable),) if payable else (),
    )


def results_of(unit: BatchUnit, key_id: str, *, failing: int = 0, segment: str = "seg", cost: int = 10) -> UnitResults:
    """The first `failing` lines of the unit fail."""
    lines = range(unit.first_line + failing, unit.first_line + unit.lines)
    return UnitResults(
        unit=unit.unit,
        segment=Segment(f"{segment}-{unit.unit}", 20, 5),
        charges=[(line, charge_of(key_id, cost, min(3, cost))) for line in lines],
        completed=len(lines),
        failed=failing,
        used=UsedTokens(input=len(lines)),
    )


async def begun(
    store: Store, shop: Shop, key_id: str, lines: Sequence[int] = (3, 2), price: int = 10
) -> tuple[BatchLease, list[BatchUnit]]:
    """A batch in progress, of a file that is added where it is not there."""
    if await store.files.find("a", "file-1") is None:
        await store.files.add(new_file(shop), bytes_max=ROOM)
    await store.batches.create(asks(key_id))
    taken = await store.batches.lease()
    assert taken is not None
    lease, units = taken[0], units_of(lines)
    await store.batches.add_units(lease, units)
    await store.batches.begin(lease, plan_of(units, price), bytes_max=ROOM)
    return lease, units


async def work_off(
    store: Store, lease: BatchLease, units: Sequence[BatchUnit], key_id: str, *, failing: int = 0
) -> None:
    for unit in units:
        assert await store.batches.finish_unit(lease, results_of(unit, key_id, failing=failing)) is UnitEnd.DONE


async def completed(store: Store, shop: Shop, lease: BatchLease, *, failed: int = 0) -> Batch:
    await store.batches.finalize(lease)
    output = new_output(shop, f"file-out-{lease.batch_id}")
    errors = new_output(shop, f"file-err-{lease.batch_id}") if failed else None
    return await store.batches.finish(lease, output, errors, failed=failed)


BREAKING_JOBS = [
    ("jobs_have_their_money", "UPDATE tabs SET owner = 'gw_1'"),
    ("jobs_have_their_money", "UPDATE jobs SET closed_ms = 1"),
    ("jobs_are_their_requests", "UPDATE job_requests SET amount = amount + 1"),
    ("jobs_are_their_requests", "UPDATE job_requests SET amount = 1000 WHERE done_ms IS NULL"),
    ("jobs_are_their_requests", "UPDATE jobs SET texts = texts + 1"),
    ("jobs_are_their_requests", "UPDATE jobs SET tokens = tokens + 1"),
    ("jobs_are_their_requests", "DELETE FROM job_requests WHERE done_ms IS NOT NULL"),
    ("keys_of_jobs_are_charged", "UPDATE usage SET hold_id = 'req_1'"),
]
BREAKING_BATCHES = [
    ("batches_have_their_money", "UPDATE tabs SET amount = amount + 1"),
    ("batches_have_their_money", "UPDATE tabs SET owner = 'gw_1'"),
    ("batches_have_their_money", "UPDATE tabs SET key_id = 'another'"),
    ("batches_have_their_money", "UPDATE batches SET in_progress_ms = NULL"),
    ("batches_have_their_money", "UPDATE batches SET state = 'completed', ended_ms = 1"),
    ("batches_have_their_money", "DELETE FROM tabs"),
    ("batches_are_charged_by_line", "UPDATE batches SET cost = cost - 1"),
    ("batches_are_charged_by_line", "UPDATE batches SET charged = charged + 1"),
    ("batches_are_charged_by_line", "UPDATE batches SET completed = 0"),
    ("batches_are_their_units", "UPDATE batches SET completed = completed + 1"),
    ("batches_are_their_units", "UPDATE batches SET failed = failed + 1"),
    ("batches_are_their_units", "UPDATE batch_units SET cost = cost + 1 WHERE state = 'done'"),
    ("batches_are_their_units", "DELETE FROM batch_units WHERE state = 'open'"),
    ("batches_are_their_units", "UPDATE batches SET total = total + 1"),
    ("lines_are_of_their_batch", "UPDATE usage SET hold_id = 'req_1' WHERE hold_id = (SELECT min(hold_id) FROM usage)"),
]
"""Promises of batches, and what breaks them once the schema's defences are down."""
