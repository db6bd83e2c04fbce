"""The simulation of lives (`make lives`): a few worlds are right, the same seed is the same world, bugs are found."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.lives.exchange import TO_THE_END
from bench.lives.world import Template, folder_in_memory, live
from embedmesh.flow import deliver as module
from embedmesh.flow import straight
from embedmesh.flow.bill import Bill
from embedmesh.flow.embed import EmbeddingsCall
from embedmesh.flow.retries import Unread
from embedmesh.flow.straight import StraightRequest
from embedmesh.flow.world import World
from embedmesh.rules.exchange import Delivery
from embedmesh.rules.holds import Charge, Hold
from embedmesh.storage.ledger.group_commit import Writer
from embedmesh.storage.ledger.recalls import Recalls
from embedmesh.storage.ledger.tab_keeper import TabKeeper
from embedmesh.storage.ledger.writes import Write
from embedmesh.storage.sql import CLAIMS_SQL, HOLDS_SQL, LOCKS_SQL, TABS_SQL
from embedmesh.storage.sqlite.driver import driver
from tests.flow.world import MODEL

LIVES = 25
WORLDS = range(100, 190)  # within so many a bug is found
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with tempfile.TemporaryDirectory(prefix="embedmesh-lives-", dir=folder_in_memory()) as folder:
        yield Template(Path(folder))


def found(template: Template, what: str, *, first: int = WORLDS[0]) -> bool:
    """Whether that is what goes wrong in one of some worlds. The world looked at first is where it was last found."""
    seeds = sorted(WORLDS, key=lambda seed: (seed < first, seed))
    return any(what in "\n".join(live(seed, template, LIVES).wrong) for seed in seeds)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_world_keeps_all_promises(template: Template, seed: int) -> None:
    """See `python -m bench.lives --only SEED` for one that does not."""
    assert live(seed, template, LIVES).wrong == []


def test_the_same_seed_is_the_same_world(template: Template) -> None:
    """To the last step and byte, so that what was found can be looked at."""
    first, second, other = (live(seed, template, LIVES) for seed in (7, 7, 8))
    assert first.trace == second.trace
    assert first.digest == second.digest != other.digest
    assert first.seen == second.seen


def test_it_finds_a_charge_that_does_not_end_a_hold(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up after its delivery must stay charged."""

    def capture(held: Any, charge: Any, reply: bytes | None = None) -> None:
        held.release()
        held._ledger.capture(held.hold, charge, reply)

    monkeypatch.setattr(Bill, "capture", capture)
    assert found(template, "ended by release", first=110)


