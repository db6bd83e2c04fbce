"""Every route that changes something for operators, or keys, makes its row; who may read, reads."""

import asyncio
import itertools
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from embedmesh.fleet.registry import Node
from embedmesh.gateway.api.fleet_api import ACTIONS
from embedmesh.gateway.api.reload_api import ModelChanges, Reloaded
from embedmesh.gateway.api.table import APIS
from embedmesh.rules.acts import Verb
from embedmesh.rules.holds import Charge, Hold, Payable
from embedmesh.rules.membership import Standing
from embedmesh.storage.books.acts import ActRow
from tests.gateway.mesh import ON_EACH_STORE, Gateway, gateway, memory_folder, until
from tests.http.raw import Raw

pytestmark = [pytest.mark.asyncio(loop_scope="module"), ON_EACH_STORE]

NUMBERS = itertools.count()
NOT_ACTS = {  # what callers do with what is theirs, and what nodes say of themselves
    "/v1/embeddings", "/v1/rerank", "/v2/rerank", "/rerank", "/tei/{id}/rerank",
    "/v1/chat/completions", "/v1/completions", "/v1/images/generations", "/v1/nodes/lock",
    "/v1/confidential/embeddings", "/v1/confidential/chat/completions", "/v1/confidential/completions",
    "/v1/confidential/images/generations", "/v1/files", "/v1/files/{file_id}", "/v1/batches",
    "/v1/batches/{batch_id}/cancel", "/v1/jobs", "/v1/jobs/{job_id}/cancel", "/v1/nodes",
    "/v1/nodes/{node_id}/heartbeat", "/v1/nodes/{node_id}/drain", "/api/embed", "/api/embeddings", "/api/show",
    "/v2/embed", "/v1/embed", "/embed", "/", "/tei/{id}/embed", "/embed_all", "/v1beta/models/{id}:embedContent",
    "/v1beta/models/{id}:batchEmbedContents",
}  # fmt: skip


class Example:
    """What is done on one gateway, once. Each gives a call's path, body, and key, and the acts that it makes."""

    def __init__(self, gw: Gateway) -> None:
        self.gw = gw
        self.number = next(NUMBERS)
        self.reload: asyncio.Future[None] | None = None

    def key(self, *scopes: str) -> tuple[str, str]:
        key, token = self.gw.books.keys.create("a", scopes or ["embeddings"])
        return key.key_id, token

    async def charged(self) -> str:
        """The id of a request that was."""
        gw, hold_id = self.gw, f"req_audit_{self.number}"
        hold = Hold(hold_id, "a", 100, gw.clock.unix_ms() + 60_000, None)
        await gw.store.hold(hold)
        payables = (Payable("n1", 30),)
        gw.store.capture(
            hold,
            Charge(
                cost_nanousd=90, tokens=7, model="tiny", key_id="k", node_id="n1", user_hash=None, payables=payables
            ),
            None,
        )
        await gw.store.drain()
        return hold_id

    async def upstream(self) -> str:
        name = f"up-{self.number}"
        body = {"address": "http://127.0.0.1:1", "models": [{"id": "tiny"}], "name": name, "token": "sealed-token"}
        assert (await self.gw.admin("POST", "/nodes", body)).status == 200
        return name

    async def act(self, action: str) -> tuple[str, object, str, list[tuple[str, str]]]:
        name = await self.upstream()
        first = {"resume": "drain", "distrust": "trust"}.get(action)
        kept: dict[str, dict[str, Any]] = {
            "readmit": {"quarantined": "why"},
            "approve": {"standing": Standing.PENDING},
        }
        if first is not None:
            await self.gw.act(name, first)
        if action in kept:
            await self.gw.roster.change(name, None, **kept[action])
        body = {"weight": 2.0} if action == "weight" else None
        return f"/v1/admin/nodes/{name}/{action}", body, "", [(f"node.{action}", name)]


Made = tuple[str, object, str, list[tuple[str, str]]]


async def create_account(of: Example) -> Made:
    name = f"audit-{of.number}"
    return "/v1/admin/accounts", {"id": name, "credit_limit_nanousd": 5}, "", [("account.create", name)]


async def change_account(of: Example) -> Made:
    return "/v1/admin/accounts/a", {"credit_limit_nanousd": of.number + 1}, "", [("account.change", "a")]


async def credit(of: Example) -> Made:
    body = {"amount_nanousd": 5, "reference": f"audit {of.number}"}
    return "/v1/admin/accounts/a/credits", body, "", [("account.credit", "a")]


async def create_key(of: Example) -> Made:
    return "/v1/admin/keys", {"account": "a", "scopes": ["embeddings"]}, "", [("key.create", "")]


