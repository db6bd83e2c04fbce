"""Streams outlive their hold's deadline: every LEASE_EVERY_S one write extends those of all, and notes what they owe.

If the gateway dies, each stream is charged what was noted last, never more than was delivered.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from embedmesh.flow.bill import Bill
from embedmesh.rules.holds import Charge, Noted
from embedmesh.rules.ports import Clock, Ledger

LEASE_EVERY_S = 10.0
LEASE_S = 30.0  # three tries


class Lease(NamedTuple):
    """A stream under way. `charge` says what it owes until now; None as long as that is nothing."""

    bill: Bill
    charge: Callable[[], Charge | None]


class Leases:
    """The streams of one gateway."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._leases: set[Lease] = set()

    def add(self, lease: Lease) -> None:
        """Extend its hold until `remove`."""
        self._leases.add(lease)

    def remove(self, lease: Lease) -> None:
        """It has ended."""
        self._leases.discard(lease)

    async def run(self) -> None:
        """For ever; cancel it."""
        while True:
            await asyncio.sleep(LEASE_EVERY_S)
            self.extend()

    def extend(self) -> None:
        """Extend all holds once."""
        deadline_ms = self._clock.unix_ms() + int(LEASE_S * 1000)
        notes = []
        for lease in self._leases:
            bill = lease.bill
            bill.hold = msgspec.structs.replace(bill.hold, deadline_ms=max(bill.hold.deadline_ms, deadline_ms))
            notes.append(Noted(bill.hold, lease.charge()))
        if notes:
            self._ledger.extend(notes)
