"""`/v1/account`: what a key sees of its own account, what keys it can make, and an `Idempotency-Key` over HTTP."""

import asyncio
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from embedmesh.rules.caching import CachePolicy
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.books.new_keys import NewKeys
from tests.flow.world import MODEL, NATIVE
from tests.gateway.mesh import Applicant, Gateway, says, until
from tests.http.raw import Raw

pytestmark = pytest.mark.asyncio(loop_scope="module")  # over a file; test_money_api.py asks both kinds of stores

NUMBERS = itertools.count()
FAR_MS = 4_000_000_000_000
OPEN_TO_ANY = [("GET", "/v1/account"), ("GET", "/v1/account/usage"), ("GET", "/v1/account/entries")]
FOR_KEYS = [("GET", "/v1/account/keys"), ("POST", "/v1/account/keys"), ("DELETE", "/v1/account/keys/k")]


def told(reply: Raw) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    return dict(json.loads(reply.body))


def refused(reply: Raw, status: int, code: str) -> None:
    assert (reply.status, reply.error["code"]) == (status, code), reply.body


class Customer:
    """An account of its own, with a key."""

    def __init__(self, gw: Gateway, *scopes: str, credit: int = 1_000, **more: Any) -> None:
        self.gw = gw
        self.account = f"own-{next(NUMBERS)}"
        gw.books.accounts.create(self.account)
        gw.books.accounts.credit(self.account, credit, self.account)
        self.key_id, self.token = self.key(*(scopes or ("embeddings", "keys")), **more)

    def key(self, *scopes: str, **more: Any) -> tuple[str, str]:
        key, token = self.gw.books.keys.create(self.account, scopes, **more)
        return key.key_id, token

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Raw:
        return await self.gw.ask(method, path, body, key=self.token, **headers)

    async def make(self, **body: Any) -> Raw:
        return await self.ask("POST", "/v1/account/keys", {"scopes": ["embeddings"], **body})

    async def embed(self, text: str = "abc", **headers: str) -> Raw:
        return await self.ask("POST", "/v1/embeddings", {"model": "tiny", "input": text}, **headers)

    @property
    def balance(self) -> int:
        return self.gw.books.accounts.find(self.account).balance_nanousd


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), OPEN_TO_ANY + FOR_KEYS)
async def test_each_route_needs_a_key(gw: Gateway, method: str, path: str) -> None:
    for key in (None, "em_wrong"):
        refused(await gw.ask(method, path, b"{" if method == "POST" else None, key=key), 401, "invalid_api_key")


@pytest.mark.parametrize("scope", ["embeddings", "metrics", "keys", "admin"])
async def test_any_key_sees_its_account_and_only_one_with_the_scope_keys_sees_keys(gw: Gateway, scope: str) -> None:
    """An operator has routes of his own."""
    customer = Customer(gw, scope)
    for method, path in OPEN_TO_ANY:
        assert (await customer.ask(method, path)).status == 200
    for method, path in FOR_KEYS:
        reply = await customer.ask(method, path, b"{" if method == "POST" else None)
        if scope == "keys":
            assert reply.status == {"GET": 200, "POST": 400, "DELETE": 404}[method]
        else:
            refused(reply, 403, "insufficient_scope")


# -- money -------------------------------------------------------------------------------------------------------------


async def test_an_account_sees_what_it_has_and_what_it_may_spend(gw: Gateway) -> None:
    customer = Customer(gw, credit=5)
    gw.books.accounts.change(customer.account, credit_limit_nanousd=3, cache=CachePolicy.FREE)
    assert told(await customer.ask("GET", "/v1/account")) == {
        "id": customer.account,
        "balance_nanousd": 5,
        "held_nanousd": 0,
        "credit_limit_nanousd": 3,
        "available_nanousd": 8,
        "cache": "free",
    }


