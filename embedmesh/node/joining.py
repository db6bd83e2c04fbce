"""A node's side of its membership: it registers, sends a heartbeat every two seconds, and says farewell when it leaves.

Whatever happens to the gateway, the node goes on serving and tries again. Only what a person must fix ends it: an
invalid join token, an address that is refused at the first registration, a removal.

The node speaks to its gateway with aiohttp's client, as the commands do, not with the gateway's own towards nodes
(`upstream/http1.py`): that one exists for thousands of requests a second over few connections, this is one in two.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from embedmesh.files import write_draft
from embedmesh.node.dialling import DialOut
from embedmesh.rules import membership
from embedmesh.rules.errors import SetupError
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import HEARTBEAT_RECEIPTS_MAX, REQUEST_INPUTS_MAX
from embedmesh.rules.membership import Greeting, Heartbeat, HeartbeatReply, Offer, Registration, SignedHead, Welcome
from embedmesh.rules.ports import Clock
from embedmesh.rules.tls_failures import cause_of, tls_failure
from embedmesh.signing.identity import Identity, fingerprint, node_id, verify
from embedmesh.signing.invites import Invite, proof
from embedmesh.signing.messages import RequestSigner
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.signing.receipts import RECEIPTS_PURPOSE, head_message
from embedmesh.signing.session import Ephemeral, Session, transcript

log = logging.getLogger("embedmesh.node")

T = TypeVar("T")

GATEWAY_REPLY_S = 10.0  # for one exchange with the gateway; a registration includes its visit to our address
REGISTER_RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)  # before the n-th try in a row
PENDING_S = 5.0  # between two checks whether an operator has approved the node
FAREWELL_S = 3.0  # a gateway that does not answer will notice by itself
GATEWAY_REPLY_BYTES_MAX = 64 * 1024
FINGERPRINT = re.compile(r"[A-Za-z0-9_-]{43}")
REMOVED_STATUS = 403
SETUP_STATUSES = (400, 401)  # of the first registration; later ones were right once, and may be again
NO_REPLY = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class KnownGateway(msgspec.Struct, frozen=True):
    """`gateway.json`: which gateway this node belongs to, so that a later start needs no token."""

    url: str
    fingerprint: str


class AdvertisedAddress(NamedTuple):
    """Where gateways can reach the node, and its certificate if that is https. No address: it dials out."""

    url: str
    certificate: bytes
    country: str


class GatewayRefused(Exception):
    """The gateway refused a request of the node. The message is the gateway's own, for the node's operator."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def find_gateway(file: Path, url: str, invite: Invite | None, key: str = "") -> KnownGateway:
    """The gateway to join: that of the invite, that of the fingerprint `key`, or the one that was joined before.

    Raises SetupError.
    """
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.path or parts.query:
        raise SetupError(f"{url} is not a gateway's address: use http://HOST:PORT or https://HOST. Mend --gateway.")
    if invite is not None:
        return KnownGateway(url, invite.fingerprint)
    if key:
        if not FINGERPRINT.fullmatch(key):
            raise SetupError("A gateway's fingerprint has 43 characters. Mend --gateway-key.")
        return KnownGateway(url, key)
    try:
        known = msgspec.json.decode(file.read_bytes(), type=KnownGateway)
    except FileNotFoundError:
        raise SetupError(
            "This node has not joined a gateway yet: give --join TOKEN, which `embedmesh nodes invite` prints there, "
            "or --gateway-key, and have its operator approve the node."
        ) from None
    except (OSError, msgspec.DecodeError):
        raise SetupError(f"{file} cannot be read. Move it away and join again with --join.") from None
    return KnownGateway(url, known.fingerprint)  # the gateway may have moved: its key is what counts


