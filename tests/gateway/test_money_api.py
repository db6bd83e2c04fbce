"""`/v1/admin` on accounts, keys and money: for keys with the scope `admin`, over a real store of each kind."""

import asyncio
import itertools
import json
import threading
import time
from typing import Any

import pytest

from embedmesh.rules.holds import Charge, Hold, Payable
from embedmesh.rules.tabs import Tab
from embedmesh.storage.ledger.charge_holds import REVENUE
from embedmesh.storage.ledger.open_tab import OpenTab
from embedmesh.storage.ledger.settle_tab import SettleRequest
from tests.flow.world import MODEL
from tests.gateway.mesh import ON_EACH_STORE, Applicant, Gateway, says, until
from tests.http.raw import Raw

pytestmark = [pytest.mark.asyncio(loop_scope="module"), ON_EACH_STORE]

NUMBERS = itertools.count()
FAR_MS = 4_000_000_000_000
ROUTES = [
    ("GET", "/accounts"),
    ("POST", "/accounts"),
    ("GET", "/accounts/a"),
    ("POST", "/accounts/a"),
    ("POST", "/accounts/a/credits"),
    ("GET", "/accounts/a/statement?month=2026-11"),
    ("GET", "/keys"),
    ("POST", "/keys"),
    ("GET", "/keys/k"),
    ("POST", "/keys/k"),
    ("POST", "/keys/k/rotate"),
    ("DELETE", "/keys/k"),
    ("GET", "/prices"),
    ("POST", "/prices"),
    ("DELETE", "/prices"),
    ("GET", "/requests/r"),
    ("POST", "/requests/r/refund"),
    ("GET", "/tabs/t"),
    ("GET", "/payables"),
    ("POST", "/payouts"),
    ("GET", "/ledger"),
]


def told(reply: Raw) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    return dict(json.loads(reply.body))


def refused(reply: Raw, status: int, code: str) -> None:
    assert (reply.status, reply.error["code"]) == (status, code), reply.body


async def new_account(gw: Gateway, **more: Any) -> str:
    name = f"money-{next(NUMBERS)}"
    told(await gw.admin("POST", "/accounts", {"id": name, **more}))
    return name


async def new_key(gw: Gateway, account: str = "a", *scopes: str, **more: Any) -> dict[str, Any]:
    body = {"account": account, "scopes": scopes or ("embeddings",), **more}
    return told(await gw.admin("POST", "/keys", body))


async def embed(gw: Gateway, key: str) -> Raw:
    """Three letters and two special tokens: five tokens."""
    reply = await gw.ask("POST", "/v1/embeddings", {"model": "tiny", "input": "abc"}, key=key)
    assert reply.status == 200, reply.body
    return reply


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_each_route_needs_a_key_with_the_scope_admin(gw: Gateway, method: str, path: str) -> None:
    """Before the body is looked at."""
    body = b"{" if method == "POST" else None
    for key, status, code in [
        (None, 401, "invalid_api_key"),
        ("em_wrong", 401, "invalid_api_key"),
        (gw.key("embeddings", "keys", "metrics"), 403, "insufficient_scope"),
    ]:
        refused(await gw.ask(method, f"/v1/admin{path}", body, key=key), status, code)


BROKEN = {b'{"id":"\xff"}': "not UTF-8 at byte 7 ", b"\xef\xbb\xbf{}": "starts with a byte order mark"}
OTHER_FORMS = (b"", b"{", b"[]", b'{"surprise":1}', b'{"id":1,"account":1,"model":1,"node":1,"amount_nanousd":"1"}')


@pytest.mark.parametrize("body", OTHER_FORMS)
@pytest.mark.parametrize("path", [path for method, path in ROUTES if method == "POST"])
async def test_a_body_of_another_form_is_refused(gw: Gateway, path: str, body: bytes) -> None:
    reply = await gw.admin("POST", path, body)
    if path.endswith("rotate") and body == b"":
        refused(reply, 404, "not_found")  # it needs none
    else:
        refused(reply, 400, "invalid_value")


