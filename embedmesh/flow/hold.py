"""Money set aside for one request, and the promise that this ends once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from embedmesh.rules.holds import HOLD_GRACE_S, WRITE_REPLY_S, Charge, Hold, HoldEnd
from embedmesh.rules.ids import new_id
from embedmesh.rules.ports import Caller, Clock, Ledger


class Bill:
    """What the hold will be charged for. Without a charge it is released."""

    charge: Charge | None = None


def place_hold(caller: Caller, cost: int, within_s: float, clock: Clock) -> Hold:
    """A hold of `cost` nano-USD that lasts as long as the request may, and its reply may take to leave."""
    lasts_s = within_s + WRITE_REPLY_S + HOLD_GRACE_S
    return Hold(
        hold_id=new_id("req", clock),
        account_id=caller.account_id,
        amount_nanousd=cost,
        deadline_ms=clock.unix_ms() + int(lasts_s * 1000),
    )


@asynccontextmanager
async def held(ledger: Ledger, hold: Hold) -> AsyncIterator[Bill]:
    """Durably hold the money, then capture it if the block set a charge, else release it, whatever happened.

    Raises InsufficientQuota or StoreUnavailable before the block runs.
    """
    bill = Bill()
    await ledger.hold(hold)
    try:
        yield bill
    finally:
        if bill.charge is not None:
            ledger.capture(hold, bill.charge)
        else:
            ledger.release(hold, HoldEnd.RELEASE)
