"""The gateway's side of the store: the ports Keys, Ledger, Prices, RateLimits, Slots and Locks, over either kind.

One connection writes, in batches (see ledger.group_commit); others read. Any number of gateways may use one store: what
they have to agree on is in it. What a gateway has in memory, it reads again after another has changed it (see
cached.changes).
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from embedmesh.deadline import within
from embedmesh.rules.acts import Act, Actor
from embedmesh.rules.errors import InsufficientQuota, RateLimited, StoreAway, StoreUnavailable
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, PriorRequest, StreamNote
from embedmesh.rules.ports import Clock
from embedmesh.storage.batches import Batches
from embedmesh.storage.cached.changes import Changes
from embedmesh.storage.cached.keys import KeyRing
from embedmesh.storage.cached.prices import PriceList
from embedmesh.storage.cached.rate_limits import LeasedRateLimits
from embedmesh.storage.cached.slots import LeasedSlots
from embedmesh.storage.db import Db, OnFatal
from embedmesh.storage.engines import engine_of
from embedmesh.storage.files import FileRows
from embedmesh.storage.instance import take_instance
from embedmesh.storage.jobs import StoredJobs
from embedmesh.storage.ledger import chain
from embedmesh.storage.ledger.acts import ActedChange
from embedmesh.storage.ledger.batch import BATCH_WRITES_MAX
from embedmesh.storage.ledger.end_hold import EXPIRED_HOLDS_MAX, EndHold, Expire
from embedmesh.storage.ledger.extend_holds import ExtendHolds
from embedmesh.storage.ledger.group_commit import Writer
from embedmesh.storage.ledger.locks import StoredLocks
from embedmesh.storage.ledger.open_tab import RecallTabs
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.recalls import Recalls
from embedmesh.storage.ledger.room import Recall, available_nanousd
from embedmesh.storage.ledger.tab_keeper import TabKeeper
from embedmesh.storage.ledger.writes import Change, Stats, WaitedWrite
from embedmesh.storage.nodes import NodeBooks
from embedmesh.storage.opening import Opened, open_sqlite
from embedmesh.storage.secrets.sealed import Seal
from embedmesh.storage.secrets.secret import SecretOf
from embedmesh.storage.sql import CLAIMS_SQL, TABS_SQL
from embedmesh.storage.sqlite.database import LOCK_WAIT_S, SqliteEngine
from embedmesh.storage.upkeep import Retention, upkeep

WRITE_WAIT_S = 1.5  # a hold that is not durable by then is refused; callers hear within 2 s of a store that is away
LAST_TRY_S = 0.3  # of a hold that has waited for tabs: enough for a commit, and still within those 2 s
DRAIN_WAIT_S = 5.0  # a disk that does not answer must not keep us from ending; the next start recovers
REPLY = "idempotent reply"

T = TypeVar("T")


class Store:
    """The store of one gateway. `stats` counts what became durable."""

    def __init__(
        self,
        opened: Opened,
        *,
        clock: Clock,
        key_secret: bytes,
        retention: Retention,
        on_fatal: OnFatal,
    ) -> None:
        self._opened = opened
        self._clock = clock
        self._retention = retention
        self.key_secret = key_secret
        self._seal = Seal(key_secret)
        left = opened.recovered
        self.stats = Stats(recovered=left.holds, captured_at_notes=left.noted, tabs_recovered=left.tabs)
        self._noted: set[str] = set()  # ids of holds that may have a note: it is deleted when they end
        self._reads = opened.reads
        self._writer = Writer(opened.medium(clock), clock, self.stats, on_fatal)
        self.changes = Changes(self._reads, opened.bell)
        self.keys = KeyRing(opened.key_reads, self._writer, self.changes, clock, key_secret)
        self.prices = PriceList(self._reads, self.changes, clock)
        self.rate_limits = LeasedRateLimits(self._write, clock)
        self.slots = LeasedSlots(self._outcome, opened.instance.name, self._reads, self.changes, clock)
        self.nodes = NodeBooks(self._reads, self._act, clock, key_secret)
        self.tabs = TabKeeper(self._writer, clock, opened.instance.name, self.stats, self._capture_exact)
        self._recalls = Recalls(self._recall_tabs, self._own_tabs, self.tabs, clock)
        self.locks = StoredLocks(
            self._writer, self._reads, clock, opened.instance.name, key_secret,
            place=self._place, redeem=self._outcome, unsealed=self._unsealed,
        )  # fmt: skip
        submit = self._writer.submit
        self.files = FileRows(self._reads, self._write, submit, clock)
        self.batches = Batches(
            self._reads, self._write, submit, self._outcome, self._place, opened.instance.name, clock
        )
        self.jobs = StoredJobs(
            self._reads, self._write, submit, self._outcome, self._place, opened.instance.name, clock
        )
        self.changes.on("tabs", self._recalls.tabs_changed)
        self.changes.on("keys", self._recalls.keys_changed)
        # Of the port Ledger, without a call of its own.
        self.has_tab, self.spend, self.capture = self.tabs.has_tab, self.tabs.spend, self.tabs.capture

    @classmethod
    async def open(
        cls,
        dsn: str | Path,
        *,
        folder: Path,
        clock: Clock,
        secret: SecretOf,
        retention: Retention | None = None,
        on_fatal: OnFatal = lambda reason: None,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> "Store":
        """Open or make the store, and release what this gateway left open before. Raises SetupError.

        `dsn` is an SQLite file or a `postgresql://` address; `folder` keeps this gateway's name. A gateway that is
        alone on an SQLite store brings it to this version, verifies it if another did not close it, and releases what
        dead ones left open. `on_fatal(reason)` is called once if the disk can no longer be trusted; the process should
        then exit without a word to its callers.
        """
        engine = engine_of(dsn)
        instance = take_instance(folder, clock)
        try:
            key_secret = await asyncio.to_thread(secret, engine)
            if isinstance(engine, SqliteEngine):
                opened = await open_sqlite(engine, instance, key_secret, clock, lock_wait_s)
            else:
                from embedmesh.storage.postgres.database import PostgresEngine
                from embedmesh.storage.postgres.gateway import open_postgres

                assert isinstance(engine, PostgresEngine)
                opened = await asyncio.to_thread(open_postgres, engine, instance, key_secret, clock)
        except BaseException:
            instance.close()
            raise
        store = cls(opened, clock=clock, key_secret=key_secret, retention=retention or Retention(), on_fatal=on_fatal)
        try:
            await store.changes.look()
            await store.prices.look()
        except StoreUnavailable as error:
            await store.close()
            raise StoreAway(error.message) from None
        return store

    def background(self) -> Collection[Awaitable[None]]:
        """What has to run as long as the gateway does."""
        return (
            self.changes.watch(),
            self.keys.note_uses(),
            self.prices.watch(),
            self.tabs.watch(),
            self._recalls.hear(),
            self.slots.watch(),
            upkeep(self.extend_chain, self.forget, self._clock),
        )

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        """Durably set money aside, or raise a Failure; nothing is held then, nor where there is a prior request.

        Where money is short and tabs of the account are open, they are recalled first.
        """
        prior = await self._place(lambda: PlaceHold(hold, self._opened.instance.name, claim, self.release))
        if prior is not None:
            return self._unsealed(prior)
        if claim is None:
            self.tabs.note(hold)
        return None

    async def available_nanousd(self, account_id: str, key_id: str) -> int:
        """What a hold for the key may be at most now. Raises StoreUnavailable.

        The writer reads it, after what was released before: money that is free already counts. So does what tabs of
        the account have left: it can be recalled.
        """
        return await self._write(lambda db, now_ms: available_nanousd(db, now_ms, account_id, key_id))

    async def prior_request(self, hold: Hold, claim: Claim) -> PriorRequest | None:
        """The request that answers for an Idempotency-Key now. Raises StoreUnavailable."""
        key = {"account_id": hold.account_id, "key_hash": claim.key_hash}
        rows = await self._reads.ask(CLAIMS_SQL["find_claim"], key)
        return self._unsealed(PriorRequest(*rows[0])) if rows else None

    async def kept_bytes(self, account_id: str) -> int:
        """How many bytes of an account's replies are kept. Raises StoreUnavailable."""
        rows = await self._reads.ask(CLAIMS_SQL["kept_bytes"], {"account_id": account_id})
        return int(rows[0][0]) if rows else 0

    async def extend(self, notes: Sequence[StreamNote]) -> frozenset[str]:
        """Have holds of streams last longer, and durably note what was delivered; the ids of those that are open.

        Raises StoreUnavailable.
        """
        asked = {note.hold.hold_id for note in notes}
        self._noted |= asked
        each = range(0, len(notes), BATCH_WRITES_MAX)
        writes = [ExtendHolds(notes[at : at + BATCH_WRITES_MAX]) for at in each]
        extended = frozenset().union(*await asyncio.gather(*map(self._outcome, writes)))
        self._noted -= asked - extended
        return extended

    def _capture_exact(self, hold: Hold, charge: Charge, reply: bytes | None) -> None:
        """End an open hold by charging it; written with the next batch, and kept until it is durable.

        Bounded without a limit of its own: there is at most one for each hold that became durable.
        """
        sealed = self._seal.close(reply, what=REPLY, whose=hold.hold_id) if reply is not None else None
        self._writer.submit(EndHold(hold, HoldEnd.CAPTURE, charge, sealed, noted=self._was_noted(hold)))

    def release(self, hold: Hold, why: HoldEnd = HoldEnd.RELEASE) -> None:
        """End an open hold without charging; written with the next batch. Harmless after a capture.

        If the queue is full, it is left to the sweep, which releases the hold at its deadline; but not where there is
        a note, for which the sweep would charge.
        """
        if hold.tab_id is not None:
            self.tabs.release(hold)
            return
        noted = self._was_noted(hold)
        if noted or not self._writer.full():
            self._writer.submit(EndHold(hold, why, noted=noted))

    async def expire(self, now_ms: int) -> int:
        """End every hold whose deadline is before `now_ms`; returns how many. Raises StoreUnavailable."""
        total = 0
        while True:
            total += (expired := await self._outcome(Expire(now_ms)))
            if expired < EXPIRED_HOLDS_MAX:
                return total + await self.jobs.sweep(now_ms)

    async def extend_chain(self) -> int:
        """Cover every transfer that no block covers yet; how many that were. Raises StoreUnavailable."""
        total = 0
        while True:
            total += (covered := await self._write(chain.extend, chain.LOCKED))
            if covered < chain.TRANSFERS_A_BLOCK:
                return total

    async def forget(self) -> int:
        """Delete records that are too old; how many rows. Raises StoreUnavailable."""
        return await self._retention.apply(self._write, self._clock) + await self.jobs.forget()

    def healthy(self) -> bool:
        """Whether the last batch became durable, and the current one does not take too long."""
        return self._writer.healthy()

    async def drain(self) -> int:
        """Wait until everything queued is durable, at most DRAIN_WAIT_S; returns how many writes still are not."""
        self.tabs.flush()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_WAIT_S):
                await self._writer.drained()
        return self._writer.waiting()

    async def close(self) -> None:
        """Close all tabs, drain, then close the store."""
        self.keys.note_uses_now()
        await self._recalls.end()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_WAIT_S):
                await self.tabs.end()
        self.slots.give_all_back(self._writer)
        lost = await self.drain()
        sound = self._writer.healthy()
        await self._writer.close()
        self._opened.close(clean=sound and not lost)

    def _was_noted(self, hold: Hold) -> bool:
        """Whether it may have a note. It ends now: this is forgotten."""
        if hold.hold_id not in self._noted:
            return False
        self._noted.discard(hold.hold_id)
        return True

    async def _place(self, make: Callable[[], PlaceHold]) -> PriorRequest | None:
        until_s = self._clock.monotonic() + WRITE_WAIT_S
        while True:
            self._writer.submit(write := make())
            try:
                with within(max(until_s - self._clock.monotonic(), LAST_TRY_S)):
                    return await write.outcome
            except asyncio.CancelledError:
                write.left()
                raise
            except TimeoutError:
                write.left()
                raise StoreUnavailable("The ledger did not answer in time; try again soon.") from None
            except (InsufficientQuota, RateLimited):
                if write.recall is not None and await self._recalls.wait(write.recall, until_s):
                    continue
                if not write.may_fit_now or self._clock.monotonic() > until_s:
                    self.stats.holds_refused += 1
                    raise

    async def _write(self, write: Callable[[Db, int], T], accounts: frozenset[str] = frozenset()) -> T:
        """Run a function with the next batch; its result comes once that is durable. Raises StoreUnavailable."""
        return await self._outcome(Change(write, accounts))

    async def _act(
        self, row: str, write: Callable[[Db, int], tuple[T, Sequence[Act]]], actor: Actor | None = None
    ) -> T:
        """The same for a node or an invite, the `row`: with the rows of the acts that it returns besides its result."""
        return await self._outcome(ActedChange(row, write, actor))

    async def _outcome(self, write: WaitedWrite[T]) -> T:
        self._writer.submit(write)
        try:
            async with asyncio.timeout(WRITE_WAIT_S):
                return await write.outcome
        except asyncio.CancelledError:
            write.left()
            raise
        except TimeoutError:
            write.left()
            raise StoreUnavailable("The store did not answer in time; try again soon.") from None

    async def _recall_tabs(self, what: Recall) -> int:
        return await self._outcome(RecallTabs(what.account_id, what.key_id))

    async def _own_tabs(self, which: str) -> list[str]:
        """The ids of tabs of this gateway, by a statement that finds some. Raises StoreUnavailable."""
        values = {"owner": self._opened.instance.name, "now_ms": self._clock.unix_ms()}
        return [tab_id for (tab_id,) in await self._reads.ask(TABS_SQL[which], values)]

    def _unsealed(self, prior: PriorRequest) -> PriorRequest:
        if prior.reply is None:
            return prior
        reply = self._seal.open(prior.reply, what=REPLY, whose=prior.hold_id)
        return PriorRequest(prior.body_hash, prior.hold_id, prior.state, reply)