async def test_entries_come_in_pages_the_latest_first_and_are_only_its_own(gw: Gateway) -> None:
    customer, other = Customer(gw), Customer(gw)
    for number in range(1, 5):
        gw.books.accounts.credit(customer.account, number, f"{customer.account} {number}")
        gw.books.accounts.credit(other.account, number, f"{other.account} {number}")
    rows: list[dict[str, Any]] = []
    path: str | None = "/v1/account/entries?limit=2"
    while path is not None:
        page = told(await customer.ask("GET", path))
        rows += page["data"]
        assert page["has_more"] == (page["next"] is not None)
        path = f"/v1/account/entries?limit=2&before={page['next']}" if page["has_more"] else None
    assert [row["amount_nanousd"] for row in rows] == [4, 3, 2, 1, 1_000]
    assert {row["target_id"] for row in rows} == {customer.account}


async def test_usage_is_told_by_day_model_and_key(gw: Gateway, applicant: Applicant) -> None:
    customer = Customer(gw)
    before = gw.clock.unix_ms()
    async with applicant.member():
        costs = [int((await customer.embed()).headers["x-embedmesh-cost-nanousd"]) for _ in range(2)]
    await until("both are charged", lambda: customer.balance == 1_000 - sum(costs))
    days = [datetime.fromtimestamp(ms / 1000, UTC).date() for ms in (before, gw.clock.unix_ms())]
    told_now = told(await customer.ask("GET", "/v1/account/usage"))
    assert (told_now["from"], told_now["to"]) == (str(days[1] - timedelta(29)), str(days[1]))
    [row] = told_now["data"]
    assert row.pop("date") in map(str, days)
    expected = {"key_id": customer.key_id, "requests": 2, "tokens": 10, "cost_nanousd": sum(costs)}
    assert row == {"model": MODEL.id, **expected}
    long_ago = told(await customer.ask("GET", "/v1/account/usage?from=2025-11-01&to=2025-11-30"))
    assert (long_ago["data"], long_ago["has_more"]) == ([], False)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("usage?from=2026-11-02&to=2026-11-01", "invalid_value"),
        ("usage?from=2025-11-01&to=2026-11-02", "invalid_value"),
        ("usage?from=0001-01-01", "invalid_value"),
        ("usage?to=0001-01-01", "invalid_value"),
        ("usage?to=9999-12-32", "invalid_value"),
        ("usage?from=20261101", "invalid_value"),
        ("usage?from=2026-11-01%0A", "invalid_value"),
        ("usage?from=yesterday", "invalid_value"),
        ("usage?since=2026-11-01", "unknown_parameter"),
        ("entries?limit=0", "invalid_value"),
        ("entries?limit=1001", "invalid_value"),
        ("entries?before=-1", "invalid_value"),
        ("entries?before=" + "9" * 40, "invalid_value"),
        ("entries?limit=1e2", "invalid_value"),
        ("entries?after=1", "unknown_parameter"),
        ("usage?from=null", "invalid_value"),
        ("keys?limit=%D9%A1", "invalid_value"),
        ("keys?account=a", "unknown_parameter"),
    ],
)
async def test_queries_that_cannot_be(gw: Gateway, query: str, code: str) -> None:
    refused(await Customer(gw).ask("GET", f"/v1/account/{query}"), 400, code)


async def test_a_query_that_cannot_be_is_named(gw: Gateway) -> None:
    error = (await Customer(gw).ask("GET", "/v1/account/entries?limit=1001")).error
    assert (error["param"], error["message"]) == (
        "limit",
        "The query parameter `limit` is not valid: Expected `int` <= 1000.",
    )


@pytest.mark.parametrize("query", ["usage?to=9999-12-31", "usage?to=1970-01-01", "usage?from=2025-11-01&to=2026-11-01"])
async def test_queries_that_just_can_be(gw: Gateway, query: str) -> None:
    assert told(await Customer(gw).ask("GET", f"/v1/account/{query}"))["data"] == []


# -- keys --------------------------------------------------------------------------------------------------------------