def test_it_finds_a_caller_that_decides_whether_it_pays(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who breaks a delivery off after its first byte must pay."""
    settle = module._settle

    def only_what_is_whole(world: Any, request: Any, done: Any, delivery: Delivery) -> None:
        if delivery is Delivery.BROKEN_OFF:
            done.close()
        settle(world, request, done, delivery)

    monkeypatch.setattr(module, "_settle", only_what_is_whole)
    assert found(template, "ended by release", first=103)


def test_it_finds_what_goes_straight_and_is_charged_before_it_is_delivered(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that went before its reply was written pays nothing."""
    headers = module.reply_headers

    def at_once(world: World, began: float, cost: int, bill: Bill) -> dict[str, str]:
        key_id, node_id = bill.hold.key_id, bill.shares[0].node_id
        bill.capture(Charge(bill.cost, bill.tokens, model=MODEL.id, key_id=str(key_id), node_id=node_id))
        return headers(world, began, cost, bill)

    monkeypatch.setattr(straight, "reply_headers", at_once)
    assert found(template, "and no caller got its reply", first=114)


def test_it_finds_what_goes_straight_and_is_not_ended_when_its_caller_leaves(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had is given back: its room, its part of the tab, its node's time."""
    monkeypatch.setattr(StraightRequest, "caller_left", lambda request: request._end("dropped", 0.0))
    assert found(template, "not given back", first=122)


def test_many_requests_go_straight_and_many_locks_are_used(template: Template) -> None:
    """Or the judge would look at the hard way only, and at no lock."""
    seen = sum((Counter(live(seed, template, LIVES).seen) for seed in range(100, 116)), Counter[str]())
    assert seen[TO_THE_END] > 20
    assert min(seen[what] for what in ("locks", "sealed replies", "locks abandoned")) > 4


def test_it_finds_a_retry_that_pays_again(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was paid and not read must be there for a retry."""
    monkeypatch.setattr(Unread, "find", lambda *_: None)
    assert found(template, "paid again", first=127)


def test_it_finds_a_cache_that_remembers_what_nobody_paid(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    work = EmbeddingsCall.work

    async def at_once(call: EmbeddingsCall, world: World, bill: Bill) -> Any:
        result = await work(call, world, bill)
        if call._learnt is not None:
            world.cache.keep(bill.hold.account_id, call.model, call._learnt)
        return result

    monkeypatch.setattr(EmbeddingsCall, "work", at_once)
    assert found(template, "for nothing", first=116)


def test_it_finds_a_key_that_is_charged_twice(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request with an Idempotency-Key must not take it from one that was paid."""
    claim = CLAIMS_SQL["claim"]
    anyway = claim[: claim.index("WHERE claims")] + "WHERE true RETURNING hold_id"
    monkeypatch.setitem(CLAIMS_SQL, "claim", anyway)
    assert found(template, "more than once")


def test_it_finds_holds_without_money(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the condition of a hold the store's last check refuses it, and the caller is told of a bug of ours."""

    def copy(place: Path) -> None:
        Template.copy(template, place)
        db = driver.connect(place, isolation_level=None)
        db.execute("DROP TRIGGER holds_need_room")
        db.execute(
            "CREATE TRIGGER holds_need_room BEFORE INSERT ON holds BEGIN "
            "UPDATE accounts SET held = held + NEW.amount WHERE account_id = NEW.account_id; END"
        )
        db.close()

    monkeypatch.setattr(template, "copy", copy)
    assert found(template, "The ledger refused to hold money")


def test_it_finds_a_lost_capture(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch that failed did not write has to be written by the next."""

    def keep(writer: Any) -> None:
        waiting: Sequence[Write] = [*writer._batch, *writer._queue]
        writer._batch = []
        writer._queue.clear()
        for write in waiting:
            if not write.kept:
                write.failed("The ledger cannot be written now; try again soon.")

    monkeypatch.setattr(Writer, "_keep_what_must_be", keep)
    assert found(template, "never charged", first=114)


def test_it_finds_a_tab_that_is_closed_too_early(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in flight of it has to be waited for."""
    flush = TabKeeper.flush

    def at_once(keeper: TabKeeper) -> None:
        for tab in keeper._closing.values():
            tab.flight.clear()
        flush(keeper)

    monkeypatch.setattr(TabKeeper, "flush", at_once)
    assert found(template, "broken_writes", first=155)


def test_it_finds_a_tab_that_is_not_settled(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was delivered under it has to be charged."""
    monkeypatch.setattr(TabKeeper, "capture", lambda keeper, hold, charge: keeper.release(hold))
    assert found(template, "never charged (under a tab)", first=109)


def test_it_finds_a_tab_that_is_spent_without_end(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no more than its amount, whatever is given back."""
    capture = TabKeeper.capture

    def gives_all_back(keeper: TabKeeper, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        capture(keeper, hold, charge, reply)
        if (tab := keeper._tabs.get(hold.tab_id or "")) is not None:
            tab.left = tab.amount

    monkeypatch.setattr(TabKeeper, "capture", gives_all_back)
    monkeypatch.setattr("embedmesh.rules.spending.REQUESTS_MIN", 4)
    assert found(template, "broken_writes", first=122)


def test_it_finds_tabs_that_are_not_recalled(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused at once while a tab of the account is open."""

    async def wait(*_: object) -> bool:
        return False

    monkeypatch.setattr(Recalls, "wait", wait)
    assert found(template, "was open all the time", first=147)


def test_it_finds_tabs_that_are_not_recovered(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead gateway had in tabs is given back when it comes back."""
    for name in ("tabs_of_owner", "live_tabs"):
        monkeypatch.setitem(TABS_SQL, name, TABS_SQL[name].rstrip(";") + " AND false")
    assert found(template, "tabs of its last life open", first=115)


def test_it_finds_a_recovery_that_does_nothing(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead gateway left open is released when it comes back, not only by the sweep."""
    for name in ("holds_of_owner", "open_holds"):
        monkeypatch.setitem(HOLDS_SQL, name, HOLDS_SQL[name].rstrip(";") + " AND false")
    assert found(template, "of its last life open", first=110)


def test_it_finds_a_recovery_that_takes_from_the_living(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds of gateways that live are theirs."""
    everybodys = HOLDS_SQL["open_holds"].rstrip(";") + " AND :owner <> ''"
    monkeypatch.setitem(HOLDS_SQL, "holds_of_owner", everybodys)
    assert found(template, "(recover)")


def test_it_finds_locks_that_end_with_their_gateway(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has used yet is not lost by a restart."""
    for name in ("holds_of_owner", "open_holds"):
        monkeypatch.setitem(HOLDS_SQL, name, HOLDS_SQL[name].partition("AND NOT EXISTS")[0])
    assert found(template, "was not used, and its hold was released by recover", first=105)


def test_it_finds_locks_without_a_bound(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("open_lock", "locks"):
        monkeypatch.setattr(f"embedmesh.storage.ledger.{where}.one_too_many", lambda *_: None)
    assert found(template, "unused locks at", first=104)


def test_it_finds_a_sweep_that_takes_holds_from_requests(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has the time that it needs, however soon its lock would have ended."""
    anyway = LOCKS_SQL["take_over_holds"].replace("CAST(value ->> 'deadline_ms' AS BIGINT)", "0")
    monkeypatch.setitem(LOCKS_SQL, "take_over_holds", anyway)
    assert found(template, "late_captures", first=112)
