"""One world: a store, gateways, callers and an operator, all drawn from one seed, and what was wrong in the end."""

import asyncio
import itertools
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.lives import talking
from bench.lives.callers import Callers, Station, make_errands
from bench.lives.disk import Disk
from bench.lives.gateway import Gateway, Traits
from bench.lives.journal import Journal
from bench.lives.judge import Judge
from bench.lives.locking import LOCKS_OF_ACCOUNT, LOCKS_OF_KEY
from bench.lives.loop import Clock, Loop
from bench.lives.operator import Operator
from embedmesh.flow import lock, stream
from embedmesh.rules import ids
from embedmesh.rules.caching import CachePolicy
from embedmesh.storage import opening
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import Key, Limits
from embedmesh.storage.ledger import check, open_lock
from embedmesh.storage.secrets import tokens
from tests.flow.world import MODEL
from tests.storage.shop import START_MS, secret

DAY_MS = 86_400_000
ROOM = 1_000  # more requests than there are
REPLY_BYTES = 4_000_000  # of a thousand replies
FEW_REPLY_BYTES = 4_000  # of five: then hardly any work may wait for a retry
LOCKS_ODDS, SEALED_ODDS_MAX = 0.5, 0.6  # of a world to have lives of locks, and how many
TALKS_ODDS, TALK_ODDS_MAX = 0.4, 0.6  # of a world to have lives of chats, and how many
DOWN_S, DOWN_S_MAX = 4.0, 75.0  # the most that a gateway is down; in some worlds so long that others end its holds
AWAY_S_MAX = 16.0  # holds of streams last for that long, see `flow.leases`
DEADLINES_S = 80.0  # no hold and no tab lasts longer; and ten seconds more
CALM_S = 6.0  # until no message is under way, and sweeps have been made
NEVER_HEARD = "Future exception was never retrieved"  # its gateway is dead, or has stopped


class Ended(msgspec.Struct, frozen=True):
    """What became of one world."""

    seed: int
    lives: int
    wrong: list[str]
    trace: list[str]
    digest: str
    virtual_s: float
    steps: int
    seen: dict[str, int]

    @property
    def broken(self) -> list[str]:
        """What was wrong in the end."""
        return self.wrong


