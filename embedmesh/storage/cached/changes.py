"""What gateways of one store tell each other: what has changed (keys, nodes, prices), and what one wants of all.

Triggers raise a version in the store for each kind of record. A gateway reads the versions every CHANGES_POLL_S; on
PostgreSQL, NOTIFY also wakes it as soon as a change is committed.
"""

import asyncio
from collections.abc import Callable
from typing import Literal, Protocol

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import FACTS_SQL

CHANGES_POLL_S = 0.25  # a revoked key is useless within a second

RecordKind = Literal["keys", "nodes", "prices", "settings", "slots", "tabs"]


class Bell(Protocol):
    """Rings when there may be a change."""

    async def wait(self) -> None:
        """Wait for it, at most CHANGES_POLL_S."""

    def close(self) -> None: ...


class Changes:
    """Calls listeners, on the event loop, when a kind of record has changed. Run `watch` while the gateway runs."""

    def __init__(self, reads: Reads, bell: Bell) -> None:
        self._reads = reads
        self._bell = bell
        self._versions: dict[str, int] = {}
        self._listeners: dict[str, list[Callable[[], None]]] = {}

    def on(self, kind: RecordKind, call: Callable[[], None]) -> None:
        """Have `call` called after each change."""
        self._listeners.setdefault(kind, []).append(call)

    async def look(self) -> None:
        """Look once. Raises StoreUnavailable."""
        first = not self._versions
        for kind, version in await self._reads.ask(FACTS_SQL["all_changes"], {}):
            before = self._versions.get(kind, version if first else 0)  # one that nobody had told of yet
            self._versions[kind] = version
            if version != before:
                for call in self._listeners.get(kind, ()):
                    call()

    async def watch(self) -> None:
        """Look for ever; cancel it."""
        while True:
            await self._bell.wait()
            try:
                await self.look()
            except StoreUnavailable:
                await asyncio.sleep(
                    CHANGES_POLL_S
                )  # nothing can change while the store is away; the writer reports that


class PollTimer:
    """Rings every CHANGES_POLL_S. Implements the protocol `Bell`."""

    async def wait(self) -> None:
        await asyncio.sleep(CHANGES_POLL_S)

    def close(self) -> None:
        """Nothing to release."""
