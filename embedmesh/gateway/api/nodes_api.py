"""`/v1/nodes`: messages of nodes to the gateway. Each handler adapts HTTP to the registrar or the members.

A registration is signed by the node's identity; a heartbeat, a drain and a dialled connection under the session that
was agreed then. Anybody may register, so bodies of registrations have a small budget of their own, shared by address.
The other messages are checked by their heads, before a byte of the body is read, and share a budget by node.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from embedmesh.fleet.registry import Registry
from embedmesh.gateway.api.routes import NO_KEY, SIGNED, Api, ApiCall, ApiReply, RawHandler, Route
from embedmesh.gateway.nodes.connected import ConnectedNode
from embedmesh.gateway.nodes.registration import Registrar
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.http.aiohttp_connection import hand_over
from embedmesh.http.bodies import JSON_HEADERS, decoded, json_reply
from embedmesh.http.connections import Origins
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.routing import PATH_REMAINDER
from embedmesh.rules import errors
from embedmesh.rules.limits import NODE_MESSAGE_BYTES_MAX, NODE_REPORTS_A_MINUTE_MAX, REGISTRATION_BYTES_MAX
from embedmesh.rules.membership import HEARTBEAT_S, Greeting, Heartbeat, HeartbeatReply, Registration, Welcome
from embedmesh.rules.nodes import Check
from embedmesh.rules.ports import Clock
from embedmesh.rules.shares import Pace
from embedmesh.signing.atoma import ATOMA_FIELDS
from embedmesh.signing.messages import CheckedRequest, Unauthenticated
from embedmesh.storage.nodes import NodeBooks
from embedmesh.upstream.http1 import Connection
from embedmesh.upstream.pools import InboundPool

log = logging.getLogger("embedmesh.fleet")

UPGRADE = "embedmesh-node"  # the protocol of a connection that a node dials
SWITCHING = f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n".encode("ascii")
REGISTRATIONS_BYTES_TOTAL_MAX = 2 * 1024 * 1024
REPORTS_BYTES_TOTAL_MAX = 16 * 1024 * 1024
SIGNATURE = ("Content-Digest", "Embedmesh-Receipt", "Signature-Input", "Signature")
ATOMA_DATA = {
    "required": list(ATOMA_FIELDS),
    "properties": {
        name: {"type": "integer", "minimum": 0} if kind is int else {"type": "string"}
        for name, kind in ATOMA_FIELDS.items()
    },
}
UNSIGNED = "The request is not signed under a session of that node. Register again."
BEATS_MISSED_MAX = 3  # then the node's report of its queue is too old


class AtomaRegistration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The three-field registration of `atoma-sdk`."""

    data: Annotated[dict[str, Any], Meta(extra_json_schema=ATOMA_DATA)]
    signature: str


class Message(msgspec.Struct, frozen=True):
    """The reply to the form of `atoma-sdk`."""

    message: str


