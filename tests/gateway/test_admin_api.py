"""`/v1/admin`: for keys with the scope `admin` only; what an operator says of a node is done, kept and shown."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from embedmesh.fleet.registry import Node
from embedmesh.http.paths import OTHER_PATHS
from embedmesh.rules.membership import Standing
from embedmesh.rules.nodes import NodeState
from embedmesh.signing.invites import Invite
from tests.gateway.mesh import Applicant, Gateway, gateway, memory_folder, says, until
from tests.http.raw import Raw, request, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
OPEN = {  # to all: what the contract opens, and what a node signs in place of a key
    ("GET", "/health"),
    ("GET", "/readyz"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/"),
    ("GET", "/v1/nodes"),
    ("POST", "/v1/nodes"),
    ("GET", "/v1/nodes/*/dial"),
    ("POST", "/v1/nodes/*/drain"),
    ("POST", "/v1/nodes/*/heartbeat"),
}


def body_of(reply: Raw) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    return dict(json.loads(reply.body))


# -- who may -----------------------------------------------------------------------------------------------------------


async def test_no_path_of_the_whole_gateway_is_open_by_omission(gw: Gateway) -> None:
    """Every route and method, without a key and with a wrong one; what a node must sign is not answered unsigned.

    HEAD is as open as GET, and as closed.
    """
    routes = dict(gw.app.routes())
    routes |= {path: routes[of] for path, of in OTHER_PATHS.items() if of in routes}
    for path, methods in routes.items():
        asked = path.replace("*", "x/drain" if path.endswith("*") else "x")
        for method in METHODS:
            for key in (None, "em_wrong", "em_" + "0" * 40):
                reply = await send(gw.port, request(method, asked, b"{}" if method == "POST" else b"", key=key))
                if method not in methods:
                    assert reply.status == 405, (method, path)
                    allowed = {*methods, "HEAD"} if "GET" in methods else {*methods}
                    assert reply.headers["allow"] == ", ".join(sorted(allowed))
                elif (method, path) not in OPEN:
                    wrong = b"" if method == "HEAD" else b"The API key is missing or not valid."
                    assert reply.status == 401 and wrong in reply.body, (method, path)
                elif path.startswith("/v1/nodes/"):
                    assert reply.status == (404 if method == "GET" else 401)
                elif (method, path) == ("POST", "/v1/nodes"):
                    assert reply.status == 400
                if method == "GET":
                    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
                    writer.write(request("HEAD", asked, key=key))
                    status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
                    assert status == (reply.status if "GET" in methods else 405), path
                    writer.close()


@pytest.mark.parametrize("scope", ["embeddings", "keys", "metrics"])
async def test_admin_routes_need_the_scope_admin(gw: Gateway, scope: str) -> None:
    """A key that is good for something else changes and sees nothing; before the body is looked at."""
    admin = {path: methods for path, methods in gw.app.routes().items() if path.startswith("/v1/admin")}
    assert len(admin) == 20
    for path, methods in admin.items():
        for method in methods:
            asked = path.replace("*", "x/drain")
            reply = await send(gw.port, request(method, asked, b"{" if method == "POST" else b"", key=gw.key(scope)))
            assert (reply.status, reply.error["code"]) == (403, "insufficient_scope"), (method, path)


async def test_an_admin_key_that_was_revoked_is_none(gw: Gateway) -> None:
    key, token = gw.books.keys.create("a", ["admin"])
    assert (await send(gw.port, request("GET", "/v1/admin/nodes", key=token))).status == 200
    gw.books.keys.revoke(key.key_id)
    revoked = time.monotonic()
    while (await send(gw.port, request("GET", "/v1/admin/nodes", key=token))).status != 401:
        assert time.monotonic() - revoked < 1.0
        await asyncio.sleep(0.01)


# -- nodes -------------------------------------------------------------------------------------------------------------


ACTIONS = ("approve", "drain", "resume", "readmit", "remove", "trust", "distrust", "weight")


@pytest.mark.parametrize("name", ["node_" + "0" * 32, "999999", "0", "-1", "9" * 5_000, "%C2%B2", "x", "a/b", "%2F"])
async def test_a_node_that_is_not_there(gw: Gateway, name: str) -> None:
    """By any name, and whatever is said of it."""
    for method, path in [("GET", f"/nodes/{name}"), *(("POST", f"/nodes/{name}/{action}") for action in ACTIONS)]:
        reply = await gw.admin(method, path, {"weight": 1} if path.endswith("weight") else None)
        assert (reply.status, reply.error["code"]) == (404, "not_found"), path


@pytest.mark.parametrize(
    ("action", "body", "status"),
    [
        ("retire", None, 404),
        ("", None, 404),
        ("drain/x", None, 404),
        ("weight", None, 400),
        ("weight", {}, 400),
        ("weight", {"weight": 0}, 400),
        ("weight", {"weight": -1}, 400),
        ("weight", {"weight": 1e7}, 400),
        ("weight", {"weight": "1"}, 400),
        ("weight", {"weight": True}, 400),
        ("weight", {"weight": 1, "more": 1}, 400),
    ],
)
async def test_what_cannot_be_said_of_a_node(
    gw: Gateway, applicant: Applicant, action: str, body: object, status: int
) -> None:
    await applicant.join(await gw.invite())
    before = gw.roster.record(applicant.node_id)
    assert (await gw.admin("POST", f"/nodes/{applicant.node_id}/{action}", body)).status == status
    assert gw.roster.record(applicant.node_id) == before


async def test_each_action_is_done_kept_and_shown(gw: Gateway, applicant: Applicant) -> None:
    """On the live node, in the store, and in the answer; by its id or its number."""

    def kept() -> Any:
        return next(one for one in gw.roster.records() if one.node_id == applicant.node_id)

    async with applicant.member() as node:
        number = str(applicant.welcome.small_id)
        shown = await gw.act(number, "trust")
        assert (shown["trusted"], node.trusted, kept().trusted) == (True, True, True)
        shown = await gw.act(applicant.node_id, "distrust")
        assert (shown["trusted"], node.trusted, kept().trusted) == (False, False, False)
        shown = body_of(await gw.admin("POST", f"/nodes/{number}/weight", {"weight": 2.5}))
        assert (shown["weight"], node.weight, kept().weight) == (2.5, 2.5, 2.5)
        shown = await gw.act(number, "drain")
        assert (shown["state"], node.draining, kept().draining) == ("draining", True, True)
        assert node not in gw.registry.ready("acme/tiny")
        shown = await gw.act(number, "resume")
        assert (shown["state"], node.draining, kept().draining) == ("ready", False, False)
        assert node in gw.registry.ready("acme/tiny")
        gw.registry.quarantine(node, "it lied")
        await until("it is written down", lambda: kept().quarantined == "it lied")
        shown = body_of(await gw.admin("GET", f"/nodes/{number}"))
        assert (shown["state"], shown["quarantined"], shown["last_failure"]) == ("quarantined", "it lied", "it lied")
        shown = await gw.act(number, "readmit")
        assert (shown["quarantined"], kept().quarantined) == (None, "")
        assert node.state in (NodeState.UNPROVEN, NodeState.READY)
        assert (await gw.act(number, "approve"))["standing"] == "admitted"  # said twice, it changes nothing
        assert gw.node(applicant.node_id) is node
        shown = await gw.act(number, "remove")
        assert (shown["standing"], shown["state"], kept().standing) == ("removed", None, Standing.REMOVED)
        assert gw.node(applicant.node_id) is None


async def test_only_readmit_ends_a_quarantine(gw: Gateway, applicant: Applicant, monkeypatch: Any) -> None:
    """Also one that the store did not take down: another word on the node must not end it by the way."""
    monkeypatch.setattr(gw.registry, "on_quarantine", [])
    async with applicant.member() as node:
        gw.registry.quarantine(node, "it lied")
        for action in set(ACTIONS) - {"readmit", "remove", "weight"}:
            assert (await gw.act(applicant.node_id, action))["state"] == "quarantined"
        assert (await gw.act(applicant.node_id, "readmit"))["state"] != "quarantined"


async def test_nodes_are_listed_with_what_is_kept_and_what_is_seen(
    gw: Gateway, applicant: Applicant, tmp_path: Path
) -> None:
    """Those that wait and those that were removed too; a secret, a key or a certificate never."""
    pending, dialled = Applicant(gw, tmp_path, "pending"), Applicant(gw, tmp_path, "dialled")
    await pending.join(address="https://node.example")
    await dialled.join(await gw.invite())
    async with applicant.member():
        listed = body_of(await gw.admin("GET", "/nodes"))
        assert listed["object"] == "list"
        by_id = {one["node_id"]: one for one in listed["data"]}
        assert len(by_id) == len(listed["data"])
        shown = by_id[applicant.node_id]
        assert shown == body_of(await gw.admin("GET", f"/nodes/{applicant.node_id}")) | {
            name: shown[name] for name in ("last_answer_s_ago", "last_heartbeat_s_ago", "tokens_per_s", "fixed_ms")
        } | {name: shown[name] for name in shown if "outstanding" in name}
        assert (shown["kind"], shown["state"], shown["address"]) == ("remote", "ready", applicant.address)
        assert shown["models"] == ["acme/native", "acme/tiny"]
        assert shown["failures"] == {}
        shown = by_id[dialled.node_id]
        assert (shown["kind"], shown["state"], shown["address"]) == ("dialled", "unproven", None)
        shown = by_id[pending.node_id]
        assert (shown["kind"], shown["standing"], shown["state"]) == ("remote", "pending", None)
        record = gw.roster.record(applicant.node_id)
        said = (await gw.admin("GET", "/nodes")).body
        for secret in (applicant.sessions.of_node.key, applicant.sessions.of_gateway.key, record.secret):
            assert secret not in said
            assert secret.hex().encode() not in said
        assert not {"secret", "certificate", "public_key", "ip"} & set(by_id[applicant.node_id])


async def test_this_machines_own_node_can_be_drained_and_resumed(gw: Gateway) -> None:
    """It is not in the store: that holds until the gateway starts anew. No more can be said of it here."""
    node = gw.registry.add(Node("local", "unix:/nowhere", trusted=True))
    try:
        gw.registry.answered_right(node, ["acme/tiny"])
        node.threads = "2 threads: 2 cores"  # as its probe has heard
        drained = await gw.act("local", "drain")
        assert (drained["state"], drained["threads"]) == ("draining", "2 threads: 2 cores")
        assert node not in gw.registry.ready("acme/tiny")
        assert (await gw.act("local", "resume"))["state"] == "ready"
        assert node in gw.registry.ready("acme/tiny")
        for action in set(ACTIONS) - {"drain", "resume"}:
            says(await gw.admin("POST", f"/nodes/local/{action}", {"weight": 1}), 400, "own node")
        shown = body_of(await gw.admin("GET", "/nodes/local"))
        assert (shown["kind"], shown["small_id"], shown["standing"]) == ("local", None, "admitted")
    finally:
        gw.registry.remove("local")


# -- invites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"expires_in_s": 0},
        {"expires_in_s": -5},
        {"expires_in_s": 30 * 86_400 + 1},
        {"expires_in_s": 1.5},
        {"expires_in_s": "60"},
        {"note": "n" * 129},
        {"note": 1},
        {"more": 1},
        [],
    ],
    ids=str,
)
async def test_an_invite_of_another_form_is_refused(gw: Gateway, body: object) -> None:
    before = len(await gw.store.nodes.invites())
    assert (await gw.admin("POST", "/invites", body)).status == 400
    assert len(await gw.store.nodes.invites()) == before


async def test_an_invite_is_shown_once_and_followed_through_its_life(gw: Gateway, tmp_path: Path) -> None:
    """Open, used, expired, revoked; the token is in the answer that makes it, and nowhere else."""

    async def state(invite_id: str) -> str:
        listed = body_of(await gw.admin("GET", "/invites"))["data"]
        return next(str(one["state"]) for one in listed if one["invite_id"] == invite_id)

    plain = body_of(await gw.admin("POST", "/invites"))
    made = body_of(await gw.admin("POST", "/invites", {"expires_in_s": 60, "note": "a note"}))
    assert plain["expires_ms"] - made["expires_ms"] == pytest.approx(3_540_000, abs=5_000)
    invite = Invite.parse(made["token"])
    assert (invite.invite_id, invite.fingerprint) == (made["invite_id"], gw.fingerprint)
    listed = (await gw.admin("GET", "/invites")).body
    assert made["token"].encode() not in listed
    assert invite.secret.encode() not in listed
    assert b'"a note"' in listed
    assert await state(invite.invite_id) == "open"
    one = Applicant(gw, tmp_path)
    await one.join(invite)
    assert await state(invite.invite_id) == "used"
    says(await gw.admin("DELETE", f"/invites/{invite.invite_id}"), 404, "no open invite")
    assert body_of(await gw.admin("DELETE", f"/invites/{plain['invite_id']}"))["revoked"] is True
    assert await state(plain["invite_id"]) == "expired"
    says(await gw.admin("DELETE", "/invites/unknown"), 404, "no open invite")


@pytest.mark.story  # it waits for a second, as long as another process may keep the lock
async def test_a_store_that_takes_no_writes_is_told(tmp_path: Path) -> None:
    """And nothing has changed: neither what is kept nor the live node."""
    with memory_folder() as folder:
        async with gateway(folder) as gw:
            applicant = Applicant(gw, tmp_path)
            async with applicant.member() as node:
                before = gw.roster.record(applicant.node_id)
                key = gw.key("admin")
                gw.books._db.execute("BEGIN IMMEDIATE")  # another process keeps the lock
                try:
                    paths = f"/nodes/{applicant.node_id}/drain", "/invites"
                    raws = [request("POST", f"/v1/admin{path}", b"{}", key=key) for path in paths]
                    for reply in await asyncio.gather(*(send(gw.port, raw) for raw in raws)):
                        assert (reply.status, reply.error["code"]) == (503, "store_unavailable")
                finally:
                    gw.books._db.execute("ROLLBACK")
                assert (gw.roster.record(applicant.node_id), node.draining) == (before, False)
