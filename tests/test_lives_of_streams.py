"""The simulation of lives (`make lives`) with chats and their streams: worlds are right, bugs are found."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.lives.world import Template, folder_in_memory, live
from embedmesh.flow import leases
from embedmesh.flow.bill import Bill
from embedmesh.flow.deliver import Delivering, charge_of
from embedmesh.flow.generate import GenerationCall
from embedmesh.flow.stream import Stream
from embedmesh.rules.exchange import Delivery
from embedmesh.rules.generation import TokenCounts
from embedmesh.storage.ledger.extend_holds import ExtendHolds
from embedmesh.storage.ledger.lost_holds import LostHolds

LIVES = 30
WORLDS_MAX = 60  # within so many a bug is found
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with tempfile.TemporaryDirectory(prefix="embedmesh-lives-", dir=folder_in_memory()) as folder:
        yield Template(Path(folder))


def found(template: Template, what: str) -> bool:
    """Whether that is what goes wrong in one of some worlds."""
    worlds = (live(seed, template, LIVES, 1.0) for seed in range(100, 100 + WORLDS_MAX))
    return any(what in "\n".join(world.wrong) for world in worlds)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_world_of_streams_keeps_all_promises(template: Template, seed: int) -> None:
    """See `python -m bench.lives --talks 1 --only SEED` for one that does not."""
    first, again = (live(seed, template, LIVES, 1.0) for _ in range(2))
    assert first.wrong == []
    assert first.digest == again.digest


def test_streams_end_in_every_way(template: Template) -> None:
    """Or the judge would look at some only."""
    seen = sum((Counter(live(seed, template, LIVES, 1.0).seen) for seed in range(100, 112)), Counter[str]())
    ends = ("whole", "broken off", "cancelled", "failed", "charged at their note", "lost without a note")
    assert min(seen[f"streams: {end}"] for end in ends) > 0
    assert seen["notes"] > 20 and seen["comments"] > 5


def test_it_finds_a_note_of_more_than_was_handed_over(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is on its way to the caller's socket is not there yet."""
    at_once: Callable[[Any], Any] = lambda self: charge_of(self._world, self._caller, self._call, self._bill)  # noqa: E731
    monkeypatch.setattr(Stream, "_charge", at_once)
    assert found(template, "more than was handed over")


def test_it_finds_streams_that_are_not_extended(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_EVERY_S", 200.0)
    assert found(template, "ended by itself while its gateway lived")


def test_it_finds_a_node_that_is_paid_for_its_failure(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_told(stream: Any, reason: Any) -> bytes:
        return b"data: %b\n\n" % stream._call.operation.failure_event(reason)

    monkeypatch.setattr(Stream, "_broken", only_told)
    assert found(template, "was charged, and we broke it off, or its node did")


def test_it_finds_a_stream_whose_caller_decides_that_it_is_free(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Stream.left

    def free(stream: Stream) -> None:
        left(stream)
        stream._bill.release()

    monkeypatch.setattr(Stream, "left", free)
    assert found(template, "was handed over, and never charged")


def test_it_finds_a_node_that_goes_on_for_nobody(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "left", lambda stream: setattr(stream, "_gone", True))
    assert found(template, "was not stopped in time")


def test_it_finds_a_charge_of_everything(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller had of it."""
    owe = GenerationCall.owe

    def all_of_it(call: Any, world: Any, bill: Bill, part: Any, said: TokenCounts | None, *text: int) -> Any:
        return owe(call, world, bill, part, TokenCounts(*call.most) if call.streams else said, *text)

    monkeypatch.setattr(GenerationCall, "owe", all_of_it)
    assert found(template, ", not [")


def test_it_finds_a_recovery_that_forgets_notes(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead gateway has noted is charged. (The store's own rules refuse to release it.)"""
    ends = LostHolds.end

    def released(lost: Any, *args: Any, **more: Any) -> Any:
        lost._others += [each.hold.hold_id for each in lost._noted]
        lost._noted = []
        return ends(lost, *args, **more)

    monkeypatch.setattr(LostHolds, "end", released)
    assert found(template, "of its last life open")


def test_it_finds_notes_that_nobody_can_charge(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = ExtendHolds.apply_all.__func__  # type: ignore[attr-defined]

    def without_cost(cls: Any, db: Any, now_ms: int, writes: Any) -> None:
        apply(cls, db, now_ms, writes)
        db.execute("UPDATE hold_notes SET cost = 0")

    monkeypatch.setattr(ExtendHolds, "apply_all", classmethod(without_cost))
    assert found(template, "was noted, and nothing was charged")


def test_it_finds_a_stream_that_nobody_closes(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node, its lease and its room are given back, however it ends."""

    async def hand_over(delivering: Any, done: Any) -> None:
        delivering._delivery = await delivering._deliver(done.reply)
        if done.bill is not None and delivering._delivery is not Delivery.FAILED:
            done.bill.capture(
                charge_of(delivering._world, delivering._request.caller, delivering._request.call, done.bill)
            )
        await asyncio.sleep(0)

    monkeypatch.setattr(Delivering, "_hand_over", hand_over)
    assert found(template, "not given back")
