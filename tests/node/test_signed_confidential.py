"""Confidential calls over the signed way of a node that joined a gateway, at its address or where it dialled out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from embedmesh.gateway.nodes.own import OwnLink, Signing
from embedmesh.http.server import HttpServer
from embedmesh.http.unix_socket import bind_unix
from embedmesh.node.compact_path import CompactPath
from embedmesh.node.signed_api import SignedApi
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.confidential import HPKE_SCHEME
from embedmesh.rules.embeddings import COMPACT, SEALED_HEAD
from embedmesh.rules.errors import NodeBroke, Overloaded
from embedmesh.rules.models import Model
from embedmesh.signing.identity import node_id
from embedmesh.signing.messages import content_digest, digest_value
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.signing.session import Session
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.pools import unix_pool
from tests.engine.tiny import catalogue_entry, make_folder
from tests.http.raw import read_reply
from tests.node.sealing import asking
from tests.node.test_sealed_calls import NODE, SealingNode

SESSION = Session("0123456789abcdef", bytes(range(32)))
SEALED = ("POST", "/v1/confidential/embeddings")
OTHER_HEAD = SEALED_HEAD.replace(b"Host: node", b"Host: other")  # the same to HTTP: the general server takes it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return catalogue_entry(make_folder(tmp_path_factory.mktemp("models") / "tiny"))


class SignedNode:
    """A node behind its door, on a socket so that it needs no certificate, and its gateway."""

    def __init__(self, node: SealingNode, folder: Path, *, signed: bool) -> None:
        self.node = node
        self.socket = folder / "n.sock"
        self.bodies = node.bodies
        self.receipts = ReceiptLog(folder / "receipts.log")
        clock = SystemClock()
        door = SignedApi(
            app=node.app,
            bodies=self.bodies,
            identity=NODE,
            gateway="",
            address="",
            receipts=self.receipts,
            clock=clock,
            sealed=node.calls,
        )
        door.new_session(SESSION)
        path = CompactPath(node.app, self.bodies, door if signed else None, node.calls)
        routes = door.routes() if signed else {**node.app.routes(), **node.calls.routes()}
        self.server = HttpServer(routes, on_internal_error=self._bug, fast_path=path)
        self.bugs = 0
        self.pool = unix_pool(str(self.socket))
        self.signing: Signing | None = None
        if signed:
            self.signing = Signing(node_id(NODE.public_key), "0" * 16, clock, lambda *answer: None)
            self.signing.add(SESSION)

    def _bug(self) -> None:
        self.bugs += 1

    async def post(self, body: bytes, head: bytes) -> Http1Reply:
        """As a gateway does; a reply of status 200 must be signed."""
        signed = None if self.signing is None else self.signing.sign(SEALED, body, "req_1")

        def build() -> bytes:
            headers = b"" if signed is None else signed.headers
            return head + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body

        reply = await self.pool.exchange(build, 1_000_000)
        if reply.status == 200 and self.signing is not None and signed is not None:
            self.signing.check(signed, reply)
        return reply


@asynccontextmanager
async def serving(model: Model, folder: Path, *, signed: bool = True) -> AsyncIterator[SignedNode]:
    node = SignedNode(await SealingNode.start(model), folder, signed=signed)
    sock = bind_unix(node.socket)
    await node.server.start(sock)
    try:
        yield node
    finally:
        node.pool.close()
        await node.server.drain(0.1)
    assert node.bodies.taken == 0, "room for bodies was not given back"
    assert node.bugs == 0


@pytest.mark.parametrize("head", [SEALED_HEAD, OTHER_HEAD])
async def test_a_signed_call_gets_a_signed_answer_and_a_receipt_over_sealed_bytes(
    head: bytes, model: Model, tmp_path: Path
) -> None:
    """Over the fast path and the general server. A refusal has no receipt: nothing was embedded."""
    async with serving(model, tmp_path) as node:
        sealed = node.node.seal(HPKE_SCHEME, asking(input=["w1 w2"]))
        reply = await node.post(sealed.body, head)
        assert sealed.read(reply.body)[0].tokens == 4
        refused = await node.post(sealed.body, head)
        assert refused.status == 200
        assert sealed.read(refused.body)[0].status == 400
        (receipt,) = node.receipts.page(1).receipts
        digests = [digest_value(digest) for digest in (receipt.request_digest, receipt.reply_digest)]
        assert digests == [content_digest(sealed.body), content_digest(reply.body)]
        assert receipt.tokens == 4


async def test_the_gateway_remembers_sealed_answers_for_their_receipts(model: Model, tmp_path: Path) -> None:
    """Else no receipt of a confidential request could be found false."""
    noted: list[tuple[str, str, str, int]] = []
    async with serving(model, tmp_path) as node:
        signing = Signing(node_id(NODE.public_key), "1" * 16, SystemClock(), lambda *answer: noted.append(answer))
        signing.add(SESSION)
        link = OwnLink(node.pool, SystemClock(), signing)
        sealed = node.node.seal(HPKE_SCHEME, asking(input=["w1 w2"]))
        for _ in range(2):  # the second is refused as a replay
            await link.post_sealed(sealed.body, 1_000_000, "req_7")
        (receipt,) = node.receipts.page(1).receipts
    digests = digest_value(receipt.request_digest), digest_value(receipt.reply_digest)
    assert noted == [("req_7", *digests, receipt.tokens)]


@pytest.mark.parametrize("head", [SEALED_HEAD, OTHER_HEAD])
async def test_strangers_get_a_401(head: bytes, model: Model, tmp_path: Path) -> None:
    """And leave nothing."""
    async with serving(model, tmp_path) as node:
        signing, node.signing = node.signing, None
        sealed = node.node.seal(HPKE_SCHEME)
        assert (await node.post(sealed.body, head)).status == 401
        node.signing = signing
        assert sealed.read((await node.post(sealed.body, head)).body)[0].status == 200


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("head", [SEALED_HEAD, OTHER_HEAD])
@pytest.mark.parametrize(("failure", "status"), [(Overloaded("full"), 429), (NodeBroke("broke"), 500)])
async def test_failures_have_the_statuses_of_ordinary_calls(
    signed: bool, head: bytes, failure: Exception, status: int, model: Model, tmp_path: Path
) -> None:
    async with serving(model, tmp_path, signed=signed) as node:
        node.node.engine.raises = failure
        assert (await node.post(node.node.seal(HPKE_SCHEME).body, head)).status == status


@pytest.mark.parametrize("head", [SEALED_HEAD, OTHER_HEAD])
async def test_a_large_call_finds_its_way(head: bytes, model: Model, tmp_path: Path) -> None:
    """One that is larger than an ordinary body may be: it is too large inside, which its caller alone is told."""
    async with serving(model, tmp_path) as node:
        sealed = node.node.seal(HPKE_SCHEME, asking(input="w" * 4 * 1024 * 1024))
        assert sealed.reply((await node.post(sealed.body, head)).body)["error"]["code"] == "body_too_large"


async def test_who_hangs_up_drops_the_work(model: Model, tmp_path: Path) -> None:
    async with serving(model, tmp_path, signed=False) as node:
        node.node.engine.open.clear()
        _, writer = await asyncio.open_unix_connection(str(node.socket))
        sealed = node.node.seal(HPKE_SCHEME)
        writer.write(SEALED_HEAD + b"Content-Length: %d\r\n\r\n" % len(sealed.body) + sealed.body)
        while not node.node.engine.asked:
            await asyncio.sleep(0.001)
        writer.close()
        await asyncio.wait_for(node.node.engine.dropped.wait(), 5)


async def test_on_one_connection_confidential_and_other_calls_follow_each_other(model: Model, tmp_path: Path) -> None:
    """As the gateway writes them, none leaves the fast path: no answer has the headers of the general server."""
    async with serving(model, tmp_path, signed=False) as node:
        reader, writer = await asyncio.open_unix_connection(str(node.socket))
        lines = f"GET /v1/models HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n".encode()
        for _ in range(3):
            sealed = node.node.seal(HPKE_SCHEME)
            for start, body in ((SEALED_HEAD, sealed.body), (lines, b"")):
                writer.write(start + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                reply = await read_reply(reader)
                assert reply.status == 200
                assert "x-request-id" not in reply.headers
        writer.close()