@pytest.mark.parametrize(("body", "said"), BROKEN.items())
async def test_broken_bytes_are_placed(gw: Gateway, body: bytes, said: str) -> None:
    for path in [path for method, path in ROUTES if method == "POST" and not path.endswith("rotate")]:
        reply = await gw.admin("POST", path, body)
        refused(reply, 400, "invalid_value")
        assert said in reply.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/accounts/none", None),
        ("GET", "/accounts/%00", None),
        ("GET", "/accounts/%C3%28", None),
        ("GET", "/accounts?after=none", None),
        ("POST", "/accounts/none", {"credit_limit_nanousd": 1}),
        ("POST", "/accounts/none", {"cache": "free"}),
        ("POST", "/accounts/none/credits", {"amount_nanousd": 1, "reference": "none"}),
        ("POST", "/accounts/a/debits", {"amount_nanousd": 1, "reference": "none"}),
        ("GET", "/keys/none", None),
        ("GET", "/keys?account=none", None),
        ("GET", "/keys?after=none", None),
        ("POST", "/keys", {"account": "none", "scopes": ["embeddings"]}),
        ("POST", "/keys/none", {"name": "n"}),
        ("POST", "/keys/none", {"limits": {"concurrency": 1}}),
        ("POST", "/keys/none/rotate", {}),
        ("POST", "/keys/none/renew", {}),
        ("DELETE", "/keys/none", None),
        ("POST", "/prices", {"model": "tiny", "price": 1, "account": "none"}),
        ("DELETE", "/prices?model=acme/native", None),
        ("DELETE", "/prices?model=acme/native&meter=output", None),
        ("GET", "/requests/none", None),
        ("POST", "/requests/none/refund", {"reference": "none"}),
        ("POST", "/payouts", {"node": "none", "amount_nanousd": 1, "reference": "none"}),
    ],
)
async def test_what_is_not_there(gw: Gateway, method: str, path: str, body: object) -> None:
    refused(await gw.admin(method, path, body), 404, "not_found")


async def test_a_request_itself_takes_no_post(gw: Gateway) -> None:
    refused(await gw.admin("POST", "/requests/none", {"reference": "none"}), 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/prices", {"model": "none", "price": 1}),
        ("/keys", {"account": "a", "scopes": ["embeddings"], "limits": {"models": ["none"]}}),
    ],
)
async def test_a_model_that_is_not_in_the_catalogue(gw: Gateway, path: str, body: object) -> None:
    refused(await gw.admin("POST", path, body), 404, "model_not_found")


