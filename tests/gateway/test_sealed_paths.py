"""Locks and sealed requests on the fast path: they mean the same as on the general server, and leave it to nobody."""

import json
from typing import Any

import pytest

from embedmesh.gateway.api.app import GatewayApp
from embedmesh.http.aiohttp_connection import ServerConnection
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.limits import SMALL_BODY_BYTES_MAX
from tests.flow.sealed import DictLocks, HpkeNode, hpke_envelope
from tests.flow.world import GOOD_KEY, make_world
from tests.http.raw import Raw, request, send, serving

LOCK, SEALED = "/v1/nodes/lock", "/v1/confidential/embeddings"
GENERAL: Any = {"TE": "trailers"}  # which the fast path leaves to the general server
TEXT = b'{"input":"abc","model":"tiny"}'
SAME_HEADERS = (
    "content-type",
    "x-embedmesh-node",
    "x-embedmesh-cost-nanousd",
    "retry-after",
    "x-should-retry",
    "server",
)


class Scene:
    """A gateway with one node for sealed requests."""

    def __init__(self) -> None:
        self.world = make_world()
        self.locks, self.node = DictLocks(self.world), HpkeNode(self.world)
        self.app = GatewayApp(
            self.world,
            self.world.fleet.registry,
            in_flight_max=100,
            bodies=BodyBudget(10**8),
            gauges=dict,
            confidential=(self.locks, self.node),
        )

    def sealed(self, reply: Raw) -> bytes:
        """A request under the lock of a reply."""
        terms = self.locks.locks[json.loads(reply.body)["stack_small_id"]]
        return self.seal(terms)

    def seal(self, terms: LockTerms) -> bytes:
        return hpke_envelope(TEXT, terms, self.node.document.node_id)


@pytest.fixture
async def scene() -> Scene:
    return Scene()


def lock_body(**members: Any) -> bytes:
    return json.dumps({"model": "tiny", "max_num_tokens": 100, "scheme": "hpke-1"} | members).encode()


LOCK_REQUESTS: dict[str, tuple[dict[str, Any], int]] = {
    "a lock": ({"body": lock_body()}, 200),
    "no key": ({"body": lock_body(), "key": None}, 401),
    "a key that is none": ({"body": lock_body(), "key": "em_bad"}, 401),
    "no body": ({"body": b""}, 400),
    "no JSON": ({"body": b"{"}, 400),
    "no object": ({"body": b"[]"}, 400),
    "no model": ({"body": b"{}"}, 400),
    "broken UTF-8": ({"body": b'{"model":"\xff"}'}, 400),
    "an unknown model": ({"body": lock_body(model="no/such")}, 404),
    "no tokens": ({"body": lock_body(max_num_tokens=0)}, 400),
    "an hour": ({"body": lock_body(timeout=3_600)}, 400),
    "a node that is not here": ({"body": lock_body(nodes=["node_x"])}, 503),
    "too large": ({"body": lock_body(x="x" * SMALL_BODY_BYTES_MAX)}, 413),
    "an id of the caller's": ({"body": lock_body(), "x_request_id": "mine"}, 200),
}


@pytest.mark.parametrize("which", LOCK_REQUESTS)
async def test_a_lock_is_had_or_refused_alike(scene: Scene, which: str) -> None:
    given, status = LOCK_REQUESTS[which]
    async with serving(scene.app.server) as port:
        fast = await send(port, request(path=LOCK, **given))
        general = await send(port, request(path=LOCK, **given, **GENERAL))
    assert (fast.status, general.status) == (status, status)
    assert [fast.headers.get(name) for name in SAME_HEADERS] == [general.headers.get(name) for name in SAME_HEADERS]
    assert (fast.headers["x-request-id"] == "mine") == ("x_request_id" in given)
    if status == 200:
        one, other = (json.loads(reply.body) | {"stack_small_id": 0} for reply in (fast, general))
        assert one == other
    elif status != 413:
        assert fast.error == general.error
    else:
        assert fast.error["code"] == general.error["code"]


@pytest.mark.parametrize("way", [{}, GENERAL], ids=["fast", "general"])
async def test_a_sealed_request_on_each_way(scene: Scene, way: dict[str, str]) -> None:
    """With the lock for the next; again, without it; and refused."""
    async with serving(scene.app.server) as port:
        lock = await send(port, request(path=LOCK, body=lock_body(), **way))
        body, ahead = scene.sealed(lock), {"x_embedmesh_next_lock": "256"}
        first = await send(port, request(path=SEALED, body=body, **way, **ahead))
        assert first.status == 200
        assert first.headers["x-embedmesh-node"] == "n0"
        following = json.loads(first.body)["next_lock"]
        again = await send(port, request(path=SEALED, body=body, **way, **ahead))
        assert again.headers["idempotent-replayed"] == "true"
        assert json.loads(again.body) | {"next_lock": following} == json.loads(first.body)
        body = scene.seal(scene.locks.locks[following["stack_small_id"]])
        refused = await send(port, request(path=SEALED, body=body, **way, x_embedmesh_next_lock="0"))
        assert (refused.status, refused.error["param"]) == (400, "x-embedmesh-next-lock")
        scene.node.refuse = True
        refused = await send(port, request(path=SEALED, body=body, **way))
        assert (refused.status, refused.error["code"]) == (400, "confidential_refused")
        assert "sealed" in refused.error
    assert [what for what, _ in scene.world.ledger.log].count("capture") == 1


async def test_ordinary_ones_never_come_to_the_general_server(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has a connection, it keeps it: a plain call behind a lock would be as slow as that."""
    taken: list[bytes] = []
    data_received = ServerConnection.data_received

    def noted(connection: ServerConnection, data: bytes) -> None:
        data_received(connection, data)
        taken.append(b"general" if connection._fast_path is None else b"fast")

    monkeypatch.setattr(ServerConnection, "data_received", noted)
    async with serving(scene.app.server) as port:
        lock = await send(port, request(path=LOCK, body=lock_body()))
        await send(port, request(path=SEALED, body=scene.sealed(lock), key=GOOD_KEY))
        assert set(taken) == {b"fast"}
        await send(port, request(path=LOCK, body=lock_body(), **GENERAL))
        assert taken[-1] == b"general"
