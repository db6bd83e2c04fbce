"""Money set aside for one request, and the promise that it ends once: captured or released."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import msgspec

from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.errors import DeadlineExceeded, IdempotencyConflict
from embedmesh.rules.forwarding import Share
from embedmesh.rules.holds import NOT_TOKENS, Charge, Claim, Hold, HoldEnd, HoldState, Meter, Metered, PriorRequest
from embedmesh.rules.ids import id_at
from embedmesh.rules.limits import HOLD_GRACE_S, IDEMPOTENCY_WAITERS_MAX, WRITE_REPLY_S
from embedmesh.rules.lock_failures import LockUsed
from embedmesh.rules.money import bill_nanousd
from embedmesh.rules.ports import Caller, Clock, Ledger, Slots
from embedmesh.rules.shares import Room

LOOK_AGAIN_S = (0.02, 0.05, 0.1, 0.25)  # s, between two looks for the reply of the first request; the last repeats
OPEN = "open"
AFTER_MS = int((WRITE_REPLY_S + HOLD_GRACE_S) * 1000)  # of a hold beyond the time for the work
INPUT = Meter.INPUT  # an enum's member is slow to look up
IS_OPEN, CAPTURED = HoldState.OPEN, HoldState.CAPTURED

Redeem = Callable[[bytes, int], Awaitable[Hold | PriorRequest]]
"""Use a lock for a request of that body hash until that deadline, in Unix milliseconds: see `Locks.redeem`."""


class HoldEnds(Protocol):
    """Ends holds: as much of a ledger as a bill needs."""

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        """See `Ledger`."""
        ...

    def release(self, hold: Hold, why: HoldEnd) -> None:
        """See `Ledger`."""
        ...


class Holds(HoldEnds, Protocol):
    """Places them, too: as much of a ledger as `set_aside` needs."""

    def spend(self, hold: Hold) -> Hold | None:
        """See `Ledger`."""
        ...

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        """See `Ledger`."""
        ...

    async def prior_request(self, hold: Hold, claim: Claim) -> PriorRequest | None:
        """See `Ledger`."""
        ...


class Bill(msgspec.Struct, eq=False):
    """Money set aside for one request, and what the request owes of it so far. It ends once: captured or released.

    The work runs inside `with bill:`. If it raises, the bill is released; if it returns without having said what it
    owes, that is a bug and the bill is released, too. After the work the bill belongs to the reply that it pays for.
    What goes straight owes all that was set aside, which is said when its bill is made.
    """

    ledger: HoldEnds
    hold: Hold
    until: float  # when the work must be done, on the monotonic clock
    state: HoldState = HoldState.OPEN
    metered: tuple[Metered, ...] | None = None
    shares: tuple[Share, ...] = ()
    cost: int = 0  # nano-USD
    tokens: int = 0
    price: int | None = None  # of all tokens, where nothing but input at one price is metered
    _give_back: Callable[[], None] | None = None  # the request's slots
    free: bool = False  # whatever it is for was paid before

    def __enter__(self) -> "Bill":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.release()
        elif self.metered is None:
            self.release()
            raise RuntimeError("an operation returned without saying what it owes")

    def has_slots(self, slots: Slots, caller: Caller) -> None:
        """The request has taken them: they are given back when the bill ends."""
        self._give_back = partial(slots.give_back, caller)

    def owe(self, *metered: Metered, shares: tuple[Share, ...]) -> None:
        """Say what the request costs: all of it until now. `shares` are the nodes' parts, the largest first.

        Raises ValueError if that is more than was set aside.
        """
        if self.free:
            metered = tuple(msgspec.structs.replace(each, price=0) for each in metered)
        cost = bill_nanousd(metered)
        if cost > self.hold.amount_nanousd:
            raise ValueError("a request cannot owe more than was set aside for it")
        self.metered, self.shares, self.cost = metered, shares, cost
        self.tokens = sum_of_tokens(metered)
        self.price = metered[0].price if len(metered) == 1 and metered[0].meter is INPUT else None

    def check_time(self, clock: Clock) -> None:
        """Raise DeadlineExceeded if the hold may end before the reply is read: then nobody would pay."""
        if self.state is HoldState.OPEN and clock.unix_ms() + WRITE_REPLY_S * 1000 > self.hold.deadline_ms:
            raise DeadlineExceeded("The reply was not fetched in time. Send the request again.")

    @property
    def captured(self) -> bool:
        """Whether it was charged."""
        return self.state is HoldState.CAPTURED

    def capture(self, charge: Charge, reply: bytes | None = None) -> bool:
        """Some of the reply was handed to the caller. Returns whether this was the bill's end."""
        if self.state is not IS_OPEN:
            return False
        self.state = CAPTURED
        if self._give_back is not None:
            self._give_back()
        self.ledger.capture(self.hold, charge, reply)
        return True

    def release(self) -> None:
        """Nothing of a reply was handed over, or we broke it off."""
        if self.state is HoldState.OPEN:
            self.state = HoldState.RELEASED
            if self._give_back is not None:
                self._give_back()
            self.ledger.release(self.hold, HoldEnd.RELEASE)


