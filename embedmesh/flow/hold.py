"""Money set aside for one request, and the promise that this ends once."""

import asyncio

from embedmesh.rules.errors import DeadlineExceeded, IdempotencyConflict
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, HoldState, PriorRequest
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import HOLD_GRACE_S, WRITE_REPLY_S
from embedmesh.rules.ports import Caller, Clock, Ledger
from embedmesh.rules.shares import Room

LOOK_AGAIN_S = (0.02, 0.05, 0.1, 0.25)  # s, for the reply of a prior that is under way; the last again and again
OPEN = "open"
WAITERS_MAX = 128  # who waits asks the store four times a second


class Held:
    """A hold that is durable. It ends once: whatever is said after that changes nothing."""

    def __init__(self, ledger: Ledger, hold: Hold) -> None:
        self.hold = hold
        self.state = HoldState.OPEN
        self._ledger = ledger

    def check_time(self, clock: Clock) -> None:
        """Raise DeadlineExceeded where it might end by itself before a reply was read: then nobody would pay."""
        if self.state is HoldState.OPEN and clock.unix_ms() + WRITE_REPLY_S * 1000 > self.hold.deadline_ms:
            raise DeadlineExceeded("The reply was not fetched in time. Ask again.")

    def capture(self, charge: Charge, reply: bytes | None = None) -> None:
        """Something of the reply was handed to the caller."""
        if self.state is HoldState.OPEN:
            self.state = HoldState.CAPTURED
            self._ledger.capture(self.hold, charge, reply)

    def release(self) -> None:
        """Nothing of a reply was handed over, or we broke it off."""
        if self.state is HoldState.OPEN:
            self.state = HoldState.RELEASED
            self._ledger.release(self.hold, HoldEnd.RELEASE)


def waiters() -> Room:
    """Places for requests that wait for the reply of another with their `Idempotency-Key`."""
    return Room(
        WAITERS_MAX,
        f"{WAITERS_MAX} requests at one time may wait for the first with their Idempotency-Key, of each account a "
        "share of that. Try again shortly.",
    )


async def hold_money(
    ledger: Ledger,
    caller: Caller,
    cost: int,
    within_s: float,
    clock: Clock,
    claim: Claim | None = None,
    waiting: Room | None = None,
    *,
    request_id: str | None = None,
) -> Held | bytes:
    """Hold `cost` nano-USD for as long as the request may take, and its reply to leave; under `request_id` or a new id.

    For a request with an `Idempotency-Key`, its `claim`: the reply that was kept of the one that had it before, if
    there was one. One that is still under way is waited for, up to `within_s`; where it ends without a reply this one
    takes its place. Who waits has a place of those in `waiting`.

    Raises InsufficientQuota, RateLimited, StoreUnavailable, IdempotencyConflict, Overloaded or DeadlineExceeded.
    """
    waiting = waiting or waiters()
    until = clock.monotonic() + within_s
    while True:
        hold = _new(request_id or new_id("req", clock), caller, cost, within_s, clock)
        prior = await ledger.hold(hold, claim)
        if prior is None or claim is None:
            return Held(ledger, hold)
        reply = _kept_reply(prior, claim)
        if reply is None:
            waiting.take(caller.account_id)
            try:
                reply = await _reply_of(prior, ledger, hold, claim, until, clock)
            finally:
                waiting.give_back(caller.account_id)
        if reply is not None:
            return reply


def _kept_reply(prior: PriorRequest, claim: Claim) -> bytes | None:
    """None where it has none yet. Raises IdempotencyConflict."""
    if prior.body_hash != claim.body_hash:
        raise IdempotencyConflict(
            "This Idempotency-Key was used for another body within the last 24 hours. Use a new key for a new one."
        )
    return prior.reply


async def _reply_of(
    prior: PriorRequest | None, ledger: Ledger, hold: Hold, claim: Claim, until: float, clock: Clock
) -> bytes | None:
    """The reply of the request that has the claim, once it is delivered; None where it ended without one."""
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


def _new(hold_id: str, caller: Caller, cost: int, within_s: float, clock: Clock) -> Hold:
    lasts_s = within_s + WRITE_REPLY_S + HOLD_GRACE_S
    return Hold(
        hold_id=hold_id,
        account_id=caller.account_id,
        amount_nanousd=cost,
        deadline_ms=clock.unix_ms() + int(lasts_s * 1000),
        key_id=caller.key_id,
    )
