"""The money of one request: what its hold says, that it ends once, and the wait for the reply of a prior."""

import asyncio
import re
from collections.abc import Callable
from itertools import repeat

import msgspec
import pytest

from embedmesh.flow.bill import Bill, set_aside
from embedmesh.rules.errors import DeadlineExceeded, IdempotencyConflict, Overloaded
from embedmesh.rules.forwarding import Share
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, Meter, Metered, PriorRequest
from embedmesh.rules.ports import Caller
from embedmesh.rules.shares import Room
from tests.flow.world import Clock, MemoryLedger

CALLER = Caller("acct", "key_1", frozenset())
HOLD = Hold("req_1", "acct", 7, 0)
CHARGE = Charge(cost_nanousd=5, tokens=1, model="m", key_id="key_1", node_id="n1")
CLAIM = Claim(b"k" * 32, b"b" * 32)
UNDER_WAY = PriorRequest(CLAIM.body_hash, "req_0", "open", None)
DONE = PriorRequest(CLAIM.body_hash, "req_0", "captured", b"the reply")
OF_ANOTHER_BODY = PriorRequest(b"c" * 32, "req_0", "open", None)


class PriorLedger(MemoryLedger):
    """Finds the prior requests of a script, one a question; remembers what it was asked and how holds ended."""

    def __init__(self, *found: PriorRequest | None) -> None:
        super().__init__()
        self._found = iter(found)
        self.asked: list[tuple[str, Hold]] = []
        self.ended: list[tuple[object, ...]] = []

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        self.asked.append(("hold", hold))
        return next(self._found)

    async def prior_request(self, hold: Hold, claim: Claim) -> PriorRequest | None:
        self.asked.append(("prior", hold))
        return next(self._found)

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        self.ended.append((hold, charge, reply))

    def release(self, hold: Hold, why: HoldEnd) -> None:
        self.ended.append((hold, why))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pauses(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made: they take no time, and move the clock."""
    made: list[float] = []

    async def sleep(pause_s: float) -> None:
        made.append(pause_s)
        clock.now += pause_s

    monkeypatch.setattr("embedmesh.flow.bill.asyncio.sleep", sleep)
    return made


async def test_a_hold_says_whose_it_is_and_lasts_until_the_reply_has_left(clock: Clock) -> None:
    """As long as the request may take, 20 seconds for its reply to leave, and 5 of grace."""
    held = await set_aside(PriorLedger(None), CALLER, 7, 30.0, clock)
    assert isinstance(held, Bill)
    assert re.fullmatch("req_[0-9a-f]{32}", held.hold.hold_id)
    assert held.hold == Hold(held.hold.hold_id, "acct", 7, clock.unix_ms() + 55_000, "key_1")


@pytest.mark.parametrize(
    ("end", "written"),
    [
        (lambda held: held.release(), (HOLD, HoldEnd.RELEASE)),
        (lambda held: held.capture(CHARGE, b"the reply"), (HOLD, CHARGE, b"the reply")),
    ],
    ids=["release", "capture"],
)
def test_whatever_is_said_after_the_end_changes_nothing(
    end: Callable[[Bill], None], written: tuple[object, ...]
) -> None:
    ledger = PriorLedger()
    held = Bill(ledger, HOLD, until=0.0)
    end(held)
    held.release()
    held.capture(CHARGE)
    assert ledger.ended == [written]


def test_a_bill_whose_work_fails_or_owes_nothing_is_released() -> None:
    """So a bill that is neither captured nor released cannot be left behind by an operation."""
    for error, raised in (
        (ValueError, ValueError),
        (asyncio.CancelledError, asyncio.CancelledError),
        (None, RuntimeError),
    ):
        ledger = PriorLedger()
        with pytest.raises(raised), Bill(ledger, HOLD, until=0.0):
            if error is not None:
                raise error
        assert ledger.ended == [(HOLD, HoldEnd.RELEASE)]


def test_no_more_can_be_owed_than_was_set_aside_and_what_is_said_last_counts() -> None:
    """Several meters are added up exactly and rounded up once."""
    bill = Bill(PriorLedger(), HOLD, until=0.0)
    share = (Share("n0", 3),)
    bill.owe(Metered(Meter.INPUT, 1, 100_000), Metered(Meter.OUTPUT, 1, 100_000), shares=share)
    assert bill.cost == 1
    bill.owe(Metered(Meter.INPUT, HOLD.amount_nanousd, 1_000_000), shares=share)
    assert (bill.cost, bill.tokens) == (HOLD.amount_nanousd, HOLD.amount_nanousd)
    with pytest.raises(ValueError, match="more than was set aside"):
        bill.owe(Metered(Meter.INPUT, HOLD.amount_nanousd, 1_000_001), shares=share)
    assert bill.cost == HOLD.amount_nanousd


async def test_who_waits_asks_less_and_less_often(clock: Clock, pauses: list[float]) -> None:
    """For the prior of its own hold, as often as it takes; no other hold is placed."""
    ledger = PriorLedger(*repeat(UNDER_WAY, 6), DONE)
    assert await set_aside(ledger, CALLER, 7, 30.0, clock, CLAIM) == DONE.reply
    own = ledger.asked[0][1]
    assert own.account_id == "acct"
    assert ledger.asked == [("hold", own), *[("prior", own)] * 6]
    assert pauses == [0.02, 0.05, 0.1, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("in_time", [True, False])
async def test_a_reply_is_waited_for_to_the_last_moment(
    clock: Clock, pauses: list[float], monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    """At the very end of its time a request looks once more, and after it no more."""
    monkeypatch.setattr("embedmesh.flow.bill.LOOK_AGAIN_S", (0.5,))
    ledger = PriorLedger(UNDER_WAY, UNDER_WAY, UNDER_WAY, DONE if in_time else UNDER_WAY)
    if in_time:
        assert await set_aside(ledger, CALLER, 7, 1.0, clock, CLAIM) == DONE.reply
    else:
        with pytest.raises(DeadlineExceeded) as told:
            await set_aside(ledger, CALLER, 7, 1.0, clock, CLAIM)
        assert told.value.message == (
            "The first request with this Idempotency-Key is still under way. Try again later."
        )
    assert pauses == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("found", [[OF_ANOTHER_BODY], [UNDER_WAY, OF_ANOTHER_BODY]], ids=["at once", "meanwhile"])
async def test_a_key_that_another_body_has_is_a_conflict(
    clock: Clock, pauses: list[float], found: list[PriorRequest]
) -> None:
    """Whether it had it when the request came, or has got it since."""
    with pytest.raises(IdempotencyConflict) as told:
        await set_aside(PriorLedger(*found), CALLER, 7, 30.0, clock, CLAIM)
    assert told.value.message == (
        "This Idempotency-Key was used for another body within the last 24 hours. Use a new key for a new body."
    )


async def test_a_twin_that_is_gone_makes_room(clock: Clock, pauses: list[float]) -> None:
    """Its hold was refused, or it was forgotten: this request takes its place."""
    ledger = PriorLedger(UNDER_WAY, None, None)
    held = await set_aside(ledger, CALLER, 7, 30.0, clock, CLAIM)
    assert isinstance(held, Bill)
    assert [what for what, _ in ledger.asked] == ["hold", "prior", "hold"]
    assert len(pauses) == 1


async def test_those_of_one_account_that_wait_leave_places_for_others(clock: Clock) -> None:
    """Those beyond are refused at once, without a look at the store; who has its answer needs no place."""
    room, gate = Room(10, "full"), asyncio.Event()

    class Slow(PriorLedger):
        async def prior_request(self, hold: Hold, claim: Claim) -> PriorRequest | None:
            await gate.wait()
            return DONE

    def ask(ledger: PriorLedger, account: str) -> "asyncio.Task[Bill | bytes]":
        caller = msgspec.structs.replace(CALLER, account_id=account)
        return asyncio.create_task(set_aside(ledger, caller, 7, 30.0, clock, CLAIM, room))

    waiting = [ask(Slow(UNDER_WAY), "a") for _ in range(8)]
    await asyncio.sleep(0)
    beyond = PriorLedger(UNDER_WAY)
    with pytest.raises(Overloaded):
        await ask(beyond, "a")
    assert [what for what, _ in beyond.asked] == ["hold"]
    assert await ask(PriorLedger(DONE), "a") == DONE.reply
    with pytest.raises(IdempotencyConflict):
        await ask(PriorLedger(OF_ANOTHER_BODY), "a")
    waiting.append(ask(Slow(UNDER_WAY), "b"))
    await asyncio.sleep(0)
    waiting.pop(0).cancel()
    gate.set()
    assert await asyncio.gather(*waiting) == [DONE.reply] * 8
    assert room.taken == 0