HUGE = 2**70


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/accounts", {"id": "a"}),
        ("POST", "/accounts", {"id": ""}),
        ("POST", "/accounts", {"id": "node:x"}),
        ("POST", "/accounts", {"id": "a/b"}),
        ("POST", "/accounts", {"id": "a\0"}),
        ("POST", "/accounts", {"id": "fresh", "credit_limit_nanousd": -1}),
        ("POST", "/accounts", {"id": "fresh", "credit_limit_nanousd": HUGE}),
        ("POST", "/accounts/a", {"credit_limit_nanousd": -1}),
        ("POST", f"/accounts/{REVENUE}", {"credit_limit_nanousd": 1}),
        ("POST", f"/accounts/{REVENUE}", {"cache": "free"}),
        ("POST", "/accounts", {"id": "fresh", "cache": "on"}),
        ("POST", "/accounts/a", {"cache": "on"}),
        ("POST", "/accounts/a", {"cache": None}),
        ("POST", "/accounts/a", {"cache": "free", "credit_limit_nanousd": -1}),
        ("POST", "/accounts/a", {"cache": "free", "credit_limit_nanousd": None}),
        ("POST", "/accounts/a", {}),
        ("POST", "/accounts/a/credits", {"amount_nanousd": 0, "reference": "r"}),
        ("POST", "/accounts/a/credits", {"amount_nanousd": HUGE, "reference": "r"}),
        ("POST", "/accounts/a/credits", {"amount_nanousd": -HUGE, "reference": "r"}),
        ("POST", "/accounts/a/credits", {"amount_nanousd": 1.5, "reference": "r"}),
        ("POST", "/accounts/a/credits", {"amount_nanousd": 1, "reference": ""}),
        ("POST", "/accounts/a/credits", {"amount_nanousd": 1, "reference": "r" * 256}),
        ("POST", "/accounts/a/credits", {"amount_nanousd": 1, "reference": "r\0"}),
        ("POST", f"/accounts/{REVENUE}/credits", {"amount_nanousd": 1, "reference": "r"}),
        ("GET", "/accounts?limit=0", None),
        ("GET", "/accounts?limit=1001", None),
        ("GET", "/accounts?limit=x", None),
        ("GET", "/accounts?limit=1&limit=2", None),
        ("GET", "/accounts?after=%00", None),
        ("POST", "/keys", {"account": "a", "scopes": []}),
        ("POST", "/keys", {"account": "a", "scopes": ["all"]}),
        ("POST", "/keys", {"account": "a b", "scopes": ["embeddings"]}),
        ("POST", "/keys", {"account": "a", "scopes": ["embeddings"], "name": "n" * 129}),
        ("POST", "/keys", {"account": "a", "scopes": ["embeddings"], "expires_ms": HUGE}),
        ("POST", "/keys", {"account": "a", "scopes": ["embeddings"], "expires_ms": -1}),
        ("POST", "/keys", {"account": "a", "scopes": ["embeddings"], "limits": {"concurrency": 0}}),
        ("POST", "/keys", {"account": "a", "scopes": ["embeddings"], "limits": {"budget_day": HUGE}}),
        ("POST", "/keys", {"account": "a", "scopes": ["embeddings"], "limits": {"calls": 1}}),
        ("POST", "/keys/none/rotate", {"overlap_s": -1}),
        ("POST", "/keys/none/rotate", {"overlap_s": 365 * 86_400 + 1}),
        ("POST", "/prices", {"model": "tiny", "price": -1}),
        ("POST", "/prices", {"model": "tiny", "price": HUGE}),
        ("POST", "/prices", {"model": "tiny", "price": 1, "from_ms": 1}),
        ("POST", "/prices", {"model": "tiny", "price": 1, "from_ms": HUGE}),
        ("DELETE", "/prices", None),
        ("DELETE", "/prices?model=tiny&meter=smoke", None),
    ],
)
async def test_values_that_cannot_be_are_refused_and_change_nothing(
    gw: Gateway, method: str, path: str, body: object
) -> None:
    before = gw.books.accounts.find("a"), len(gw.books.accounts.list()), len(gw.books.prices.list())
    refused(await gw.admin(method, path, body), 400, "invalid_value")
    assert before == (gw.books.accounts.find("a"), len(gw.books.accounts.list()), len(gw.books.prices.list()))


@pytest.mark.parametrize("path", ["/accounts?page=1", "/keys?a=1", "/prices?from=1"])
async def test_a_query_parameter_that_is_unknown_is_refused(gw: Gateway, path: str) -> None:
    refused(await gw.admin("GET", path), 400, "unknown_parameter")


# -- accounts ----------------------------------------------------------------------------------------------------------


async def test_an_account_is_made_shown_and_may_owe_as_much_as_it_is_told(gw: Gateway) -> None:
    name = await new_account(gw, credit_limit_nanousd=7)
    shown = told(await gw.admin("GET", f"/accounts/{name}"))
    assert abs(shown.pop("created_ms") - gw.clock.unix_ms()) < 60_000
    assert shown == {
        "id": name,
        "kind": "customer",
        "balance_nanousd": 0,
        "held_nanousd": 0,
        "credit_limit_nanousd": 7,
        "available_nanousd": 7,
        "cache": "off",
    }
    changed = told(await gw.admin("POST", f"/accounts/{name}", {"credit_limit_nanousd": 0}))
    assert (changed["credit_limit_nanousd"], changed["available_nanousd"]) == (0, 0)


@pytest.mark.parametrize(
    ("change", "limit", "cache"),
    [
        ({"cache": "free"}, 7, "free"),
        ({"cache": "off"}, 7, "off"),
        ({"credit_limit_nanousd": 3}, 3, "charged"),
        ({"credit_limit_nanousd": 3, "cache": "free"}, 3, "free"),
    ],
)
async def test_what_is_not_named_of_an_account_stays(
    gw: Gateway, change: dict[str, object], limit: int, cache: str
) -> None:
    name = await new_account(gw, credit_limit_nanousd=7, cache="charged")
    assert told(await gw.admin("GET", f"/accounts/{name}"))["cache"] == "charged"
    for method, body in (("POST", change), ("GET", None)):
        account = told(await gw.admin(method, f"/accounts/{name}", body))
        assert (account["credit_limit_nanousd"], account["cache"]) == (limit, cache)