class Template:
    """An empty store of this version, to be copied for each world: migrating takes longer than living."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "template.db"
        loop = Loop(random.Random(0), 0.0)
        with _seeded(random.Random(0)):
            Books.open(self._path, clock=Clock(loop, START_MS), secret=secret, migrating=True).close()
        loop.close()

    def copy(self, path: Path) -> None:
        """For one world."""
        path.parent.mkdir(mode=0o700)
        shutil.copyfile(self._path, path)
        path.chmod(0o600)


def draw(dice: random.Random, lives: int) -> Traits:
    """The traits of a world: most are a bit bad in every way, some are well in some ways."""

    def odds(most: float, well: float = 0.3) -> float:
        return 0.0 if dice.random() < well else dice.random() * most

    busy = dice.random() < 0.7
    near_midnight = dice.random() < 0.2
    start_ms = START_MS + int(dice.random() * DAY_MS)
    if near_midnight:
        start_ms = (START_MS // DAY_MS + 1) * DAY_MS - int(dice.random() * 40_000)
    return Traits(
        start_ms=start_ms,
        gateways=1 + int(dice.random() * 3),
        lives=lives,
        spans_s=0.3 + dice.random() * 2.0 if dice.random() < 0.4 else 1.0 + dice.random() ** 2 * (12 if busy else 60),
        disorder=0.0 if dice.random() < 0.2 else dice.random(),
        turn_s=0.0 if dice.random() < 0.6 else dice.random() ** 2 * 0.05,
        nodes=(2 if busy else 1) + int(dice.random() * 3),
        inputs_max=None if busy or dice.random() < 0.6 else 1 + int(dice.random() * 3),
        hedge=dice.random() < 0.4,
        ask=0 if dice.random() < 0.3 else int(dice.random() * 2_000_000),
        bad_odds=odds(0.12 if busy else 0.3),
        slow_odds=odds(0.08 if busy else 0.2),
        broken_odds=odds(0.03),
        kill_odds=odds(0.6 if busy else 0.9, 0.15),
        leave_odds=odds(0.3 if busy else 0.5),
        undeliverable_odds=odds(0.1),
        busy=busy,
        rich_odds=1.0 if busy else odds(1.0),
        plain_odds=0.75 + 0.25 * dice.random() if busy else odds(1.0),
        ordinary_odds=1.0 if busy else odds(1.0),
        room=ROOM if dice.random() < 0.7 else 2 + int(dice.random() * 20),
        reply_bytes=REPLY_BYTES if dice.random() < 0.7 else FEW_REPLY_BYTES,
    )


def live(seed: int, template: Template, lives: int = 50, talk_odds: float | None = None) -> Ended:
    """The whole world of a seed. `talk_odds` are those of a life to be one of chats, which its seed decides else."""
    dice = random.Random(seed)
    traits = draw(dice, lives)
    of_locks = random.Random(f"locks {seed}")
    if of_locks.random() < LOCKS_ODDS:
        traits = msgspec.structs.replace(traits, sealed_odds=of_locks.random() * SEALED_ODDS_MAX)
    of_talks = random.Random(f"talks {seed}")
    if talk_odds is not None or of_talks.random() < TALKS_ODDS:
        drawn = of_talks.random() * TALK_ODDS_MAX
        traits = with_talks(traits, of_talks, drawn if talk_odds is None else talk_odds)
    folder = template.folder / f"world-{seed}"
    template.copy(folder / "store.db")
    try:
        with _seeded(random.Random(seed)):
            return _World(seed, dice, traits, folder).run()
    finally:
        shutil.rmtree(folder)


def with_talks(traits: Traits, dice: random.Random, odds: float) -> Traits:
    """The same world, where some lives are chats: they last longer, and take more memory."""
    return msgspec.structs.replace(
        traits,
        talk_odds=odds,
        kill_odds=traits.kill_odds if dice.random() < 0.3 else 0.4 + 0.6 * dice.random(),
        steps_max=traits.steps_max if dice.random() < 0.4 else 8_000,
        down_s_max=DOWN_S_MAX if dice.random() < 0.4 else DOWN_S,
        away_s=AWAY_S_MAX * dice.random() if dice.random() < 0.4 else 0.0,
        reply_bytes=traits.reply_bytes * (20 if traits.reply_bytes == REPLY_BYTES else 1_000),
    )


class _World:
    def __init__(self, seed: int, dice: random.Random, traits: Traits, folder: Path) -> None:
        self.seed, self.dice, self.traits, self.folder = seed, dice, traits, folder
        self.journal = Journal()
        self.loop = Loop(dice, traits.disorder, traits.turn_s)
        self.clock = Clock(self.loop, traits.start_ms)
        self.disk = Disk(self.loop, dice, traits.broken_odds)
        self.path = folder / "store.db"
        self.stations = [Station(f"g{number}") for number in range(traits.gateways)]
        self.ending = False  # nothing more goes wrong
        self.over = False
        self.keys: dict[str, Key] = {}
        self.limits: dict[str, int] = {}
        self.tokens: list[tuple[str, str, str]] = []

    def run(self) -> Ended:
        lost = 0
        self.journal.say(0.0, "world", f"{self.traits}")
        with Books.open(self.path, clock=self.clock, secret=secret) as books:
            books._db.execute("PRAGMA busy_timeout = 0")  # waits are in virtual time
            self._found(books)
            try:
                self.loop.run_until_complete(self._live(books))
            except Exception as error:  # noqa: BLE001 - of the loop itself, or of this simulation
                self.journal.wrong.append(f"the world ended by {type(error).__name__}: {error}")
            self.journal.wrong += [each for each in self.loop.complaints if NEVER_HEARD not in each]
            try:
                judge = Judge(books, self.journal, self.traits.start_ms, self.keys, self.limits)
                wrong = judge.wrong()
                lost = judge.lost
                self.journal.seen += judge.seen
            finally:
                with _quiet():
                    self.loop.bury()
        self.journal.say(self.loop.now, "world", f"ends after {self.loop.steps} steps, dice {self.dice.random()}")
        return Ended(
            seed=self.seed,
            lives=self.traits.lives,
            wrong=wrong,
            trace=self.journal.trace,
            digest=self.journal.digest(),
            virtual_s=self.loop.now,
            steps=self.loop.steps,
            seen=dict(self.journal.seen + self.disk.seen + Counter({"lost in flight": lost})),
        )

    def _found(self, books: Books) -> None:
        """Accounts with little money, keys with limits and without."""
        dice = self.dice
        self.journal.prices.append(MODEL.price)
        for number in range(1 + int(dice.random() * 3)):
            account = f"a{number}"
            limit = int(dice.random() * 200) if dice.random() < 0.3 else 0
            cache = list(CachePolicy)[int(dice.random() * len(CachePolicy))]
            busy = self.traits.busy and not number
            if busy:
                cache = CachePolicy.OFF  # else nothing goes straight
            books.accounts.create(account, credit_limit_nanousd=limit, cache=cache)
            self.limits[account] = limit
            amount = 1 + int(dice.random() ** 2 * 1_000)
            if dice.random() < self.traits.rich_odds:
                amount *= 20 + int(dice.random() * 100)  # else no tab is worth opening: it is a 64th of what there is
            if busy:
                amount += int(dice.random() * 400_000)
            books.accounts.credit(account, amount, f"first of {account}")
            self.journal.credited[account] += amount
            for _ in range(1 + int(dice.random() * 2)):
                wide = 20 if busy and dice.random() < 0.85 else 1
                limits = self._draw_limits(wide) if self.tokens or dice.random() < 0.5 else Limits()
                key, token = books.keys.create(account, ["embeddings", "generate"], limits=limits)
                self.keys[key.key_id] = key
                self.tokens.append((account, key.key_id, token))
                self.journal.say(
                    0.0, "world", f"{account} has {amount} and {limit}, cache {cache}, {key.key_id}: {limits}"
                )

    def _draw_limits(self, wide: int) -> Limits:
        """So `wide` that one or another is met."""
        return Limits(
            requests_a_minute=self._maybe(0.2, 5, 40 * wide),
            tokens_a_minute=self._maybe(0.15, 60, 600 * wide),
            concurrency=self._maybe(0.25, 1, 5 * wide),
            budget_day=self._maybe(0.2, 50, 400 * wide**2),
            budget_month=self._maybe(0.2, 50, 600 * wide**2),
        )

    def _maybe(self, odds: float, least: int, most: int) -> int | None:
        return least + int(self.dice.random() * (most - least)) if self.dice.random() < odds else None

    async def _live(self, books: Books) -> None:
        running = [asyncio.create_task(self._keep(station)) for station in self.stations]
        callers = Callers(self.stations, self.loop, self.dice, self.traits, self.journal)
        errands = make_errands(self.dice, self.tokens, self.traits.lives, self.traits)
        operator = Operator(
            books, self.stations, self.disk, self.loop, self.dice, self.traits, self.journal,
            list(self.limits), list(self.keys),
        )  # fmt: skip
        await asyncio.gather(
            operator.work(int(self.dice.random() * (12 if self.traits.busy else 25))),
            operator.take_away(),
            *(callers.live(number, errand) for number, errand in enumerate(errands)),
        )
        self.ending = True
        self.disk.mend()
        for station in self.stations:
            if station.gateway is not None:
                station.gateway.dies_at = None
        await asyncio.sleep(CALM_S)
        self.loop.now += DEADLINES_S  # as if all machines had been asleep
        await asyncio.sleep(CALM_S)
        self.over = True
        for station in self.stations:
            if station.gateway is None or not station.gateway.serves:
                self.journal.wrong.append(f"{station.name} did not come back")
            else:
                station.gateway.stop()
        await asyncio.gather(*running)

    async def _keep(self, station: Station) -> None:
        """A gateway is running here, until the world ends."""
        dice = self.dice
        for life in itertools.count(1):
            dies = not self.ending and dice.random() < self.traits.kill_odds
            station.gateway = Gateway(
                f"{station.name}.{life}", self.path, self.folder / station.name, self.loop, self.clock, dice,
                self.traits, self.journal, 1 + int(dice.random() ** 2 * self.traits.steps_max) if dies else None,
            )  # fmt: skip
            await station.gateway.ended
            if self.over:
                return
            down_s_max = DOWN_S if self.ending else self.traits.down_s_max
            await asyncio.sleep(0.05 + dice.random() ** 3 * down_s_max)


class _Secrets:
    """In place of the module `secrets`: the same keys for the same seed."""

    def __init__(self, dice: random.Random) -> None:
        self.choice = dice.choice
        self.randbits = dice.getrandbits


class _Time:
    """In place of the module `time`, where work is bounded by real time."""

    @staticmethod
    def monotonic() -> float:
        return 0.0


@contextmanager
def _seeded(dice: random.Random) -> Iterator[None]:
    """No randomness and no time but ours; and no real wait for a lock."""
    changed: list[tuple[Any, str, Any]] = [
        (ids, "_pieces", []),
        (ids, "random_hex", lambda: dice.randbytes(ids.RANDOM_BYTES).hex()),
        (tokens, "secrets", _Secrets(dice)),
        (lock, "secrets", _Secrets(dice)),
        *((stream, name, getattr(talking, name)) for name in ("FIRST_EVENT_S", "OPENING_S", "BETWEEN_S", "STREAM_S")),
        (open_lock, "LOCKS_OF_KEY_MAX", LOCKS_OF_KEY),
        (open_lock, "LOCKS_OF_ACCOUNT_MAX", LOCKS_OF_ACCOUNT),
        (check, "time", _Time),
        (opening, "OPEN_BUSY_S", 0.0),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changed]
    for where, name, value in changed:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Coroutines of dead processes are closed: what they print then does not matter."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def folder_in_memory() -> Path:
    """Where files cost nothing, if there is such a place."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