async def change_key(of: Example) -> Made:
    key_id, _ = of.key()
    return f"/v1/admin/keys/{key_id}", {"limits": {"concurrency": 3}}, "", [("key.change", key_id)]


async def rotate_key(of: Example) -> Made:
    key_id, _ = of.key()
    return f"/v1/admin/keys/{key_id}/rotate", {"overlap_s": 5}, "", [("key.rotate", key_id)]


async def revoke_any_key(of: Example) -> Made:
    key_id, _ = of.key("keys")
    of.gw.books.keys.create_below(key_id, ["keys"])
    return f"/v1/admin/keys/{key_id}", None, "", [("key.revoke", key_id), ("key.revoke", key_id)]


async def create_own_key(of: Example) -> Made:
    return "/v1/account/keys", {"scopes": ["keys"]}, of.key("keys")[1], [("key.create", "")]


async def revoke_own_key(of: Example) -> Made:
    key_id, _ = of.key()
    return f"/v1/account/keys/{key_id}", None, of.key("keys")[1], [("key.revoke", key_id)]


async def set_price(of: Example) -> Made:
    return "/v1/admin/prices", {"model": "tiny", "price": 7}, "", [("price.set", "acme/tiny")]


async def end_price(of: Example) -> Made:
    of.gw.books.prices.set("acme/tiny", 8, account_id="a")
    return "/v1/admin/prices?model=tiny&account=a", None, "", [("price.end", "acme/tiny")]


async def refund(of: Example) -> Made:
    hold_id = await of.charged()
    body = {"reference": f"refund {of.number}", "amount_nanousd": 1}
    return f"/v1/admin/requests/{hold_id}/refund", body, "", [("request.refund", hold_id)]


async def pay_out(of: Example) -> Made:
    await of.charged()
    body = {"node": "n1", "amount_nanousd": 1, "reference": f"payout {of.number}"}
    return "/v1/admin/payouts", body, "", [("node.payout", "n1")]


async def create_invite(of: Example) -> Made:
    return "/v1/admin/invites", {"note": "a private note"}, "", [("invite.create", "")]


async def revoke_invite(of: Example) -> Made:
    invite_id = (await of.gw.invite()).invite_id
    return f"/v1/admin/invites/{invite_id}", None, "", [("invite.revoke", invite_id)]


async def add_upstream(of: Example) -> Made:
    name = f"added-{of.number}"
    body = {"address": "http://127.0.0.1:1", "models": [{"id": "tiny"}], "name": name, "token": "sealed-token"}
    return "/v1/admin/nodes", body, "", [("node.add", name)]


async def reload(of: Example) -> Made:
    """Answered as by embedmesh.gateway.reload, which tests/story/test_reload.py runs."""

    async def answer() -> None:
        reloaded = Reloaded(["hedge", "policy"], ["port", "host"], ModelChanges(added=["one", "two"]))
        asked_by, tell = await of.gw.reloads.next()
        await of.gw.books_thread.ask(lambda books: books.tell_settings(reloaded.names(), asked_by))
        tell(reloaded)

    of.reload = asyncio.ensure_future(answer())
    return "/v1/admin/reload", None, "", [("settings.reload", "settings")]


def on_node(action: str) -> Callable[[Example], Awaitable[Made]]:
    return lambda of: of.act(action)


ACTS: dict[tuple[str, str], list[Callable[[Example], Awaitable[Made]]]] = {
    ("POST", "/v1/admin/accounts"): [create_account],
    ("POST", "/v1/admin/accounts/{account_id}"): [change_account],
    ("POST", "/v1/admin/accounts/{account_id}/credits"): [credit],
    ("POST", "/v1/admin/keys"): [create_key],
    ("POST", "/v1/admin/keys/{key_id}"): [change_key],
    ("POST", "/v1/admin/keys/{key_id}/rotate"): [rotate_key],
    ("DELETE", "/v1/admin/keys/{key_id}"): [revoke_any_key],
    ("POST", "/v1/account/keys"): [create_own_key],
    ("DELETE", "/v1/account/keys/{key_id}"): [revoke_own_key],
    ("POST", "/v1/admin/prices"): [set_price],
    ("DELETE", "/v1/admin/prices"): [end_price],
    ("POST", "/v1/admin/requests/{request_id}/refund"): [refund],
    ("POST", "/v1/admin/payouts"): [pay_out],
    ("POST", "/v1/admin/invites"): [create_invite],
    ("DELETE", "/v1/admin/invites/{invite_id}"): [revoke_invite],
    ("POST", "/v1/admin/nodes"): [add_upstream],
    ("POST", "/v1/admin/reload"): [reload],
    ("POST", "/v1/admin/nodes/{node_id}/{action}"): [on_node(action) for action in (*ACTIONS, "weight")],
}