async def test_a_credit_is_applied_once_for_each_reference_and_can_be_taken_back(gw: Gateway) -> None:
    name = await new_account(gw)
    path = f"/accounts/{name}/credits"

    async def credit(amount: int, reference: str) -> Raw:
        return await gw.admin("POST", path, {"amount_nanousd": amount, "reference": f"{name} {reference}"})

    for amount, reference, applied, balance in [(10, "1", True, 10), (10, "1", False, 10), (-4, "2", True, 6)]:
        expected = {"applied": applied, "amount_nanousd": amount, "reference": f"{name} {reference}"}
        assert told(await credit(amount, reference)) == expected
        assert gw.books.accounts.find(name).balance_nanousd == balance
    says(await credit(11, "1"), 400, "used for something else")
    refused(await credit(-7, "3"), 429, "insufficient_quota")
    assert gw.books.accounts.find(name).balance_nanousd == 6


@pytest.mark.parametrize(("what", "name"), [("accounts", "id"), ("keys", "key_id"), ("prices", "price_id")])
async def test_pages_have_every_row_once_and_in_order(gw: Gateway, what: str, name: str) -> None:
    for _ in range(3):
        account = await new_account(gw)
        await new_key(gw, account)
        told(await gw.admin("POST", "/prices", {"model": "tiny", "price": 3, "account": account}))
    whole = told(await gw.admin("GET", f"/{what}?limit=1000"))
    assert whole["has_more"] is False
    rows: list[dict[str, Any]] = []
    more: str | None = ""
    while more is not None:
        page = told(await gw.admin("GET", f"/{what}?limit=2{more}"))
        rows += page["data"]
        assert len(page["data"]) == 2 or not page["has_more"]
        more = f"&after={rows[-1][name]}" if page["has_more"] else None
    assert [row[name] for row in rows] == [row[name] for row in whole["data"]]


# -- keys --------------------------------------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_does_what_it_may(gw: Gateway) -> None:
    account = await new_account(gw)
    limits = {"models": ["tiny"], "concurrency": 3, "budget_day": 0}
    made = await new_key(gw, account, "embeddings", name="n", expires_ms=FAR_MS, limits=limits)
    token = made.pop("key")
    assert made == told(await gw.admin("GET", f"/keys/{made['key_id']}"))
    assert [made] == told(await gw.admin("GET", f"/keys?account={account}"))["data"]
    expected = {"account": account, "name": "n", "scopes": ["embeddings"], "state": "active", "expires_ms": FAR_MS}
    assert expected.items() <= made.items()
    assert made["limits"] == {
        "models": [MODEL.id],
        "requests_a_minute": None,
        "tokens_a_minute": None,
        "concurrency": 3,
        "budget_day": 0,
        "budget_month": None,
    }
    assert told(await gw.ask("GET", "/v1/account", key=token))["id"] == account


async def test_a_change_of_a_key_leaves_what_it_does_not_name(gw: Gateway) -> None:
    made = await new_key(gw, limits={"concurrency": 3, "tokens_a_minute": 5}, name="n", expires_ms=FAR_MS)
    path = f"/keys/{made['key_id']}"
    both = made["limits"] | {"concurrency": 4, "tokens_a_minute": None}
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"name": "m"}, {"name": "m"}),
        ({"expires_ms": None}, {"expires_ms": None}),
        ({"limits": {"concurrency": 4}}, {"limits": made["limits"] | {"concurrency": 4}}),
        ({"limits": {"tokens_a_minute": None}}, {"limits": both}),
    ]
    for change, expected in changes:
        before = told(await gw.admin("GET", path))
        after = told(await gw.admin("POST", path, change))
        assert after == before | expected == told(await gw.admin("GET", path))


