"""A node's API over the network: for its own gateways, and nobody else.

Every request carries a signature under the session that was agreed at registration; one without it gets a 401 and
nothing more. The one exception is the challenge, by which a gateway checks that this is the node that registered this
address: it is signed by the gateway's identity, which the node knows from its join token. Anybody may send a challenge,
so their bodies have a budget of their own, and only some are checked, with a share for each address.
"""

import functools
from binascii import a2b_base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from embedmesh.http.bodies import JSON_HEADERS, json_reply
from embedmesh.http.connections import Origins
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.routing import Methods, Routes
from embedmesh.node.app import NodeApp, queue_full
from embedmesh.node.confidential import CONFIDENTIAL_PATH, SealedCalls
from embedmesh.rules import errors
from embedmesh.rules.embeddings import COMPACT
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from embedmesh.rules.membership import CHALLENGE, Challenge, ChallengeAnswer
from embedmesh.rules.ports import Clock
from embedmesh.rules.shares import Pace
from embedmesh.signing.identity import Identity, fingerprint, node_id, verify
from embedmesh.signing.messages import CheckedRequest, RequestChecker, Unauthenticated
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.signing.session import Session

if TYPE_CHECKING:
    from embedmesh.node.sidecar_api import SidecarApp

CHALLENGE_BYTES_MAX = 4_096
CHALLENGES_BYTES_TOTAL_MAX = 64 * CHALLENGE_BYTES_MAX
CHALLENGES_A_MINUTE_MAX = 600  # a gateway sends one when the node registers; 600 signatures take 0.06 s
OWN_GATEWAYS_ONLY = "This node answers its own gateways only."


@dataclass(kw_only=True, eq=False)
class SignedApi:
    """Handlers for gateways. `gateway` is the fingerprint of the gateway's key; `address` what the node registered."""

    app: "NodeApp | SidecarApp"
    bodies: BodyBudget
    identity: Identity
    gateway: str
    address: str
    receipts: ReceiptLog
    clock: Clock
    sealed: SealedCalls | None = None  # None where no confidential requests are taken

    def __post_init__(self) -> None:
        self._checker = RequestChecker(node_id(self.identity.public_key))
        self._origins = Origins()
        self._challenge_bodies = BodyBudget(CHALLENGES_BYTES_TOTAL_MAX)
        full = f"This node takes {CHALLENGES_A_MINUTE_MAX} challenges a minute; each address has a share of that."
        self._challenges = Pace(CHALLENGES_A_MINUTE_MAX, 60.0, self.clock, full)

    def routes(self) -> Routes:
        """Every path and method of the API."""
        routes: dict[str, Methods] = {
            "/v1/embeddings": {"POST": self.embeddings},
            "/v1/models": {"GET": self.models},
            "/v1/challenge": {"POST": self.challenge},
        }
        if self.sealed is not None:
            routes[CONFIDENTIAL_PATH] = {"POST": functools.partial(self.confidential, self.sealed)}
        return routes

    def new_session(self, session: Session) -> None:
        """Also answer requests under this session."""
        self._checker.add(session, self._now_s())

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """The compact form, signed both ways, with a receipt."""
        checked = self._check(request)  # before a byte of the body is read: strangers take no memory
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self.bodies, content_type=COMPACT)
        try:
            self.check_body(checked, body)
            reply, tokens = await self.app.embed_compact(body)
        except errors.Overloaded as failure:
            return queue_full(failure)
        finally:
            self.bodies.give_back("", len(body))
        return self._signed(checked, web.Response(body=reply, headers={"Content-Type": COMPACT}), tokens)

    async def confidential(self, sealed: SealedCalls, request: web.BaseRequest) -> web.StreamResponse:
        """Signed both ways, with a receipt over what was sealed."""
        checked = self._check(request)
        body = await sealed.read_body(request)
        try:
            self.check_body(checked, body)
            reply, tokens = await sealed.answer(body)
        except errors.Overloaded as failure:
            return queue_full(failure)
        finally:
            sealed.give_back(body)
        return self._signed(checked, web.Response(body=reply, headers={"Content-Type": COMPACT}), tokens)

    async def models(self, request: web.BaseRequest) -> web.StreamResponse:
        checked = self._check(request)
        self.check_body(checked, b"")
        return self._signed(checked, web.Response(body=self.app.list_bytes(), headers=JSON_HEADERS), 0)

    async def challenge(self, request: web.BaseRequest) -> web.StreamResponse:
        """Proves that this is the node that registered its address."""
        origin = self._origins.of_request(request)
        self._challenges.take(origin)
        body = await read_body(request, CHALLENGE_BYTES_MAX, self._challenge_bodies, origin)
        self._challenge_bodies.give_back(origin, len(body))
        try:
            challenge = msgspec.json.decode(body, type=Challenge)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise errors.InvalidType("The body is not a challenge of the node protocol.") from None
        mine = fingerprint(challenge.gateway_key) == self.gateway
        if not mine or not verify(challenge.gateway_key, CHALLENGE, challenge.nonce, challenge.signature):
            raise errors.InvalidApiKey(OWN_GATEWAYS_ONLY)
        return json_reply(ChallengeAnswer(self.identity.sign(CHALLENGE, challenge.nonce + self.address.encode())))

    def check_head(self, method: str, path: str, headers: Mapping[str, str]) -> CheckedRequest:
        """The request, if its head is signed as agreed. Names of headers in lower case. Raises InvalidApiKey."""
        try:
            return self._checker.check_head(method, path, headers, self._now_s())
        except Unauthenticated:
            raise errors.InvalidApiKey(OWN_GATEWAYS_ONLY) from None

    def check_body(self, checked: CheckedRequest, body: bytes) -> None:
        """Accept the request, once. Raises InvalidApiKey."""
        try:
            checked.check_body(body, self._now_s())
        except Unauthenticated:
            raise errors.InvalidApiKey(OWN_GATEWAYS_ONLY) from None

    def sign(self, checked: CheckedRequest, reply: bytes, tokens: int) -> list[tuple[str, str]]:
        """The headers that sign a reply of status 200. It gets a receipt if it embedded something."""
        headers = checked.sign_reply(200, reply, self.receipts.count + 1 if tokens else 0, self._now_s())
        if tokens:
            digests = _raw(checked.digest), _raw(dict(headers)["Content-Digest"])
            self.receipts.add(checked.request_id, *digests, tokens, self.clock.unix_ms())
        return headers

    def _check(self, request: web.BaseRequest) -> CheckedRequest:
        headers = {name.lower(): value for name, value in request.headers.items()}
        return self.check_head(request.method, request.rel_url.raw_path, headers)

    def _signed(self, checked: CheckedRequest, response: web.Response, tokens: int) -> web.Response:
        assert isinstance(response.body, bytes)
        response.headers.extend(self.sign(checked, response.body, tokens))
        return response

    def _now_s(self) -> int:
        return self.clock.unix_ms() // 1000


def _raw(content_digest: str) -> bytes:
    """The 32 bytes of `sha-256=:...:`."""
    return a2b_base64(content_digest[len("sha-256=:") : -1])