def sum_of_tokens(metered: tuple[Metered, ...]) -> int:
    """Tokens of all meters; images and searches are not counted in tokens."""
    tokens = 0
    for each in metered:
        if each.meter not in NOT_TOKENS:
            tokens += each.quantity
    return tokens


def waiters() -> Room:
    """Room for requests that wait for the reply to another with the same `Idempotency-Key`."""
    return Room(
        IDEMPOTENCY_WAITERS_MAX,
        f"At most {IDEMPOTENCY_WAITERS_MAX} requests may wait for the first with their Idempotency-Key, each account "
        "up to a share. Try again shortly.",
    )


async def set_aside(
    ledger: Holds,
    caller: Caller,
    cost: int,
    within_s: float,
    clock: Clock,
    claim: Claim | None = None,
    waiting: Room | None = None,
    *,
    slots: Slots | None = None,
    request_id: str | None = None,
    alone: bool = False,
) -> Bill | bytes:
    """Hold `cost` nano-USD until the request and the delivery must be over, under `request_id` or a new id.

    A request without a claim takes them from an open tab of its key, if there is one that covers them; one that must
    stand `alone` does not: it may outlive a tab.
    A request with an `Idempotency-Key` has a `claim`. If another request had it before, the kept reply to that one is
    returned; one that is still under way is waited for, up to `within_s`, in the room `waiting`. If that one ends
    without a reply, this request takes its place. Where the key has a limit of requests at one time, one of its `slots`
    is taken, and given back when the bill ends.

    Raises InsufficientQuota, RateLimited, StoreUnavailable, IdempotencyConflict, Overloaded or DeadlineExceeded.
    """
    waiting = waiting or waiters()
    limited = slots if caller.slots else None
    until = clock.monotonic() + within_s
    while True:
        hold = new_hold(request_id, caller, cost, within_s, clock)
        if limited is None:
            found = await _hold(ledger, hold, claim, alone)
        else:
            found = await _place(ledger, hold, claim, alone, limited, caller)
        if isinstance(found, Hold):
            bill = Bill(ledger, found, until)
            if limited is not None:
                bill.has_slots(limited, caller)
            return bill
        assert claim is not None
        reply = _kept_reply(found, claim)
        if reply is None:
            waiting.take(caller.account_id)
            try:
                reply = await _reply_of(found, ledger, hold, claim, until, clock)
            finally:
                waiting.give_back(caller.account_id)
        if reply is not None:
            return reply