class NodesApi(Api):
    """Handlers of `/v1/nodes` over a registrar and the members."""

    TAG = "Nodes"

    def __init__(
        self,
        registrar: Registrar,
        roster: Roster,
        registry: Registry,
        books: NodeBooks,
        clock: Clock,
        origins: Origins,
        *,
        reports_a_minute_max: int = NODE_REPORTS_A_MINUTE_MAX,
    ) -> None:
        self._registrar = registrar
        self._roster = roster
        self._registry = registry
        self._books = books
        self._clock = clock
        self._origins = origins
        self._registrations = BodyBudget(REGISTRATIONS_BYTES_TOTAL_MAX)
        self._reports = BodyBudget(REPORTS_BYTES_TOTAL_MAX)
        self._reports_a_minute_max = reports_a_minute_max
        self._paces: dict[str, Pace] = {}  # of nodes that were admitted

    async def greet_node(self, call: ApiCall[None, None]) -> Greeting:
        """Get the gateway's identity. Its public key, and a nonce for a registration, valid for a minute."""
        return self._registrar.greet()

    async def register_node(self, request: web.BaseRequest) -> web.StreamResponse:
        """Register a node, or move it.

        A node joins, or reports what has changed, in a statement that its identity signs. It is admitted by an invite
        or by the operator; until then it is pending, and asks again. The gateway visits the address before it uses it.
        An admitted node may also send the three fields of `atoma-sdk`.
        """
        origin = self._origins.of_request(request)
        body = await _body(request, REGISTRATION_BYTES_MAX, self._registrations, origin)
        if "data" in decoded(body, dict[str, msgspec.Raw]):
            atoma = decoded(body, AtomaRegistration)
            record = await self._registrar.move(atoma.data, atoma.signature, origin)
            return json_reply(Message(f"Node {record.small_id} is registered at its new address."))
        return json_reply(await self._registrar.register(decoded(body, Registration), origin))

    async def report_node(self, request: web.BaseRequest) -> web.StreamResponse:
        """Report. The state of a node, with receipts of its replies."""
        return await self._speak(request, self._heartbeat)

    async def drain_node(self, request: web.BaseRequest) -> web.StreamResponse:
        """Leave. A node that is about to stop gets no more work until it registers again."""
        return await self._speak(request, self._drain)

    async def _speak(
        self, request: web.BaseRequest, handle: Callable[[ConnectedNode, bytes], Awaitable[bytes]]
    ) -> web.StreamResponse:
        node_id = request[PATH_REMAINDER]
        member, checked = self._check(request, node_id)
        self._pace(node_id).take(node_id)
        body = await _body(request, NODE_MESSAGE_BYTES_MAX, self._reports, node_id)
        self._check_body(checked, body)
        reply = await handle(member, body)
        headers = checked.sign_reply(200, reply, 0, self._now_s())
        response = web.Response(body=reply, headers=JSON_HEADERS)
        response.headers.extend(headers)
        return response

    async def dial_in(self, request: web.BaseRequest) -> web.StreamResponse:
        """Dial in.

        A node that accepts no connections opens one, with `Upgrade: embedmesh-node`. The gateway then sends its
        requests over it.
        """
        if request.method != "GET" or request.headers.get("Upgrade", "").lower() != UPGRADE:
            raise errors.NotFound("A node dials in here, with `Upgrade: embedmesh-node`.")
        member, checked = self._check(request, request[PATH_REMAINDER])
        self._check_body(checked, b"")
        pool = member.pool
        if not isinstance(pool, InboundPool):
            raise errors.InvalidValue("This node is registered with an address. Join without one to dial out.")
        connection = Connection()
        asyncio.get_running_loop().call_soon(pool.offer, connection)  # once it has been handed over
        await hand_over(request, connection, SWITCHING)

    async def _heartbeat(self, member: ConnectedNode, body: bytes) -> bytes:
        beat = decoded(body, Heartbeat)
        member.seen = self._clock.monotonic()
        load = member.node.load
        until = self._clock.monotonic() + BEATS_MISSED_MAX * HEARTBEAT_S
        load.others_say(max(0, beat.tokens_waiting - load.tokens), until)
        member.reported = beat
        asks = beat.head is None  # which receipts to send: the node forgets those before
        if asks or (beat.receipts and beat.receipts[0].number != member.audit.count + 1):
            await self._roster.refresh_audit(member)
        if beat.head is not None:
            try:
                checked = member.audit.check(beat.receipts, beat.head, self._clock.unix_ms())
            except ValueError as error:
                member.node.counts["receipts_refused"] += 1
                node_id = member.node.node_id
                log.warning("node %s: its log is refused: %s", node_id, error, extra={"node": node_id})
            else:
                member.node.counts["receipts_matched"] += checked.matched
                member.node.counts["receipts_unmatched"] += checked.unmatched
                member.node.counts["receipts_false"] += checked.false
                if checked.false:
                    self._registry.quarantine(member.node, "they are not of what it answered", Check.RECEIPTS)
                if beat.receipts:
                    await self._books.note_receipts(member.node.node_id, member.audit.count, member.audit.head)
        return msgspec.json.encode(HeartbeatReply(member.audit.count + 1))

    async def _drain(self, member: ConnectedNode, body: bytes) -> bytes:
        self._registry.drain(member.node)
        log.info("node %s leaves", member.node.node_id, extra={"node": member.node.node_id})
        return b"{}"

    def _check(self, request: web.BaseRequest, node_id: str) -> tuple[ConnectedNode, CheckedRequest]:
        """The node that signed the request's head. Raises InvalidApiKey."""
        member = self._roster.connected(node_id)
        if member is None:
            raise errors.InvalidApiKey(UNSIGNED)
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            path = request.rel_url.raw_path
            return member, member.checker.check_head(request.method, path, headers, self._now_s())
        except Unauthenticated:
            raise errors.InvalidApiKey(UNSIGNED) from None

    def _pace(self, node_id: str) -> Pace:
        if (pace := self._paces.get(node_id)) is None:
            full = f"A node reports every {HEARTBEAT_S:g} s. This node reported far more often. Wait a minute."
            pace = self._paces[node_id] = Pace(self._reports_a_minute_max, 60.0, self._clock, full)
        return pace

    def _check_body(self, checked: CheckedRequest, body: bytes) -> None:
        try:
            checked.check_body(body, self._now_s())
        except Unauthenticated:
            raise errors.InvalidApiKey(UNSIGNED) from None

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000

    ROUTES = (
        Route("GET", "/v1/nodes", NO_KEY, greet_node),
        Route(
            "POST",
            "/v1/nodes",
            NO_KEY,
            register_node,
            failures=(errors.InvalidApiKey, errors.InsufficientScope),
            raw=RawHandler(
                {
                    200: ApiReply(
                        "A session, or that the node has to wait; a message for `atoma-sdk`.", (Welcome, Message)
                    )
                },
                (Registration, AtomaRegistration),
            ),
        ),
        Route(
            "POST",
            "/v1/nodes/{node_id}/heartbeat",
            SIGNED,
            report_node,
            details=f"Every {HEARTBEAT_S:g} seconds.",
            raw=RawHandler(
                {200: ApiReply("Which receipts to send next.", HeartbeatReply, headers=SIGNATURE)}, Heartbeat
            ),
        ),
        Route(
            "POST",
            "/v1/nodes/{node_id}/drain",
            SIGNED,
            drain_node,
            raw=RawHandler({200: ApiReply("Done.", dict[str, Any], headers=SIGNATURE)}, dict[str, Any]),
        ),
        Route(
            "GET",
            "/v1/nodes/{node_id}/dial",
            SIGNED,
            dial_in,
            failures=(errors.InvalidValue,),
            raw=RawHandler({101: ApiReply("The gateway sends its requests over this connection.", content_type="")}),
        ),
    )


async def _body(request: web.BaseRequest, bytes_max: int, room: BodyBudget, whose: str) -> bytes:
    body = await read_body(request, bytes_max, room, whose)
    room.give_back(whose, len(body))
    return body
