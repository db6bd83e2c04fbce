"""Locks that come with replies: which calls ask, what is used, and that the bad ways end as those of any lock."""

import asyncio
import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embedmesh.client import AsyncClient, CallRefused, Client, NodeNotTrusted
from embedmesh.client.core import LockStep, Trust
from embedmesh.client.pins import Pins
from embedmesh.client.reserves import GOOD_MS, MODELS_MAX, RESERVES_MAX, Reserves
from embedmesh.client.wanted import want
from embedmesh.confidential import documents
from embedmesh.rules.confidential import SDK_SCHEME
from embedmesh.rules.exchange import NEXT_LOCK_HEADER
from tests.client.gateway import (
    ALIAS,
    KEY,
    MODEL,
    TEXT,
    Members,
    Raw,
    Received,
    ScriptedGateway,
    ScriptedNode,
    envelope,
    now_ms,
)
from tests.client.test_confidential import WRONG_LOCKS, seen

LOCK, SEALED = "/nodes/lock", "/confidential/embeddings"
CALL: Members = {"model": ALIAS, "input": TEXT}
Series = Callable[..., list[Any]]


@pytest.fixture(params=["sync", "async"])
def series(request: pytest.FixtureRequest, gateway: ScriptedGateway, pins: Path) -> Series:
    """Calls of one client, one after another, each with the members given: their replies, and the error that ends it.

    `before` is called with the number of each call.
    """

    def given(**more: Any) -> Members:
        return {"base_url": gateway.base_url, "api_key": KEY, "pins": pins, "confidential": True, **more}

    def blocking(each: list[Members], before: Callable[[int], object], **of_client: Any) -> list[Any]:
        replies: list[Any] = []
        with Client(**given(**of_client)) as client:
            for number, members in enumerate(each):
                before(number)
                replies.append(client.embeddings.create(**CALL | members))
        return replies

    async def waiting(each: list[Members], before: Callable[[int], object], **of_client: Any) -> list[Any]:
        replies: list[Any] = []
        async with AsyncClient(**given(**of_client)) as client:
            for number, members in enumerate(each):
                before(number)
                replies.append(await client.embeddings.create(**CALL | members))
        return replies

    def run(*each: Members, before: Callable[[int], object] = lambda number: None, **of_client: Any) -> list[Any]:
        if request.param == "sync":
            return blocking(list(each), before, **of_client)
        return asyncio.run(waiting(list(each), before, **of_client))

    return run


def at_call(number: int, do: Callable[[], object]) -> Callable[[int], object]:
    return lambda at: do() if at == number else None


# -- the right way -----------------------------------------------------------------------------------------------------


def test_calls_that_follow_one_another_have_one_exchange_each(gateway: ScriptedGateway, series: Series) -> None:
    """The first does not ask: it may be the only one. The second asks, and so do all that follow."""
    replies = series({}, {}, {}, {}, {})
    assert gateway.paths == [LOCK, SEALED, LOCK, SEALED, SEALED, SEALED, SEALED]
    sealed = [one for one in gateway.received if one.path.endswith(SEALED)]
    asked = [one.headers.get(NEXT_LOCK_HEADER) for one in sealed]
    assert asked == [None, *[f"256 {gateway.node.node_id}"] * 4]
    assert len({one.body["stack_small_id"] for one in sealed}) == 5, "each lock is used once"
    assert [reply.data for reply in replies] == [replies[0].data] * 5
    assert not seen(gateway)


def test_who_does_not_want_locks_ahead_asks_for_none(gateway: ScriptedGateway, series: Series) -> None:
    series({}, {}, {}, lock_ahead=False)
    assert gateway.paths == [LOCK, SEALED] * 3
    assert not any(NEXT_LOCK_HEADER in one.headers for one in gateway.received)


def test_the_scheme_of_the_sdks_asks_for_none(gateway: ScriptedGateway, series: Series) -> None:
    series({}, {}, {}, scheme=SDK_SCHEME)
    assert gateway.paths == [LOCK, SEALED] * 3
    assert not any(NEXT_LOCK_HEADER in one.headers for one in gateway.received)