@dataclass(kw_only=True, eq=False)
class Joining:
    """One node's membership at one gateway. `run` never returns by itself; after it come `leave` and `hang_up`.

    `on_session` gets the key of each session under which the gateway will sign. Without an address there is `dial_out`.
    """

    known: KnownGateway
    file: Path
    invite: Invite | None
    identity: Identity
    address: AdvertisedAddress
    dial_out: DialOut | None
    on_session: Callable[[Session], None]
    receipts: ReceiptLog
    clock: Clock
    offers: Callable[[], tuple[Offer, ...]]
    report: Callable[[], Heartbeat]

    def __post_init__(self) -> None:
        self._node_id = node_id(self.identity.public_key)
        self._instance = secrets.token_hex(8)
        self._signer: RequestSigner | None = None
        self._http: aiohttp.ClientSession | None = None

    async def run(self) -> None:
        """Register, report, and register again when the session is old or forgotten. Raises SetupError."""
        failures = 0
        pending_logged = False
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=GATEWAY_REPLY_S)) as self._http:
            while True:
                try:
                    welcome = await self._register()
                except GatewayRefused as refused:
                    if refused.status == REMOVED_STATUS or (refused.status in SETUP_STATUSES and self._signer is None):
                        raise SetupError(f"The gateway refuses this node: {refused}") from None
                    failures += 1
                    log.warning("the gateway does not take this node now: %s", refused)
                except NO_REPLY as error:
                    if not failures and isinstance(error, aiohttp.ClientSSLError):
                        log.warning("%s", tls_failure(self.known.url, cause_of(error)))
                    elif not failures:
                        log.warning("the gateway %s does not answer (%s)", self.known.url, type(error).__name__)
                    failures += 1
                else:
                    failures = 0
                    if welcome.standing == "admitted":
                        await self._report_until_stale(welcome.heartbeat_s)
                        continue
                    if not pending_logged:
                        log.info("waiting for the gateway's operator: `embedmesh nodes approve %s`", self._node_id)
                        pending_logged = True
                pause_s = REGISTER_RETRY_S[min(failures, len(REGISTER_RETRY_S)) - 1] if failures else PENDING_S
                await asyncio.sleep(pause_s * (0.75 + secrets.randbelow(500) / 1000))

    async def leave(self) -> None:
        """Say farewell, so that the gateway sends no more, and dial no more."""
        if self._signer is not None:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FAREWELL_S)) as self._http:
                with contextlib.suppress(*NO_REPLY, GatewayRefused):
                    await self._say("drain", b"{}")
        if self.dial_out is not None:
            self.dial_out.leave()

    async def hang_up(self) -> None:
        """End the connections that we opened for the gateway, once all requests are answered."""
        if self.dial_out is not None:
            await self.dial_out.stop()

    async def _register(self) -> Welcome:
        greeting = _decode(await self._send("GET", "/v1/nodes", b"", {}), Greeting)
        if fingerprint(greeting.gateway_key) != self.known.fingerprint:
            raise SetupError(f"{self.known.url} is not the gateway of this node's join token: is the address right?")
        ephemeral = Ephemeral()
        statement = msgspec.json.encode(
            membership.Statement(
                version=membership.VERSION,
                public_key=self.identity.public_key,
                address=self.address.url,
                certificate=self.address.certificate,
                country=self.address.country,
                offers=self.offers(),
                inputs_max=REQUEST_INPUTS_MAX,
                ephemeral=ephemeral.public,
                nonce=greeting.nonce,
                time_ms=self.clock.unix_ms(),
            )
        )
        registration = Registration(
            statement,
            self.identity.sign(membership.STATEMENT, statement),
            self.invite.invite_id if self.invite else None,
            proof(self.invite.secret, statement) if self.invite else None,
        )
        welcome = _decode(await self._send("POST", "/v1/nodes", msgspec.json.encode(registration), {}), Welcome)
        if welcome.standing == "admitted":
            self._begin_session(greeting, ephemeral, welcome)
        return welcome

    def _begin_session(self, greeting: Greeting, ephemeral: Ephemeral, welcome: Welcome) -> None:
        """Agree the session's keys, and use them. Raises ValueError if the gateway has not signed its half."""
        agreed = transcript(
            node_public=ephemeral.public,
            gateway_public=welcome.ephemeral,
            node_id=self._node_id,
            gateway_public_key=greeting.gateway_key,
            nonce=greeting.nonce,
        )
        if not verify(greeting.gateway_key, membership.TRANSCRIPT, agreed, welcome.signature):
            raise ValueError("the gateway's half of the session key is not signed by it")
        sessions = ephemeral.agree(welcome.ephemeral, agreed)
        self.on_session(sessions.of_gateway)
        self._signer = RequestSigner(sessions.of_node, self._node_id, self._instance)
        with contextlib.suppress(OSError):  # then the next start needs the token again, and says so
            write_draft(self.file, msgspec.json.encode(self.known)).replace(self.file)
        log.info("joined %s as %s (number %d there)", self.known.url, self._node_id, welcome.small_id)
        if self.dial_out is not None:
            self.dial_out.start(self._node_id, self._sign)

    async def _report_until_stale(self, every_s: float) -> None:
        """Send heartbeats until the session is old, the offers have changed, or the gateway has forgotten the node."""
        began, offered, missed = self.clock.monotonic(), self.offers(), 0
        receipts_from: int | None = None
        more = False
        while self.clock.monotonic() - began < membership.SESSION_S and self.offers() == offered:
            await asyncio.sleep(0 if more else every_s)
            try:
                reply = await self._beat(receipts_from)
            except (*NO_REPLY, GatewayRefused) as error:
                if isinstance(error, GatewayRefused) and error.status == 401:
                    return
                receipts_from, more = None, False  # whether the gateway has our last receipts is not known
                missed += 1
                if missed == 1:
                    log.warning("the gateway %s does not answer; trying on", self.known.url)
            else:
                missed = 0
                sent, receipts_from = receipts_from, self.receipts.wanted_from(reply.receipts_from)
                more = sent is not None and sent < receipts_from <= self.receipts.count - HEARTBEAT_RECEIPTS_MAX

    async def _beat(self, receipts_from: int | None) -> HeartbeatReply:
        """One heartbeat, with the receipts from that number on; None asks the gateway for the number."""
        beat = self.report()
        if receipts_from is not None:
            page = self.receipts.page(receipts_from)
            now_ms = self.clock.unix_ms()
            message = head_message(self._node_id, self.known.fingerprint, page.count, page.head, now_ms)
            head = SignedHead(page.count, page.head, now_ms, self.identity.sign(RECEIPTS_PURPOSE, message))
            beat = msgspec.structs.replace(beat, receipts=page.receipts, head=head)
        return _decode(await self._say("heartbeat", msgspec.json.encode(beat)), HeartbeatReply)

    async def _say(self, what: str, body: bytes) -> bytes:
        path = f"/v1/nodes/{self._node_id}/{what}"
        return await self._send("POST", path, body, self._sign("POST", path, body))

    def _sign(self, method: str, path: str, body: bytes) -> dict[str, str]:
        """The headers that sign a request of the node under the session."""
        assert self._signer is not None
        signed = self._signer.sign(method, path, body, new_id("nrq", self.clock), self.clock.unix_ms() // 1000)
        return dict(line.split(": ", 1) for line in signed.headers.decode("ascii").splitlines())

    async def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        """The body of a 200. Raises GatewayRefused for another status, and NO_REPLY."""
        assert self._http is not None
        headers = {"Content-Type": "application/json", **headers}
        async with self._http.request(
            method, self.known.url + path, data=body or None, headers=headers, allow_redirects=False
        ) as reply:
            content = await reply.content.read(GATEWAY_REPLY_BYTES_MAX)
            if reply.status != 200:
                raise GatewayRefused(reply.status, _error_message(content))
            return content


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("the gateway's reply is not of the protocol's form") from None


def _error_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "it does not say why; is it an embedmesh gateway?"
