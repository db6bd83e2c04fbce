"""The operator, with the real books: credits, refunds, keys revoked, prices set, and a shell that keeps the lock."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from bench.lives.callers import Station
from bench.lives.disk import Disk
from bench.lives.gateway import Traits
from bench.lives.journal import Journal
from bench.lives.loop import Loop
from embedmesh.rules.errors import Failure, StoreUnavailable
from embedmesh.storage.books import Books
from tests.flow.world import MODEL

T = TypeVar("T")
TRIES_MAX = 100


class Operator:
    """Acts on one world from outside."""

    def __init__(
        self, books: Books, stations: Sequence[Station], disk: Disk, loop: Loop, dice: random.Random, traits: Traits,
        journal: Journal, accounts: Sequence[str], keys: Sequence[str],
    ) -> None:  # fmt: skip
        self._books = books
        self._stations = stations
        self._disk = disk
        self._loop, self._dice, self._journal = loop, dice, journal
        self._spans_s = traits.spans_s
        self._away_s = traits.away_s
        self._accounts, self._keys = accounts, keys
        self._references = 0

    async def work(self, times: int) -> None:
        """`times` actions, one after the other."""
        pause_s = self._spans_s / (times + 1)
        actions = (self.credit, self.credit, self.refund, self.refund, self.revoke, self.price, self.keep_lock,
                self.fill_disk, self.restart, self.look, self.take_all)  # fmt: skip
        odds = (3, 3, 3, 3, 0.7, 0.7, 2, 1.5, 1.5, 0.5, 1.5)
        for _ in range(times):
            await asyncio.sleep(self._dice.random() * 2 * pause_s)
            (what,) = self._dice.choices(actions, odds)
            await what()

    async def credit(self) -> None:
        """Give or take back; sometimes the same once more."""
        dice, account = self._dice, self._dice.choice(self._accounts)
        amount = int(dice.random() * 150) + 1 if dice.random() < 0.75 else -int(dice.random() * 60) - 1
        reference = self._reference()
        for _ in range(1 + (dice.random() < 0.3)):
            if await self._do(lambda: self._books.accounts.credit(account, amount, reference)):
                self._journal.credited[account] += amount
                self._say(f"credits {account}: {amount}")

    async def take_all(self) -> None:
        """Take back nearly all that is available: then tabs have what is left."""
        account = self._dice.choice(self._accounts)
        if (found := await self._do(lambda: self._books.accounts.find(account))) is None:
            return
        amount = int(self._dice.random() * 20) - found.balance_nanousd - found.credit_limit_nanousd + found.held_nanousd
        reference = self._reference()
        if amount < 0 and await self._do(lambda: self._books.accounts.credit(account, amount, reference)):
            self._journal.credited[account] += amount
            self._say(f"takes from {account}: {amount}")

    async def refund(self) -> None:
        """Some of what a request has cost, or all; sometimes the same once more."""
        paid = [each for each in self._journal.deliveries if each.hold_id is not None]
        if not paid:
            return
        dice, one = self._dice, self._dice.choice(paid)
        amount = None if dice.random() < 0.5 else 1 + int(dice.random() * one.cost)
        reference = self._reference()
        for _ in range(1 + (dice.random() < 0.3)):
            done = await self._do(lambda: self._books.accounts.refund(str(one.hold_id), amount, reference))
            if done is not None and done[0]:
                self._journal.refunded[one.errand.account] += done[1]
                self._say(f"refunds {one.hold_id}: {done[1]}")

    async def revoke(self) -> None:
        """A key is useless within a second."""
        key = self._dice.choice(self._keys)
        if await self._do(lambda: self._books.keys.revoke(key)):
            self._journal.revoked[key] = self._loop.now
            self._say(f"revokes {key}")

    async def price(self) -> None:
        """Another price from now on."""
        price = int(self._dice.random() * 3_000_000)
        self._journal.prices.append(price)
        if await self._do(lambda: self._books.prices.set(MODEL.id, price)):
            self._say(f"sets the price {price}")

    async def keep_lock(self) -> None:
        """Another program writes, and keeps the lock for a while."""
        db = self._books._db

        def begin() -> bool:
            with self._books._session.transaction():
                pass
            db.begin()
            return True

        if await self._do(begin):
            self._say("keeps the lock")
            await asyncio.sleep(self._dice.random() ** 2 * 1.8)
            db.rollback()
            self._say("lets the lock go")

    async def fill_disk(self) -> None:
        """For a while."""
        seconds = self._dice.random() ** 2 * 2.5
        self._disk.fill(seconds)
        self._say(f"the disk is full for {seconds:.3f} s")

    async def take_away(self) -> None:
        """Nothing can be written for long, once: streams go on."""
        if self._away_s:
            await asyncio.sleep(self._dice.random() * 2 * self._spans_s + 10.0)
            self._disk.fill(self._away_s)
            self._say(f"the store is away for {self._away_s:.3f} s")

    async def restart(self) -> None:
        """In peace."""
        gateway = self._dice.choice(self._stations).gateway
        if gateway is not None:
            gateway.stop()

    async def look(self) -> None:
        """At the ledger, in the middle of everything."""
        report = self._books.check()
        self._journal.wrong += [f"in the middle: {each}" for each in report.broken]

    async def _do(self, what: Callable[[], T]) -> T | None:
        """Try until the store can be written; None where the books refuse."""
        for _ in range(TRIES_MAX):
            try:
                return what()
            except StoreUnavailable:
                await asyncio.sleep(0.001 + self._dice.random() * 0.02)
            except Failure as failure:
                self._say(f"may not: {failure.code}")
                return None
        return None

    def _reference(self) -> str:
        self._references += 1
        return f"reference {self._references}"

    def _say(self, what: str) -> None:
        self._journal.say(self._loop.now, "oper", what)