def test_a_gateway_that_gives_none_is_asked_for_locks_as_ever(gateway: ScriptedGateway, series: Series) -> None:
    gateway.gives_ahead = False
    series({}, {}, {})
    assert gateway.paths == [LOCK, SEALED] * 3


def test_a_larger_call_locks_for_itself_and_leaves_the_lock_to_a_smaller_one(
    gateway: ScriptedGateway, series: Series
) -> None:
    series({}, {}, {"input": "x" * 1_000}, {})
    assert gateway.paths == [LOCK, SEALED, LOCK, SEALED, LOCK, SEALED, SEALED]


def test_a_smaller_call_takes_a_larger_lock(gateway: ScriptedGateway, series: Series) -> None:
    series({}, {"input": "x" * 1_000}, {})
    assert gateway.paths == [LOCK, SEALED, LOCK, SEALED, SEALED]


def test_a_lock_is_for_one_model(gateway: ScriptedGateway, series: Series) -> None:
    series({}, {}, {"model": MODEL}, {})
    assert gateway.paths == [LOCK, SEALED, LOCK, SEALED, LOCK, SEALED, SEALED]


def test_keys_that_have_not_changed_are_verified_once(
    gateway: ScriptedGateway, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other bytes, or under another signature, they are verified anew, as the table of wrong locks shows."""
    verified: list[bytes] = []
    read_keys = documents.read_keys

    def counted(signed: Any) -> Any:
        verified.append(signed.document)
        return read_keys(signed)

    monkeypatch.setattr(documents, "read_keys", counted)
    series({}, {}, {}, {})
    assert len(verified) == 1
    gateway.node.models["another/model"] = "digest"
    series({}, {}, {}, {})
    assert len(verified) == 2


def test_threads_that_share_a_client_never_share_a_lock(gateway: ScriptedGateway, pins: Path) -> None:
    """What is left in the end is no more than ran at one time."""
    with (
        Client(base_url=gateway.base_url, api_key=KEY, pins=pins, confidential=True) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda number: client.embeddings.create(model=ALIAS, input=f"text {number}"), range(80)))
    sealed = [one.body["stack_small_id"] for one in gateway.received if one.path.endswith(SEALED)]
    assert len(sealed) == len(set(sealed)) == 80
    assert len(gateway.locks) - len(sealed) <= 8
    assert gateway.paths.count(LOCK) < 80


# -- the bad ways ------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[int, str]] = [
    (404, "lock_not_found"),
    (409, "lock_used"),
    (409, "lock_expired"),
    (400, "key_mismatch"),
    (400, "confidential_refused"),
    (503, "no_node_available"),
    (503, "overloaded"),
]


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_a_lock_that_is_of_no_use_is_followed_by_a_fresh_one(
    gateway: ScriptedGateway, series: Series, status: int, code: str
) -> None:
    """At once, and also where the call may try nothing twice. The text is sealed anew."""
    left = [(status, envelope(code))]

    def refuse_next() -> None:
        gateway.script = lambda one: left.pop() if left and one.path.endswith(SEALED) else None

    replies = series({}, {}, {}, {}, before=at_call(2, refuse_next), max_retries=0)
    assert len(replies) == 4
    assert gateway.paths == [LOCK, SEALED, LOCK, SEALED, SEALED, LOCK, SEALED, SEALED]
    first, second = gateway.received[4].body, gateway.received[6].body
    assert first["ciphertext"] != second["ciphertext"]
    assert first["stack_small_id"] != second["stack_small_id"]
    assert not seen(gateway)


def test_a_second_refusal_is_the_calls_end(gateway: ScriptedGateway, series: Series) -> None:
    """A fresh lock that is refused is treated as ever."""

    def refuse() -> None:
        gateway.script = lambda one: (404, envelope("lock_not_found")) if one.path.endswith(SEALED) else None

    with pytest.raises(CallRefused, match="lock_not_found"):
        series({}, {}, {}, before=at_call(2, refuse))
    assert gateway.paths[4:] == [SEALED, LOCK, SEALED]


@pytest.mark.parametrize(("status", "code"), [(409, "lock_used"), (503, "overloaded")])
def test_a_lock_that_the_request_may_have_used_itself_is_not_followed_by_another(
    gateway: ScriptedGateway, series: Series, status: int, code: str
) -> None:
    """The reply broke off, and the same bytes are refused: the first time it may have been paid."""
    answers: list[Any] = [(status, envelope(code)), Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")]

    def break_off() -> None:
        gateway.script = lambda one: answers.pop() if answers else None

    with pytest.raises(CallRefused, match=code):
        series({}, {}, {}, before=at_call(2, break_off), max_retries=0)
    assert gateway.paths[4:] == [SEALED, SEALED]
    assert gateway.received[4].raw == gateway.received[5].raw


def test_a_gateway_that_is_away_for_a_moment_gets_the_same_bytes_later(gateway: ScriptedGateway, pins: Path) -> None:
    """No lock is asked for before them that would have waited for it."""
    from random import Random

    from embedmesh.client.steps import HttpAnswer, NoAnswer, Patience, Pause, ToSend, confidential

    wanted = want(model=ALIAS, input=TEXT, fields={})
    step = LockStep(wanted, Trust(Pins.read(pins)))
    patience = Patience(2, lambda: 60.0, Random(1))
    steps = confidential(wanted, step, patience, now_ms)
    assert isinstance(next(steps), ToSend)
    lock = json.dumps(gateway.lock(json.loads(step.body))).encode()
    sent = steps.send(HttpAnswer(200, {}, lock))
    away = NoAnswer("connect", "it cannot be reached")
    assert steps.send(away) == sent
    assert isinstance(steps.send(away), Pause)
    assert steps.send(None) == sent
    assert isinstance(sent, ToSend)
    status, reply = gateway.sealed(json.loads(sent.body))
    with pytest.raises(StopIteration):
        steps.send(HttpAnswer(status, {}, json.dumps(reply).encode()))


@pytest.mark.parametrize("wrong", [name for name in WRONG_LOCKS if name != "no JSON object"])
def test_a_wrong_lock_that_came_with_a_reply_is_no_better_than_another(
    gateway: ScriptedGateway, series: Series, wrong: str
) -> None:
    """It is checked before anything is sealed for it, as the table says, and the next call has nothing of it."""
    do, reason = WRONG_LOCKS[wrong]
    with pytest.raises(NodeNotTrusted, match="Nothing was sent") as caught:
        series({}, {}, {}, before=at_call(1, lambda: spoil_next(gateway, do)))
    assert caught.value.reason == reason
    assert gateway.paths == [LOCK, SEALED, LOCK, SEALED]
    assert not seen(gateway)


def spoil_next(gateway: ScriptedGateway, do: Callable[[ScriptedGateway], object]) -> None:
    """What would be changed in the reply to a lock request is changed in the lock that comes with a reply."""
    do(gateway)
    change, gateway.on_lock = gateway.on_lock, lambda reply: reply
    gateway.on_reply = lambda reply: reply | ({"next_lock": change(reply["next_lock"])} if "next_lock" in reply else {})


@pytest.mark.parametrize("junk", [None, 7, "a", [], {}])
def test_junk_in_the_place_of_a_lock(gateway: ScriptedGateway, series: Series, junk: Any) -> None:
    """The reply that it came with is right. Null is none; else the next call raises."""
    gateway.on_reply = lambda reply: reply | {"next_lock": junk}
    if junk is None:
        series({}, {}, {})
        assert gateway.paths == [LOCK, SEALED] * 3
        return
    with pytest.raises(NodeNotTrusted) as caught:
        series({}, {}, {})
    assert caught.value.reason == "form"


def test_a_lock_that_was_not_asked_for_is_not_kept(gateway: ScriptedGateway, series: Series) -> None:
    gateway.on_reply = lambda reply: reply | {"next_lock": gateway.lock({"max_num_tokens": 256, "scheme": "hpke-1"})}
    series({}, {}, {}, lock_ahead=False)
    assert gateway.paths == [LOCK, SEALED] * 3


def test_a_node_that_is_not_pinned_is_left_for_one_that_is(gateway: ScriptedGateway, series: Series) -> None:
    """As where a lock was asked for: nothing is sealed for it."""
    pinned, other = gateway.node, ScriptedNode()

    def change(reply: Members) -> Members:
        if "next_lock" not in reply:
            return reply
        gateway.nodes = [other]
        stranger = gateway.lock({"max_num_tokens": 256, "scheme": "hpke-1"})
        gateway.nodes = [pinned]
        return reply | {"next_lock": stranger}

    gateway.on_reply = change
    assert len(series({}, {}, {})) == 3
    assert gateway.paths == [LOCK, SEALED] * 3
    assert other.opened == []


def test_what_the_header_says_has_nothing_of_the_text(gateway: ScriptedGateway, series: Series) -> None:
    series({}, {}, {})
    for one in gateway.received:
        assert TEXT not in str(one.headers)
        assert base64.b64encode(TEXT.encode()).decode() not in str(one.headers)


# -- how many there are ------------------------------------------------------------------------------------------------


def test_rare_calls_ask_for_none() -> None:
    reserves = Reserves()
    for number in range(3):
        call = reserves.begin("m", 256, number * GOOD_MS)
        assert not call.asks
        call.end()


def test_an_old_lock_is_not_used() -> None:
    reserves = Reserves()
    reserves.begin("m", 256, 0).end()
    call = reserves.begin("m", 256, 1)
    assert call.asks
    call.keep(b"lock", 256, 1)
    call.end()
    reserves.begin("m", 257, 2).end()
    for late in (GOOD_MS + 1, 0):
        other = reserves.begin("m", 256, late)  # the clock may have been set back, too
        assert other.reserve is None
        other.end()


def test_there_are_never_more_than_calls_at_one_time() -> None:
    """All of them ask, up to a bound; what they get is used before more is asked for."""
    reserves = Reserves()
    reserves.begin("m", 256, 0).end()
    calls = [reserves.begin("m", 256, 1) for _ in range(RESERVES_MAX + 5)]
    assert sum(call.asks for call in calls) == RESERVES_MAX
    for call in calls:
        call.keep(b"lock", 256, 1)
        call.end()
    alone = [reserves.begin("m", 256, 2) for _ in range(1)]
    assert alone[0].reserve is not None
    assert not alone[0].asks, "there are enough"
    alone[0].end()


def test_a_call_that_fails_gives_its_place_back() -> None:
    reserves = Reserves()
    reserves.begin("m", 256, 0).end()
    for _ in range(RESERVES_MAX + 5):
        call = reserves.begin("m", 256, 1)
        assert call.asks
        call.end()
        call.end()  # twice changes nothing


def test_after_a_refusal_none_of_that_time_is_used() -> None:
    reserves = Reserves()
    reserves.begin("m", 256, 0).end()
    calls = [reserves.begin("m", 256, 1) for _ in range(3)]
    for call in calls:
        call.keep(b"lock", 256, 1)
        call.end()
    call = reserves.begin("m", 256, 2)
    call.refused()
    call.end()
    assert reserves.begin("m", 256, 3).reserve is None


def test_models_are_bounded() -> None:
    reserves = Reserves()
    for number in range(MODELS_MAX + 1):
        for at in range(2):
            call = reserves.begin(f"m{number}", 256, at)
            assert call.asks == (at == 1 and number < MODELS_MAX)
            call.end()


def test_a_scripted_gateway_gives_no_second_lock_for_the_same_bytes(gateway: ScriptedGateway, pins: Path) -> None:
    """The tests above stand on it."""
    wanted = want(model=ALIAS, input=TEXT, fields={})
    step = LockStep(wanted, Trust(Pins.read(pins)))
    sealed = step.read(json.dumps(gateway.lock(json.loads(step.body))).encode(), now_ms())
    received = Received(f"/v1{SEALED}", step.ahead, sealed.body)
    first, again = gateway.answer(received), gateway.answer(received)
    assert not isinstance(first, Raw)
    assert not isinstance(again, Raw)
    assert ("next_lock" in first[1], "next_lock" in again[1]) == (True, False)
