"""What gateways of one store tell each other: that keys, nodes or prices have changed.

Each topic has a version in the store, which triggers raise. A gateway looks at the versions every LOOK_S; on PostgreSQL
it is also woken by NOTIFY as soon as a change is committed.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import load

KEYS, NODES, PRICES = "keys", "nodes", "prices"
LOOK_S = 0.25  # a revoked key is useless within a second
FIND_TOPICS = load("facts.sql")["all_changes"]

logger = logging.getLogger(__name__)


class Bell(Protocol):
    """Rings when it may be worth to look."""

    async def wait(self) -> None:
        """At most LOOK_S."""
        ...

    def close(self) -> None: ...


class Topics:
    """Calls those who want to know of a topic, on the event loop. Run `watch` as long as the gateway runs."""

    def __init__(self, reads: Reads, bell: Bell) -> None:
        self._reads = reads
        self._bell = bell
        self._versions: dict[str, int] = {}
        self._listeners: dict[str, list[Callable[[], None]]] = {}

    def on(self, topic: str, call: Callable[[], None]) -> None:
        """Have `call` called after each change of a topic."""
        self._listeners.setdefault(topic, []).append(call)

    async def look(self) -> None:
        """Look once. Raises StoreUnavailable."""
        for topic, version in await self._reads.ask(FIND_TOPICS, {}):
            before = self._versions.get(topic, version)
            self._versions[topic] = version
            if version != before:
                for call in self._listeners.get(topic, ()):
                    call()

    async def watch(self) -> None:
        """Look for ever; cancel it."""
        while True:
            await self._bell.wait()
            try:
                await self.look()
            except StoreUnavailable:
                await asyncio.sleep(LOOK_S)  # nothing can change while the store is away; the writer says that it is


class Timer:
    """Rings every LOOK_S. Implements the protocol `Bell`."""

    async def wait(self) -> None:
        await asyncio.sleep(LOOK_S)

    def close(self) -> None:
        """Nothing to let go of."""
