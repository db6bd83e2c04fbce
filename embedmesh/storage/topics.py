"""What gateways of one store tell each other: that keys, nodes or prices have changed.

Each topic has a version in the store, which triggers raise. A gateway looks at the versions every LOOK_S; on PostgreSQL
it is also woken by NOTIFY as soon as a change is committed.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import psycopg

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.db import ERRORS
from embedmesh.storage.medium import reconnected
from embedmesh.storage.postgres import PostgresDb, PostgresEngine
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import load

KEYS, NODES, PRICES = "keys", "nodes", "prices"
LOOK_S = 0.25  # a revoked key is useless within a second
FIND_TOPICS = load("facts.sql")["topics"]

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


class Listener:
    """Rings as soon as a change is committed. Implements the protocol `Bell` over a PostgreSQL session of its own."""

    def __init__(self, engine: PostgresEngine, db: PostgresDb) -> None:
        self._engine = engine
        self._db = db
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="listen")
        self._listening = False

    async def wait(self) -> None:
        try:
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._wait))
        except ERRORS:
            await asyncio.sleep(LOOK_S)

    def close(self) -> None:
        self._thread.submit(self._db.close)
        self._thread.shutdown(wait=False)

    def _wait(self) -> None:
        if self._db.lost:
            self._db.close()
            self._listening = False
            self._db = reconnected(self._engine)
        if not self._listening:
            self._db.connection.execute("LISTEN embedmesh")
            self._listening = True
        try:
            for _ in self._db.connection.notifies(timeout=LOOK_S, stop_after=1):
                return
        except psycopg.Error:
            self._db.close()
            raise