async def test_an_account_makes_lists_and_revokes_its_own_keys(gw: Gateway) -> None:
    customer = Customer(gw)
    made = told(await customer.make(name="n", expires_ms=FAR_MS, limits={"models": ["tiny"], "concurrency": 2}))
    token = made.pop("key")
    assert (made["account"], made["scopes"], made["limits"]["models"]) == (customer.account, ["embeddings"], [MODEL.id])
    listed = told(await customer.ask("GET", "/v1/account/keys"))["data"]
    assert [row["key_id"] for row in listed] == [customer.key_id, made["key_id"]]
    assert listed[1] == made
    assert (await gw.ask("GET", "/v1/account", key=token)).status == 200
    for _ in range(2):
        assert told(await customer.ask("DELETE", f"/v1/account/keys/{made['key_id']}"))["state"] == "revoked"
    async with asyncio.timeout(1.0):
        while (await gw.ask("GET", "/v1/account", key=token)).status != 401:
            await asyncio.sleep(0.01)


async def test_a_key_of_another_account_is_not_there(gw: Gateway) -> None:
    customer, other = Customer(gw), Customer(gw)
    refused(await customer.ask("DELETE", f"/v1/account/keys/{other.key_id}"), 404, "not_found")
    refused(await customer.ask("GET", f"/v1/account/keys?after={other.key_id}"), 404, "not_found")
    assert gw.books.keys.find(other.key_id).revoked_ms is None


@pytest.mark.parametrize("scope", ["admin:read", "audit"])
async def test_nor_is_the_key_of_who_watches(gw: Gateway, scope: str) -> None:
    customer = Customer(gw)
    key_id, _ = customer.key(scope, "metrics")
    says(await customer.ask("DELETE", f"/v1/account/keys/{key_id}"), 403, "operator")


async def test_an_operators_key_is_not_revoked_here(gw: Gateway) -> None:
    """Whoever finds a customer's key does not lock the operator out; a key of the operator may end another."""
    customer = Customer(gw)
    key_id, token = customer.key("admin", "keys")
    says(await customer.ask("DELETE", f"/v1/account/keys/{key_id}"), 403, "operator")
    assert (await gw.ask("GET", "/v1/admin/payables", key=token)).status == 200
    customer.token = token
    assert told(await customer.ask("DELETE", f"/v1/account/keys/{key_id}"))["state"] == "revoked"


OWN = Limits(
    models=(MODEL.id,), requests_a_minute=10, tokens_a_minute=10, concurrency=10, budget_day=10, budget_month=10
)
AS_NARROW: dict[str, Any] = {
    "models": ["tiny"],
    "requests_a_minute": 10,
    "tokens_a_minute": 10,
    "concurrency": 10,
    "budget_day": 10,
    "budget_month": 0,
}


@pytest.mark.parametrize("scopes", [["metrics"], ["embeddings", "metrics"], ["admin"], ["keys", "admin"]])
async def test_a_key_cannot_give_a_scope_that_it_lacks(gw: Gateway, scopes: list[str]) -> None:
    reply = await Customer(gw).make(scopes=scopes)
    says(reply, 403, f"`{scopes[-1]}`")
    assert (reply.error["code"], reply.error["param"]) == ("insufficient_scope", "scopes")


async def test_even_an_operator_gives_no_admin_scope_here(gw: Gateway) -> None:
    says(await Customer(gw, "admin", "keys").make(scopes=["admin"]), 403, "`admin`")


@pytest.mark.parametrize(
    ("param", "loose"),
    [(f"limits.{name}", value) for name in AS_NARROW if name != "models" for value in (11, None)]
    + [("limits.models", ["acme/native"]), ("limits.models", ["tiny", "acme/native"])]
    + [("limits.models", []), ("limits.models", None), ("expires_ms", FAR_MS + 1), ("expires_ms", None)],
)
async def test_a_key_cannot_make_one_that_may_do_more_than_itself(gw: Gateway, param: str, loose: object) -> None:
    """No limit is looser than any."""
    customer = Customer(gw, limits=OWN, expires_ms=FAR_MS)
    name = param.removeprefix("limits.")
    reply = await customer.make(**({name: loose} if param == name else {"limits": {name: loose}}))
    assert (reply.status, reply.error["code"]) == (403, "insufficient_scope")
    assert reply.error["param"] == param
    assert len(told(await customer.ask("GET", "/v1/account/keys"))["data"]) == 1