async def test_a_rotated_key_is_good_as_long_as_was_said_and_the_new_one_may_do_the_same(gw: Gateway) -> None:
    old = await new_key(gw, limits={"concurrency": 3})
    new = told(await gw.admin("POST", f"/keys/{old['key_id']}/rotate"))
    shown = told(await gw.admin("GET", f"/keys/{old['key_id']}"))
    assert new["limits"] == old["limits"]
    assert new["key_id"] == shown["rotated_to"] != old["key_id"]
    assert abs(shown["expires_ms"] - gw.clock.unix_ms() - 86_400_000) < 60_000
    for token in (old["key"], new["key"]):
        assert (await gw.ask("GET", "/v1/account", key=token)).status == 200
    says(await gw.admin("POST", f"/keys/{old['key_id']}/rotate", {"overlap_s": 0}), 400, "rotated before")


async def test_a_revoked_key_is_useless_at_once_and_stays_so(gw: Gateway) -> None:
    made = await new_key(gw)
    assert (await gw.ask("GET", "/v1/account", key=made["key"])).status == 200
    for _ in range(2):
        assert told(await gw.admin("DELETE", f"/keys/{made['key_id']}"))["state"] == "revoked"
    async with asyncio.timeout(1.0):
        while (await gw.ask("GET", "/v1/account", key=made["key"])).status != 401:
            await asyncio.sleep(0.01)
    says(await gw.admin("POST", f"/keys/{made['key_id']}", {"name": "n"}), 400, "revoked")


# -- prices, and what a request moved ----------------------------------------------------------------------------------


async def test_a_price_counts_for_its_account_until_it_is_ended(gw: Gateway) -> None:
    """Named by an alias, kept by the model's id."""
    account = await new_account(gw)
    made = told(await gw.admin("POST", "/prices", {"model": "tiny", "price": 3, "account": account}))
    assert (made["model"], made["account"], made["price"], made["to_ms"]) == (MODEL.id, account, 3, None)
    assert made in told(await gw.admin("GET", "/prices?model=tiny"))["data"]
    assert made not in told(await gw.admin("GET", "/prices?model=acme/native"))["data"]
    path = f"/prices?model=tiny&account={account}"
    assert told(await gw.admin("DELETE", path)) == {
        "model": MODEL.id,
        "account": account,
        "meter": "input",
        "ended": True,
    }
    refused(await gw.admin("DELETE", path), 404, "not_found")


async def test_a_request_is_explained_refunded_and_its_node_paid(gw: Gateway, applicant: Applicant) -> None:
    """Everything that an embedding moves, and what an operator then says of it; the ledger holds."""
    account = await new_account(gw)
    told(await gw.admin("POST", f"/accounts/{account}/credits", {"amount_nanousd": 100, "reference": account}))
    key = (await new_key(gw, account))["key"]
    async with applicant.member():
        reply = await embed(gw, key)
    cost = int(reply.headers["x-embedmesh-cost-nanousd"])
    await until("it is charged", lambda: gw.books.accounts.find(account).balance_nanousd == 100 - cost)
    [entry] = [
        row for row in told(await gw.ask("GET", "/v1/account/entries", key=key))["data"] if row["kind"] == "charge"
    ]
    assert (entry["amount_nanousd"], entry["request_id"]) == (-cost, reply.headers["x-embedmesh-request"])
    path = f"/requests/{entry['request_id']}"
    explained = told(await gw.admin("GET", path))
    assert (explained["account"], explained["state"], explained["captured_nanousd"]) == (account, "captured", cost)
    assert (explained["bought"]["tokens"], explained["bought"]["cost_nanousd"]) == (5, cost)
    assert {move["kind"] for move in explained["moves"]} == {"charge", "payable"}

    refunds = [(1, "some", (True, 1)), (1, "some", (False, 1)), (None, "rest", (True, cost - 1))]
    for amount, reference, expected in refunds:
        body = {"amount_nanousd": amount, "reference": f"{account} {reference}"}
        given = told(await gw.admin("POST", f"{path}/refund", body))
        assert (given["applied"], given["amount_nanousd"]) == expected
    says(await gw.admin("POST", f"{path}/refund", {"reference": f"{account} more"}), 400, "can be given back")
    assert gw.books.accounts.find(account).balance_nanousd == 100

    node = applicant.node_id
    [earned] = [row for row in told(await gw.admin("GET", "/payables"))["data"] if row["node_id"] == node]
    payout = {"node": node, "amount_nanousd": earned["balance_nanousd"], "reference": f"{account} payout"}
    assert [told(await gw.admin("POST", "/payouts", payout))["applied"] for _ in range(2)] == [True, False]
    says(await gw.admin("POST", "/payouts", payout | {"reference": f"{account} 2"}), 400, "not paid out")
    report = told(await gw.admin("GET", "/ledger"))
    assert (report["ok"], report["broken"], report["head_known"]) == (True, [], None)

    month = f"/accounts/{account}/statement?month={time.strftime('%Y-%m', time.gmtime())}"
    first = told(await gw.admin("GET", f"{month}&limit=3"))
    assert [line["amount_nanousd"] for line in first["data"]] == [100, -cost, 1]
    assert (first["has_more"], first["opening_nanousd"]) == (True, 0)
    assert (first["data"][1]["model"], first["data"][1]["tokens"]) == (MODEL.id, 5)
    last = told(await gw.admin("GET", f"{month}&limit=3&after={first['data'][-1]['entry_id']}"))
    assert [line["amount_nanousd"] for line in last["data"]] == [cost - 1]
    assert (last["has_more"], last["opening_nanousd"]) == (False, None)
    says(await gw.admin("GET", f"/accounts/{account}/statement?month=2026-13"), 400, "2026-11")
    refused(await gw.admin("GET", "/accounts/nobody/statement?month=2026-11"), 404, "not_found")