async def redeem(
    ledger: Ledger,
    use: Redeem,
    terms: LockTerms,
    claim: Claim,
    caller: Caller,
    within_s: float,
    clock: Clock,
    waiting: Room,
    slots: Slots,
    *,
    streams: bool = False,
) -> Bill | bytes:
    """The bill that a lock pays, once: its money is set aside already. The same request again gets the kept reply.

    That of one still under way is waited for, up to `within_s`, unless it `streams`: then none is kept. Raises
    LockUsed, LockExpired, RateLimited, StoreUnavailable, Overloaded or DeadlineExceeded.
    """
    until = clock.monotonic() + within_s
    wanted = new_hold(terms.hold_id, caller, 0, within_s, clock)
    limited = slots if caller.slots else None
    if limited is not None:
        await _take(limited, caller, wanted)
    found: Hold | PriorRequest | None = None
    try:
        found = await use(claim.body_hash, wanted.deadline_ms)
    finally:
        if limited is not None and not isinstance(found, Hold):
            limited.give_back(caller)
    if isinstance(found, Hold):
        bill = Bill(ledger, found, until)
        if limited is not None:
            bill.has_slots(limited, caller)
        return bill
    if streams:
        raise LockUsed("The lock was used by this request before, and streams are not kept. Lock again.")
    waiting.take(caller.account_id)
    try:
        reply = await _reply_of(found, ledger, wanted, claim, until, clock)
    finally:
        waiting.give_back(caller.account_id)
    if reply is None:
        raise LockUsed("The lock was used by this request before, and its reply is not kept. Lock again.")
    return reply


async def _hold(ledger: Holds, hold: Hold, claim: Claim | None, alone: bool) -> Hold | PriorRequest:
    """Set the money aside: as a part of a tab, or by itself. A prior request has the claim, if one has."""
    if claim is None and not alone and (spent := ledger.spend(hold)) is not None:
        return spent
    return await ledger.hold(hold, claim) or hold


async def _place(
    ledger: Holds, hold: Hold, claim: Claim | None, alone: bool, slots: Slots, caller: Caller
) -> Hold | PriorRequest:
    """Set the money aside and take slots, both or neither. A request that waits for a prior one needs none."""
    if claim is not None:
        found = await _hold(ledger, hold, claim, alone)
        if found is hold:
            try:
                await _take(slots, caller, hold)
            except BaseException:
                ledger.release(hold, HoldEnd.RELEASE)
                raise
        return found
    await _take(slots, caller, hold)
    try:
        return await _hold(ledger, hold, None, alone)
    except BaseException:
        slots.give_back(caller)
        raise


async def _take(slots: Slots, caller: Caller, hold: Hold) -> None:
    if not slots.take_now(caller, hold.deadline_ms):
        await slots.take(caller, hold.deadline_ms)


def _kept_reply(prior: PriorRequest, claim: Claim) -> bytes | None:
    """The kept reply, or None if there is none yet. Raises IdempotencyConflict."""
    if prior.body_hash != claim.body_hash:
        raise IdempotencyConflict(
            "This Idempotency-Key was used for another body within the last 24 hours. Use a new key for a new body."
        )
    return prior.reply


async def _reply_of(
    prior: PriorRequest | None, ledger: Holds, hold: Hold, claim: Claim, until: float, clock: Clock
) -> bytes | None:
    """The reply to the request that has the claim, once it is delivered; None if it ended without one."""
    looks = iter(LOOK_AGAIN_S)
    pause_s = 0.0
    while prior is not None:
        if (reply := _kept_reply(prior, claim)) is not None:
            return reply
        if clock.monotonic() > until:
            raise DeadlineExceeded("The first request with this Idempotency-Key is still under way. Try again later.")
        pause_s = next(looks, pause_s)
        await asyncio.sleep(pause_s)
        if prior.state != OPEN:
            return None  # it failed, or its gateway died
        prior = await ledger.prior_request(hold, claim)
    return None  # its hold was refused, or it was forgotten


def new_hold(hold_id: str | None, caller: Caller, cost: int, within_s: float, clock: Clock) -> Hold:
    """A hold that lasts until the reply to a request of `within_s` seconds must be written. None: under a new id."""
    now_ms = clock.unix_ms()
    return Hold(
        hold_id=hold_id or id_at("req", now_ms),
        account_id=caller.account_id,
        amount_nanousd=cost,
        deadline_ms=now_ms + int(within_s * 1000) + AFTER_MS,
        key_id=caller.key_id,
    )