async def test_a_key_can_make_one_that_may_do_the_same_or_less(gw: Gateway) -> None:
    """What is not named of it is as that of the key that makes it."""
    customer = Customer(gw, limits=OWN, expires_ms=FAR_MS)
    own = msgspec.to_builtins(OWN)
    for less in ({}, {"concurrency": 1}, {"budget_day": 0}, {"models": ["tiny"]}):
        made = told(await customer.make(limits=less))
        assert made["limits"] == own | less | {"models": [MODEL.id]}
        assert (made["expires_ms"], made["parent_id"]) == (FAR_MS, customer.key_id)
    assert told(await customer.make(expires_ms=FAR_MS - 1))["expires_ms"] == FAR_MS - 1


async def test_a_key_without_limits_can_make_any(gw: Gateway) -> None:
    for limits in ({}, {"models": [NATIVE.id]}, AS_NARROW):
        assert (await Customer(gw).make(limits=limits)).status == 200


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"scopes": []}, 400, "invalid_value"),
        ({"scopes": ["all"]}, 400, "invalid_value"),
        ({"account": "a"}, 400, "invalid_value"),
        ({"limits": {"concurrency": 0}}, 400, "invalid_value"),
        ({"name": "n" * 129}, 400, "invalid_value"),
        ({"limits": {"models": ["none"]}}, 404, "model_not_found"),
    ],
)
async def test_a_key_that_cannot_be(gw: Gateway, body: dict[str, Any], status: int, code: str) -> None:
    refused(await Customer(gw).make(**body), status, code)


async def test_a_key_gets_the_limits_that_the_gateway_was_told(gw: Gateway) -> None:
    """But for those that are given, and those of the key that makes it; an operator may say that there are none."""
    said = NewKeys(Limits(requests_a_minute=60, tokens_a_minute=1_000, concurrency=8))
    gw.books.new_keys.write(said)
    try:
        customer, limited = Customer(gw), Customer(gw, limits=Limits(requests_a_minute=70, budget_day=5))
        made = [
            told(await customer.make()),
            told(await customer.make(limits={"concurrency": None, "tokens_a_minute": 7})),
            told(await limited.make()),
            told(
                await gw.admin("POST", "/keys", {"account": "a", "scopes": ["keys"], "limits": {"concurrency": None}})
            ),
        ]
    finally:
        gw.books.new_keys.write(NewKeys())
    numbers = [
        {name: value for name, value in each["limits"].items() if value is not None and name != "models"}
        for each in made
    ]
    assert numbers == [
        {"requests_a_minute": 60, "tokens_a_minute": 1_000, "concurrency": 8},
        {"requests_a_minute": 60, "tokens_a_minute": 7},
        {"requests_a_minute": 70, "tokens_a_minute": 1_000, "concurrency": 8, "budget_day": 5},
        {"requests_a_minute": 60, "tokens_a_minute": 1_000},
    ]