async def test_requests_under_a_tab_are_explained_listed_and_refunded(gw: Gateway) -> None:
    """By the operator; its account lists the requests of its own charges, and of no other's."""
    account = await new_account(gw)
    told(await gw.admin("POST", f"/accounts/{account}/credits", {"amount_nanousd": 64_000, "reference": account}))
    made = await new_key(gw, account)
    tab = Tab(f"tab_{account}", account, made["key_id"], FAR_MS)
    gw.store._writer.submit(opening := OpenTab(tab, gw.store._opened.instance.name, 100, 1))
    assert await opening.outcome == 100
    requests = [f"req_{account}_{number}" for number in range(3)]
    for request_id in requests:
        hold = Hold(request_id, account, 10, FAR_MS, made["key_id"], tab.tab_id)
        charge = Charge(10, 5, MODEL.id, made["key_id"], "n1", price=2_000_000, payables=(Payable("n1", 1),))
        gw.store._writer.submit(SettleRequest(tab.tab_id, hold, charge))
    await gw.store.drain()
    told_tab = told(await gw.admin("GET", f"/tabs/{tab.tab_id}"))
    assert (told_tab["account"], told_tab["amount_nanousd"], told_tab["captured_nanousd"]) == (account, 100, 30)
    assert (told_tab["requests"], told_tab["state"], told_tab["ended_ms"]) == (3, "open", None)
    assert [(move["kind"], move["requests"]) for move in told_tab["moves"]] == [("payable", 0), ("charge", 3)]
    refused(await gw.admin("GET", "/tabs/none"), 404, "not_found")

    explained = told(await gw.admin("GET", f"/requests/{requests[1]}"))
    assert (explained["tab_id"], explained["held_nanousd"], explained["captured_nanousd"]) == (tab.tab_id, None, 10)
    assert [(move["amount_nanousd"], move["requests"]) for move in explained["moves"]] == [(30, 3), (3, 3)]
    given = told(await gw.admin("POST", f"/requests/{requests[1]}/refund", {"reference": f"{account} back"}))
    assert (given["applied"], given["amount_nanousd"]) == (True, 10)

    entries = told(await gw.ask("GET", "/v1/account/entries", key=made["key"]))["data"]
    assert [(row["kind"], row["amount_nanousd"], row["requests"], row["tab_id"]) for row in entries] == [
        ("refund", 10, None, tab.tab_id),
        ("charge", -30, 3, tab.tab_id),
        ("credit", 64_000, None, None),
    ]
    path = f"/v1/account/entries/{entries[1]['entry_id']}/requests"
    page = told(await gw.ask("GET", f"{path}?limit=2", key=made["key"]))
    assert [row["request_id"] for row in page["data"]] == requests[:2] and page["has_more"] is True
    rest = told(await gw.ask("GET", f"{path}?limit=2&after={requests[1]}", key=made["key"]))
    assert rest["data"] == [
        {
            "request_id": requests[2],
            "key_id": made["key_id"],
            "model": MODEL.id,
            "tokens": 5,
            "price": 2_000_000,
            "cost_nanousd": 10,
        }
    ]
    assert rest["has_more"] is False
    stranger = (await new_key(gw, await new_account(gw)))["key"]
    refused(await gw.ask("GET", path, key=stranger), 404, "not_found")
    for entry_id in (entries[0]["entry_id"], "none", "9" * 30, "-1"):
        refused(await gw.ask("GET", f"/v1/account/entries/{entry_id}/requests", key=made["key"]), 404, "not_found")
    month = f"/accounts/{account}/statement?month={time.strftime('%Y-%m', time.gmtime())}"
    line = told(await gw.admin("GET", month))["data"][1]
    assert (line["requests"], line["tab_id"], line["tokens"], line["price"]) == (3, tab.tab_id, 15, 2_000_000)


