"""Streams outlive their hold's deadline: every LEASE_EVERY_S one write extends those of all, and notes what they owe.

If the gateway dies, each stream is charged what was noted last, never more than was delivered.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from embedmesh.flow.bill import Bill
from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.holds import Charge, StreamNote
from embedmesh.rules.ports import Clock, Ledger

LEASE_EVERY_S = 10.0
LEASE_AGAIN_S = 1.0  # after a try in vain
LEASE_S = 30.0  # the store may be away for 17 of them, whenever that begins


class StreamLease(NamedTuple):
    """A stream under way. `charge` says what it owes until now; `lost` is called once its hold has ended without it."""

    bill: Bill
    charge: Callable[[], Charge]
    lost: Callable[[], None]


class Leases:
    """The streams of one gateway. Run `run` while it runs."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._leases: dict[str, StreamLease] = {}  # by the hold's id

    def add(self, lease: StreamLease) -> None:
        """Extend its hold until `remove`."""
        self._leases[lease.bill.hold.hold_id] = lease

    def remove(self, hold_id: str) -> None:
        """It has ended."""
        self._leases.pop(hold_id, None)

    async def run(self) -> None:
        """For ever; cancel it."""
        while True:
            try:
                await self.extend()
                await asyncio.sleep(LEASE_EVERY_S)
            except StoreUnavailable:
                await asyncio.sleep(LEASE_AGAIN_S)

    async def extend(self) -> None:
        """Extend all holds once. Where one has ended meanwhile, its stream ends, too.

        Raises StoreUnavailable.
        """
        until_ms = self._clock.unix_ms() + int(LEASE_S * 1000)
        notes = [StreamNote(lease.bill.hold, lease.charge(), until_ms) for lease in self._leases.values()]
        if not notes:
            return
        extended = await self._ledger.extend(notes)
        for note in notes:
            hold_id = note.hold.hold_id
            if (lease := self._leases.get(hold_id)) is None:
                continue  # it has ended meanwhile
            if hold_id in extended:
                lease.bill.hold = msgspec.structs.replace(lease.bill.hold, deadline_ms=until_ms)
            else:  # the store was away for longer than its hold: what went on now would be unpaid
                self.remove(hold_id)
                lease.lost()