async def test_a_key_multiplies_its_budget_by_no_keys_that_it_makes(gw: Gateway, applicant: Applicant) -> None:
    """However many, and however deep: what they spend is its own."""
    customer = Customer(gw, limits=Limits(budget_day=500, requests_a_minute=1_000))
    async with applicant.member():
        cost = int((await customer.embed()).headers["x-embedmesh-cost-nanousd"])
        tokens = [customer.token]
        for number in range(12):
            customer.token = tokens[number // 4]
            tokens.append(told(await customer.make(scopes=["embeddings", "keys"]))["key"])
        outcomes = []
        for number in range(2 * 500 // cost):
            customer.token = tokens[number % len(tokens)]
            outcomes.append((await customer.embed()).status)
        reply = await customer.embed()
    assert outcomes.count(200) == 500 // cost - 1
    refused(reply, 429, "insufficient_quota")
    assert "The API key that this one draws from has a budget of $0.0000005 a day" in str(reply.error["message"])
    await until("all is charged", lambda: customer.balance == 1_000 - 500 // cost * cost)


async def test_a_key_takes_those_that_it_made_with_it(gw: Gateway) -> None:
    customer = Customer(gw)
    child = told(await customer.make(scopes=["keys"]))
    assert child["parent_id"] == customer.key_id
    told(await gw.admin("DELETE", f"/keys/{customer.key_id}"))
    assert told(await gw.admin("GET", f"/keys/{child['key_id']}"))["state"] == "revoked"
    async with asyncio.timeout(1.0):
        while (await gw.ask("GET", "/v1/account", key=child["key"])).status != 401:
            await asyncio.sleep(0.01)


async def test_keys_are_made_to_a_depth_and_a_number(gw: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal names its bound."""
    customer = Customer(gw)
    for _ in range(4):
        customer.token = told(await customer.make(scopes=["keys"]))["key"]
    says(await customer.make(scopes=["keys"]), 403, "a depth of 4")
    monkeypatch.setattr("embedmesh.storage.books.key_family.ACCOUNT_KEYS_MAX", 5)
    body = {"account": customer.account, "scopes": ["keys"]}
    says(await gw.admin("POST", "/keys", body), 400, "at most 5 good keys")
    customer = Customer(gw)
    monkeypatch.setattr("embedmesh.storage.books.key_family.ACCOUNT_KEYS_A_DAY_MAX", 1)
    over = await customer.make()
    refused(over, 429, "rate_limit_exceeded")
    assert "at most 1 keys" in str(over.error["message"])
    assert 86_000 < int(over.headers["retry-after"]) < 90_000


LIMITED = [*OPEN_TO_ANY, *FOR_KEYS, ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/metrics")]


@pytest.mark.parametrize(("method", "path"), LIMITED)
async def test_questions_count_against_the_requests_of_a_key(gw: Gateway, method: str, path: str) -> None:
    """As embeddings do: over the limit there is a 429 that says when to come again, whatever is asked."""
    customer = Customer(gw, "keys", "metrics", limits=Limits(requests_a_minute=1))
    assert (await customer.ask("GET", "/v1/account")).status == 200
    over = await customer.ask(method, path, b"{" if method == "POST" else None)
    refused(over, 429, "rate_limit_exceeded")
    assert 1 <= int(over.headers["retry-after"]) <= 75
    assert (await gw.ask("GET", "/v1/account", key=gw.key("keys"))).status == 200


async def test_an_operators_questions_are_not_counted(gw: Gateway) -> None:
    """Whoever has to end a key that loops is never told to wait."""
    operator = Customer(gw, "admin", "keys", "metrics", limits=Limits(requests_a_minute=1))
    for method, path in [*LIMITED, ("GET", "/v1/admin/keys")]:
        for _ in range(2):
            assert (await operator.ask(method, path, b"{" if method == "POST" else None)).status != 429


# -- what limits and an Idempotency-Key do over HTTP -------------------------------------------------------------------


async def test_a_key_with_limits_is_told_what_is_left_and_refused_beyond_them(
    gw: Gateway, applicant: Applicant
) -> None:
    customer = Customer(gw, limits=Limits(requests_a_minute=2, tokens_a_minute=100))
    async with applicant.member():
        first = await customer.embed()
        assert {
            name: first.headers[f"x-ratelimit-{name}"]
            for name in ("limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens")
        } == {"limit-requests": "2", "remaining-requests": "1", "limit-tokens": "100", "remaining-tokens": "95"}
        await customer.embed()
        over = await customer.embed()
    refused(over, 429, "rate_limit_exceeded")
    assert {"retry-after", "retry-after-ms"} <= set(over.headers)
    assert customer.balance >= 1_000 - 2 * int(first.headers["x-embedmesh-cost-nanousd"])


async def test_the_same_idempotency_key_gives_the_same_bytes_and_is_charged_once(
    gw: Gateway, applicant: Applicant
) -> None:
    customer = Customer(gw)
    async with applicant.member():
        first = await customer.embed(Idempotency_Key="order 1")
        asked = list(applicant.engine.asked)
        again = [await customer.embed(Idempotency_Key="order 1") for _ in range(2)]
        assert "idempotent-replayed" not in first.headers
        for reply in again:
            assert (reply.status, reply.body) == (200, first.body)
            assert reply.headers["idempotent-replayed"] == "true"
        refused(conflict := await customer.embed("abd", Idempotency_Key="order 1"), 409, "idempotency_conflict")
        assert conflict.headers["x-should-retry"] == "false"
        _, customer.token = customer.key("embeddings")  # another key of the account: the same order
        assert (await customer.embed(Idempotency_Key="order 1")).body == first.body
        assert applicant.engine.asked == asked  # no node was asked again
        stranger = await Customer(gw).embed(Idempotency_Key="order 1")
        assert "idempotent-replayed" not in stranger.headers
    await until("it is charged", lambda: customer.balance < 1_000)
    assert customer.balance == 1_000 - int(first.headers["x-embedmesh-cost-nanousd"])
    [charge] = [row for row in gw.books.reports.entries(customer.account) if row.kind == "charge"]
    assert charge.amount == customer.balance - 1_000


async def test_a_request_with_the_same_idempotency_key_waits_for_the_one_that_runs(
    gw: Gateway, applicant: Applicant
) -> None:
    customer = Customer(gw)
    async with applicant.member():
        applicant.engine.open.clear()
        both = [asyncio.create_task(customer.embed(Idempotency_Key="order 2")) for _ in range(2)]
        await until("one runs", lambda: applicant.engine.running)
        await asyncio.sleep(0.05)
        assert applicant.engine.running == 1
        applicant.engine.open.set()
        first, second = await asyncio.gather(*both)
    assert first.body == second.body
    assert ("idempotent-replayed" in first.headers) != ("idempotent-replayed" in second.headers)
    await until("it is charged", lambda: customer.balance < 1_000)
    assert len([row for row in gw.books.reports.entries(customer.account) if row.kind == "charge"]) == 1


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_an_idempotency_key_that_is_none(gw: Gateway, key: str) -> None:
    refused(await Customer(gw).embed(Idempotency_Key=key), 400, "invalid_value")


async def test_calls_of_one_account_leave_room_for_those_of_others(gw: Gateway) -> None:
    """Until their replies are read: each may have two megabytes."""
    token = gw.key("embeddings", "keys")
    room = gw.account_api._room
    gw.books.accounts.create("roomy")
    another = gw.books.keys.create("roomy", ["embeddings"])[1]
    while room.shares.take("a", 1):
        pass
    taken = room.taken
    try:
        refused(await gw.ask("GET", "/v1/account/usage", key=token), 503, "overloaded")
        assert (await gw.ask("GET", "/v1/account/usage", key=another)).status == 200
        assert room.taken == taken
    finally:
        room.give_back("a", taken)


async def test_a_key_that_asks_without_end_does_not_delay_an_operator(gw: Gateway) -> None:
    """Counted: while a key is revoked by an admin's call, most of its connections wait."""
    token, connections, answered, end = gw.key("embeddings", "keys"), 30, 0, False

    async def without_end(path: str) -> None:
        nonlocal answered
        while not end:
            assert (await gw.ask("GET", path, key=token)).status in (200, 503)
            answered += 1

    paths = ["/v1/account/usage", "/v1/account/entries", "/v1/account/keys"]
    looping = [asyncio.create_task(without_end(paths[number % 3])) for number in range(connections)]
    while answered < connections:
        await asyncio.sleep(0.002)
    for _ in range(10):
        key, _ = gw.books.keys.create("a", ["embeddings"])
        before = answered
        assert (await gw.admin("DELETE", f"/keys/{key.key_id}")).status == 200
        assert answered - before <= connections // 2  # in one line with all of them it were that many
    end = True
    await asyncio.gather(*looping)