async def test_the_route_table_has_no_route_that_is_forgotten_here(gw: Gateway) -> None:
    """What is no GET is an act, with an example below, or stands in the closed list of what is none."""
    changing = {(route.method, route.path): route for api in APIS for route in api.ROUTES if route.method != "GET"}
    assert {which for which, route in changing.items() if route.acts} == set(ACTS)
    assert {path for (_, path), route in changing.items() if not route.acts} == NOT_ACTS


@pytest.mark.parametrize(
    ("method", "example"), [(method, one) for (method, _), several in ACTS.items() for one in several]
)
async def test_each_makes_its_row(gw: Gateway, method: str, example: Callable[[Example], Awaitable[Made]]) -> None:
    """Who, what, from where, by which request: the rows are there when the reply is, and no others."""
    path, body, key, wanted = await example(Example(gw))
    token = key or gw.key("admin")
    caller = await gw.store.keys.find(token)
    assert caller is not None
    before = latest(gw)[0].act_id
    headers = {"x-request-id": f"audit-{next(NUMBERS)}"}
    reply = await gw.ask(method, path, body, key=token, **headers)
    assert reply.status == 200, reply.body
    rows = list(gw.books.acts.list(after=before, oldest_first=True))
    assert [row.verb for row in rows] == [verb for verb, _ in wanted]
    assert all(row.object_id == named for row, (_, named) in zip(rows, wanted, strict=True) if named)
    assert {(row.actor, row.origin, row.request_id) for row in rows} == {
        (caller.key_id, "127.0.0.1", headers["x-request-id"])
    }
    assert all(row.changes for row in rows if row.verb not in ("key.revoke", "invite.revoke"))
    kept = json.dumps([row.changes for row in rows])
    assert not [word for word in ("sealed-token", "a private note", "em_") if word in kept]
    assert gw.books.check().audit.acts == rows[-1].act_id


async def test_every_verb_is_made_by_a_route_or_by_a_start(gw: Gateway) -> None:
    """None stands for nothing."""
    made = {verb for several in ACTS.values() for one in several for _, _, _, acts in [await one(Example(gw))]
            for verb, _ in acts}  # fmt: skip
    assert {verb.value for verb in Verb} - made == {"key_defaults.change"}


async def test_what_is_said_of_this_machines_own_node_is_a_row_too(gw: Gateway) -> None:
    """It has no record in the store, and the act is one all the same."""
    gw.registry.add(Node("local", "unix:/nowhere", trusted=True))
    try:
        await gw.act("local", "drain")
        row = latest(gw)[0]
        assert (row.verb, row.object_id, row.changes) == ("node.drain", "local", {"draining": [False, True]})
    finally:
        gw.registry.remove("local")


async def test_a_refused_request_makes_no_row_and_is_counted(gw: Gateway) -> None:
    """Strangers cannot fill the store."""
    keys = (None, "em_wrong", "eyJhbGciOiJub25lIn0.e30.", gw.key("embeddings"), gw.key("audit"))
    before, counted = latest(gw)[0].act_id, refused(gw)
    for key in keys:
        for method, path in (("POST", "/v1/admin/accounts"), ("DELETE", "/v1/admin/keys/none")):
            reply = await gw.ask(method, path, {"id": "x"} if method == "POST" else None, key=key)
            assert reply.status in (401, 403)
    assert latest(gw)[0].act_id == before
    assert refused(gw) == counted + 10


@pytest.mark.parametrize(
    ("scope", "reads", "audits"),
    [("admin", 200, 200), ("admin:read", 200, 200), ("audit", 403, 200), ("keys", 403, 403)],
)
async def test_who_may_read(gw: Gateway, scope: str, reads: int, audits: int) -> None:
    """`admin:read` reads all of the admin API and changes nothing; `audit` reads the audit alone."""
    key = gw.key(scope)
    for path in ("accounts", "keys", "prices", "nodes", "invites", "payables", "ledger"):
        assert (await gw.ask("GET", f"/v1/admin/{path}", key=key)).status == reads, path
    assert (await gw.ask("GET", "/v1/admin/audit", key=key)).status == audits
    if scope != "admin":
        assert (await gw.ask("POST", "/v1/admin/accounts", {"id": "x"}, key=key)).status == 403
        assert (await gw.ask("DELETE", "/v1/admin/prices?model=tiny", key=key)).status == 403


