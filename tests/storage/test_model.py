"""A model of the ledger in a few lines of Python, walked at random beside the real store."""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from embedmesh.rules.errors import InsufficientQuota
from embedmesh.rules.holds import MOVES, NOTED, Hold, HoldEnd, HoldState, StreamNote
from embedmesh.storage.books import Books
from tests.data import quick_or
from tests.storage.shop import LASTS_MS, Shop, charge, crash_image, secret

AMOUNTS = st.integers(0, 120)


class Model:
    """What must be true: plain numbers, one hold after the other."""

    def __init__(self) -> None:
        self.balance = 0
        self.holds: dict[str, tuple[HoldState, Hold]] = {}
        self.notes: dict[str, int] = {}  # of open holds
        self.late = 0
        self.recovered = 0
        self.lost: set[str] = set()  # holds that their gateway did not end

    def held(self) -> int:
        return sum(hold.amount_nanousd for state, hold in self.holds.values() if state is HoldState.OPEN)

    def place(self, hold: Hold) -> bool:
        covered = self.balance - self.held() >= hold.amount_nanousd
        if covered:
            self.holds[hold.hold_id] = (HoldState.OPEN, hold)
        return covered

    def end(self, hold: Hold, end: HoldEnd, cost: int = 0) -> None:
        state, _ = self.holds[hold.hold_id]
        after = MOVES.get((state, end))
        if after is not None:
            self.holds[hold.hold_id] = (after, hold)
            self.balance -= cost if after is HoldState.CAPTURED else 0
            self.notes.pop(hold.hold_id, None)
            self.lost |= {hold.hold_id} if end in (*NOTED, *NOTED.values()) else set()
        elif end is HoldEnd.CAPTURE and (state is HoldState.RELEASED or hold.hold_id in self.lost):
            self.late += 1

    def lose(self, hold: Hold, why: HoldEnd) -> None:
        cost = self.notes.get(hold.hold_id)
        self.end(hold, why if cost is None else NOTED[why], cost or 0)

    def extend(self, note: StreamNote) -> bool:
        state, hold = self.holds[note.hold.hold_id]
        if state is HoldState.OPEN:
            self.notes[hold.hold_id] = note.charge.cost_nanousd
            lasting = msgspec.structs.replace(hold, deadline_ms=max(hold.deadline_ms, note.deadline_ms))
            self.holds[hold.hold_id] = (state, lasting)
        return state is HoldState.OPEN

    def expire(self, now_ms: int) -> int:
        late = [h for s, h in self.holds.values() if s is HoldState.OPEN and h.deadline_ms < now_ms]
        for hold in late:
            self.lose(hold, HoldEnd.EXPIRE)
        return len(late)

    def crash(self) -> None:
        for state, hold in list(self.holds.values()):
            if state is HoldState.OPEN:
                self.recovered += hold.hold_id not in self.notes
                self.lose(hold, HoldEnd.RECOVER)


class Life(RuleBasedStateMachine):
    """Any order of credits, holds, notes, ends, sweeps and crashes leaves the store as the model says."""

    placed = Bundle("placed")

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="embedmesh-model-")
        self.shop = Shop(Path(self.folder.name))
        self.runner = asyncio.Runner()
        self.store = self.runner.run(self.shop.open())
        self.model = Model()
        self.queued: list[Callable[[], None]] = []  # what the model will do once the real queue is written
        self.crashes = 0

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()
        self.shop.books.close()
        self.folder.cleanup()

    def flush(self) -> None:
        for step in self.queued:
            step()
        self.queued = []

    @rule(amount=st.integers(1, 300))
    def credit(self, amount: int) -> None:
        self.shop.credit(amount)
        self.queued.insert(0, lambda: None)
        self.model.balance += amount

    @rule(target=placed, amounts=st.lists(AMOUNTS, min_size=1, max_size=4), lasts_ms=st.integers(0, LASTS_MS))
    def hold(self, amounts: list[int], lasts_ms: int) -> list[Hold]:
        self.shop.clock.now_ms += 1
        holds = [self.shop.new_hold(amount) for amount in amounts]

        async def place() -> Sequence[object]:
            return await asyncio.gather(*map(self.store.hold, holds), return_exceptions=True)

        outcomes = self.runner.run(place())
        self.flush()  # a hold is durable after everything queued before it
        expected = [self.model.place(hold) for hold in holds]
        assert [outcome is None for outcome in outcomes] == expected
        assert all(outcome is None or isinstance(outcome, InsufficientQuota) for outcome in outcomes)
        return [hold for hold, good in zip(holds, expected, strict=True) if good]

    @rule(holds=placed, share=st.integers(0, 100), payable=st.booleans())
    def capture(self, holds: list[Hold], share: int, payable: bool) -> None:
        for hold in holds[:2]:
            cost = hold.amount_nanousd * share // 100
            self.store.capture(hold, charge(cost, payable=cost // 2 if payable else 0))
            self.queued.append(lambda hold=hold, cost=cost: self.model.end(hold, HoldEnd.CAPTURE, cost))  # type: ignore[misc]

    @rule(holds=placed)
    def release(self, holds: list[Hold]) -> None:
        for hold in holds[-2:]:
            self.store.release(hold)
            self.queued.append(lambda hold=hold: self.model.end(hold, HoldEnd.RELEASE))  # type: ignore[misc]

    @rule(holds=placed, share=st.integers(0, 100), lasts_ms=st.integers(0, 3 * LASTS_MS))
    def extend(self, holds: list[Hold], share: int, lasts_ms: int) -> None:
        until_ms = self.shop.clock.now_ms + lasts_ms
        notes = [StreamNote(hold, charge(hold.amount_nanousd * share // 100), until_ms) for hold in holds]
        extended = self.runner.run(self.store.extend(notes))
        self.flush()
        assert extended == {note.hold.hold_id for note in notes if self.model.extend(note)}

    @rule(pass_ms=st.sampled_from([0, 1, LASTS_MS, LASTS_MS + 1]))
    def expire(self, pass_ms: int) -> None:
        self.shop.clock.now_ms += pass_ms
        expired = self.runner.run(self.store.expire(self.shop.clock.now_ms))
        self.flush()
        assert expired == self.model.expire(self.shop.clock.now_ms)

    @rule()
    def drain(self) -> None:
        assert self.runner.run(self.store.drain()) == 0
        self.flush()

    @rule()
    def crash(self) -> None:
        """The process dies: what was queued is lost, what was acknowledged is not."""
        self.crashes += 1
        assert self.store.stats.late_captures <= self.model.late
        image = crash_image(self.shop.path, Path(self.folder.name) / f"crash{self.crashes}")
        self.runner.run(self.store.close())
        self.shop.books.close()
        self.queued = []
        self.model.crash()
        self.model.late = 0  # counted anew by each process
        self.shop.path = self.shop.place = image
        self.shop.folder = image.parent
        self.shop.books = Books.open(image, clock=self.shop.clock, secret=secret)
        self.store = self.runner.run(self.shop.open())

    @invariant()
    def agrees(self) -> None:
        """What is durable is what the model says, and every promise of the ledger is kept."""
        if not self.queued:
            assert self.shop.money() == (self.model.balance, self.model.held())
            assert self.store.stats.late_captures == self.model.late
        report = self.shop.books.check()
        assert report.broken == []
        assert report.tallies["holds_recovered"] == self.model.recovered


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=quick_or(20, quick=10), stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