async def test_a_head_that_the_chain_never_had_is_said_to_be_unknown(gw: Gateway) -> None:
    """The money is right, and this is another store, or an older copy."""
    head = told(await gw.admin("GET", "/ledger"))["head"]["hash"]
    assert told(await gw.admin("GET", f"/ledger?head={head}"))["head_known"] is True
    report = told(await gw.admin("GET", f"/ledger?head={'1' * 64}"))
    assert (report["ok"], report["broken"], report["head_known"]) == (False, [], False)
    refused(await gw.admin("GET", "/ledger?head=1"), 400, "invalid_value")


async def test_nobody_waits_for_a_check_of_the_ledger(gw: Gateway) -> None:
    """It reads the whole store: seconds, where that is large."""
    gate = threading.Event()
    running = asyncio.create_task(gw.checks_thread.ask(lambda _: gate.wait()))
    check = asyncio.create_task(gw.admin("GET", "/ledger"))
    try:
        told(await gw.admin("GET", "/accounts/a"))
        assert not check.done()
    finally:
        gate.set()
    assert told(await check)["ok"] and await running


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/accounts", {"id": ""}, "id"),
        ("/accounts", {"credit_limit_nanousd": 1}, "id"),
        ("/accounts", {"id": "a", "surprise": 1}, "surprise"),
        ("/accounts", [], None),
        ("/accounts/a", {"credit_limit_nanousd": -1}, "credit_limit_nanousd"),
        ("/accounts/a", {"cache": "on"}, "cache"),
        ("/accounts/a", {}, None),
        ("/accounts/a/credits", {"amount_nanousd": "1", "reference": "r"}, "amount_nanousd"),
        ("/accounts/a/credits", {"amount_nanousd": 1, "reference": ""}, "reference"),
        ("/keys", {"account": "a", "scopes": ["embeddings"], "limits": {"concurrency": 0}}, "limits.concurrency"),
        ("/keys", {"account": "a", "scopes": ["embeddings"], "limits": {"budget_day": -1}}, "limits.budget_day"),
        ("/keys", {"account": "a", "scopes": ["embeddings", 1]}, "scopes.1"),
        ("/prices", {"model": "tiny", "price": -1}, "price"),
        ("/prices", {"model": "tiny", "price": 1, "from_ms": 1}, "from_ms"),
        ("/prices", {"model": "tiny", "price": 1, "meter": "output"}, "meter"),  # it makes none
        ("/prices", {"model": "tiny", "price": 1, "meter": "images:1x1"}, "meter"),
        ("/prices", {"model": "tiny", "price": 1, "meter": 1}, "meter"),
    ],
)
async def test_a_refusal_names_the_member_as_it_was_sent(
    gw: Gateway, path: str, body: object, param: str | None
) -> None:
    assert (await gw.admin("POST", path, body)).error["param"] == param