@pytest.mark.parametrize("scope", ["admin", "admin:read", "audit"])
async def test_no_key_of_an_account_gives_a_scope_of_operators(gw: Gateway, scope: str) -> None:
    """Not even one that has it."""
    own = gw.key("keys", scope)
    reply = await gw.ask("POST", "/v1/account/keys", {"scopes": [scope]}, key=own)
    assert (reply.status, reply.error["code"]) == (403, "insufficient_scope")


async def test_viewers_do_not_shut_the_operator_out(gw: Gateway) -> None:
    """However many reads of theirs wait for the store: a key is revoked."""
    gate, viewer, (key_id, _) = threading.Event(), gw.key("admin:read"), Example(gw).key()
    for key in (viewer, gw.key("admin")):  # each is known then, and not looked for by 60 at a time
        assert (await gw.ask("GET", "/v1/admin/accounts", key=key)).status == 200
    under_way = asyncio.create_task(gw.books_thread.ask(lambda _: gate.wait()))
    try:
        reads = [asyncio.create_task(gw.ask("GET", "/v1/admin/accounts", key=viewer)) for _ in range(60)]
        await until("some reads are refused", lambda: sum(each.done() for each in reads) >= 9)
        revoking = asyncio.create_task(gw.admin("DELETE", f"/keys/{key_id}"))
        await until("it waits", lambda: revoking.done() or gw.books_thread._waiting.taken == 2)
    finally:
        gate.set()
    assert (await revoking).status == 200
    assert await under_way and {each.status for each in await asyncio.gather(*reads)} == {200, 503}


async def test_the_row_of_a_reload_has_names_as_texts(gw: Gateway) -> None:
    """A list of two is [old, new]."""
    path, *_ = await reload(Example(gw))
    assert (await gw.ask("POST", path, key=gw.key("admin"))).status == 200
    said = {"changed": "hedge, policy", "needs_restart": "port, host", "models_added": "one, two"}
    assert latest(gw)[0].changes == said


async def test_the_words_before_each_text_are_a_hash_in_the_row(gw: Gateway) -> None:
    body: dict[str, Any] = {"address": "http://127.0.0.1:1", "name": f"words-{next(NUMBERS)}"}
    for words in ("secret: ", "other: "):
        body["models"] = [{"id": "tiny", "prefix": words}]
        assert (await gw.admin("POST", "/nodes", body)).status == 200
    changes = latest(gw)[0].changes
    before, after = (models["acme/tiny"]["prefix_hash"] for models in changes["models"])
    assert before != after and "secret" not in json.dumps(changes)


async def test_the_audit_is_read_by_pages_of_a_kind(gw: Gateway) -> None:
    key_id, _ = Example(gw).key()
    await gw.admin("DELETE", f"/keys/{key_id}")
    query = f"object={key_id}"
    both = told(await gw.admin("GET", f"/audit?{query}&order=asc"))
    assert [row["act"] for row in both["data"]] == ["key.create", "key.revoke"] and not both["has_more"]
    page = told(await gw.admin("GET", f"/audit?{query}&limit=1"))
    assert (page["data"], page["has_more"]) == ([both["data"][1]], True)
    after = page["data"][0]["act_id"]
    assert told(await gw.admin("GET", f"/audit?{query}&limit=1&after={after}"))["data"] == [both["data"][0]]
    assert told(await gw.admin("GET", f"/audit?{query}&act=key.revoke"))["data"] == [both["data"][1]]
    assert told(await gw.admin("GET", "/audit?since_ms=999999999999999"))["data"] == []
    for wrong in ("limit=0", "order=up", "after=-1", "who=me", "object=a&object=b"):
        assert (await gw.admin("GET", f"/audit?{wrong}")).status == 400, wrong


async def test_the_address_is_the_one_behind_a_trusted_proxy(gw: Gateway) -> None:
    """What stands before it anybody may have written; an IPv6 address is kept whole."""
    with memory_folder() as folder:
        async with gateway(folder, trusted=("127.0.0.0/8",)) as proxied:
            forwarded = {"X-Forwarded-For": "192.0.2.1, 2001:db8::7"}
            reply = await proxied.ask("POST", "/v1/admin/accounts", {"id": "x"}, key=proxied.key("admin"), **forwarded)
            assert reply.status == 200
            assert latest(proxied)[0].origin == "2001:db8::7"


def latest(gw: Gateway) -> list[ActRow]:
    return list(gw.books.acts.list(rows_max=1))


def refused(gw: Gateway) -> float:
    return float(gw.app.metrics.admin_refused._value.get())


def told(reply: Raw) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    return dict(json.loads(reply.body))
