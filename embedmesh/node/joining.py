"""A node's side of its membership: it joins, says every two seconds how it is, and says farewell before it leaves.

Whatever happens to the gateway, the node goes on serving and tries again. Only what a person has to mend ends it: a
join token that is not valid, an address that is refused when it joins, a removal.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from embedmesh.files import write_draft
from embedmesh.http.server import HttpServer
from embedmesh.node.dialling import DialOut
from embedmesh.node.signed_api import NodeDoor
from embedmesh.rules.errors import SetupError
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import HEARTBEAT_RECEIPTS_MAX, REQUEST_INPUTS_MAX
from embedmesh.rules.membership import (
    SESSION_S,
    STATEMENT,
    TRANSCRIPT,
    VERSION,
    Greeting,
    Heartbeat,
    HeartbeatReply,
    Offer,
    Registration,
    SignedHead,
    Statement,
    Welcome,
)
from embedmesh.rules.ports import Clock
from embedmesh.signing.identity import Identity, fingerprint, verify
from embedmesh.signing.invites import Invite, proof
from embedmesh.signing.messages import RequestSigner
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.signing.receipts import RECEIPTS_PURPOSE, head_message
from embedmesh.signing.session import Ephemeral, transcript

log = logging.getLogger("embedmesh.node")

T = TypeVar("T")

ANSWER_S = 10.0  # of one exchange with the gateway; a registration includes its visit to our address
AGAIN_S = (0.5, 1.0, 2.0, 5.0, 10.0)  # before the n-th try in a row to register
PENDING_S = 5.0  # between two questions whether an operator has said yes
FAREWELL_S = 3.0  # a gateway that does not answer will notice by itself
FINGERPRINT = re.compile(r"[A-Za-z0-9_-]{43}")
REPLY_BYTES_MAX = 64 * 1024
REMOVED = 403
TO_BE_MENDED = (400, 401)  # of the first registration; later ones were right once, and may be again


class Known(msgspec.Struct, frozen=True):
    """`gateway.json`: which gateway this node belongs to, so that a later start needs no token."""

    url: str
    fingerprint: str


class Place(NamedTuple):
    """Where a node can be reached: nowhere (it dials out), or at an address, with a certificate where that is https."""

    address: str
    certificate: bytes
    country: str


class Report(NamedTuple):
    """How a node is: tokens that wait there, and its speed in tokens per second."""

    tokens_waiting: int
    tokens_per_s: float


class Refused(Exception):
    """The gateway says no. The message is its own, for the node's operator."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def find_gateway(file: Path, url: str, invite: Invite | None, key: str = "") -> Known:
    """The gateway to belong to: the token's, the one of the fingerprint `key`, or the one that was joined before.

    Raises SetupError.
    """
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.path or parts.query:
        raise SetupError(f"{url} is no gateway's address: use http://HOST:PORT or https://HOST. Mend --gateway.")
    if invite is not None:
        return Known(url, invite.fingerprint)
    if key:
        if not FINGERPRINT.fullmatch(key):
            raise SetupError("A gateway's fingerprint has 43 characters. Mend --gateway-key.")
        return Known(url, key)
    try:
        known = msgspec.json.decode(file.read_bytes(), type=Known)
    except FileNotFoundError:
        raise SetupError(
            "This node has not joined a gateway yet: give --join TOKEN, which `embedmesh nodes invite` prints there, "
            "or --gateway-key, and have its operator approve the node."
        ) from None
    except (OSError, msgspec.DecodeError):
        raise SetupError(f"{file} cannot be read. Move it away and join anew with --join.") from None
    return Known(url, known.fingerprint)  # the gateway may have moved: its key is what counts


class Joining:
    """One node's membership at one gateway. `run` never returns by itself; then `leave`."""

    def __init__(
        self,
        known: Known,
        file: Path,
        invite: Invite | None,
        identity: Identity,
        node_id: str,
        place: Place,
        door: NodeDoor,
        server: HttpServer,
        receipts: ReceiptLog,
        clock: Clock,
        offers: Callable[[], tuple[Offer, ...]],
        report: Callable[[], Report],
    ) -> None:
        self._known = known
        self._file = file
        self._invite = invite
        self._identity = identity
        self._node_id = node_id
        self._place = place
        self._door = door
        self._receipts = receipts
        self._clock = clock
        self._offers = offers
        self._report = report
        self._instance = secrets.token_hex(8)
        self._signer: RequestSigner | None = None
        self._dial_out = DialOut(known.url, server) if not place.address else None
        self._http: aiohttp.ClientSession | None = None
        self._told_pending = False

    async def run(self) -> None:
        """Register, report, register anew when it is time or the gateway has forgotten us. Raises SetupError."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as http:
            self._http = http
            failures = 0
            while True:
                try:
                    welcome = await self._register()
                except Refused as refused:
                    if refused.status == REMOVED or (refused.status in TO_BE_MENDED and self._signer is None):
                        raise SetupError(f"The gateway refuses this node: {refused}") from None
                    failures += 1
                    log.warning("the gateway does not take this node now: %s", refused)
                except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                    if not failures:
                        log.warning("the gateway %s does not answer (%s)", self._known.url, type(error).__name__)
                    failures += 1
                else:
                    failures = 0
                    if welcome.standing == "admitted":
                        await self._report_until_stale(welcome.heartbeat_s)
                        continue
                    self._tell_pending()
                pause = AGAIN_S[min(failures, len(AGAIN_S)) - 1] if failures else PENDING_S
                await asyncio.sleep(pause * (0.75 + secrets.randbelow(500) / 1000))

    async def leave(self) -> None:
        """Say farewell, so that the gateway sends no more; end the connections that we opened for it."""
        if self._signer is not None:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FAREWELL_S)) as self._http:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, Refused, ValueError):
                    await self._say("drain", b"{}")

    def dial_no_more(self) -> None:
        """Open no further connections for the gateway; those that are there stay."""
        if self._dial_out is not None:
            self._dial_out.leaving = True

    async def hang_up(self) -> None:
        """End the connections that we opened for the gateway: once all is answered."""
        if self._dial_out is not None:
            await self._dial_out.stop()

    async def _register(self) -> Welcome:
        greeting = _decode(await self._ask("GET", "/v1/nodes", b"", {}), Greeting)
        if fingerprint(greeting.gateway_key) != self._known.fingerprint:
            raise SetupError(f"{self._known.url} is not the gateway of this node's join token: is the address right?")
        ephemeral = Ephemeral()
        statement = msgspec.json.encode(
            Statement(
                version=VERSION,
                public_key=self._identity.public_key,
                address=self._place.address,
                certificate=self._place.certificate,
                country=self._place.country,
                offers=self._offers(),
                inputs_max=REQUEST_INPUTS_MAX,
                ephemeral=ephemeral.public,
                nonce=greeting.nonce,
                time_ms=self._clock.unix_ms(),
            )
        )
        asked = Registration(
            statement,
            self._identity.sign(STATEMENT, statement),
            self._invite.invite_id if self._invite else None,
            proof(self._invite.secret, statement) if self._invite else None,
        )
        welcome = _decode(await self._ask("POST", "/v1/nodes", msgspec.json.encode(asked), {}), Welcome)
        if welcome.standing == "admitted":
            agreed = transcript(
                node_public=ephemeral.public,
                gateway_public=welcome.ephemeral,
                node_id=self._node_id,
                gateway_public_key=greeting.gateway_key,
                nonce=greeting.nonce,
            )
            if not verify(greeting.gateway_key, TRANSCRIPT, agreed, welcome.signature):
                raise ValueError("the gateway's half of the session key is not signed by it")
            sessions = ephemeral.agree(welcome.ephemeral, agreed)
            self._door.new_session(sessions.of_gateway)
            self._signer = RequestSigner(sessions.of_node, self._node_id, self._instance)
            self._remember()
            log.info("joined %s as %s (number %d there)", self._known.url, self._node_id, welcome.small_id)
            if self._dial_out is not None:
                self._dial_out.start(self._node_id, self._sign)
        return welcome

    async def _report_until_stale(self, every_s: float) -> None:
        """Heartbeats until the session is old, what is offered has changed, or the gateway knows us no more."""
        began, offered, missed = self._clock.monotonic(), self._offers(), 0
        wanted: int | None = None
        more = False
        while self._clock.monotonic() - began < SESSION_S and self._offers() == offered:
            await asyncio.sleep(0 if more else every_s)
            try:
                reply = await self._beat(wanted)
            except Refused as refused:
                if refused.status == 401:
                    return
                missed += 1
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                missed += 1
            else:
                missed = 0
                sent, wanted = wanted, self._receipts.wanted_from(reply.receipts_from)
                more = sent is not None and sent < wanted <= self._receipts.count - HEARTBEAT_RECEIPTS_MAX
            if missed:
                wanted, more = None, False  # whether it has our last receipts is not known
            if missed == 1:
                log.warning("the gateway %s does not answer; trying on", self._known.url)

    async def _beat(self, wanted: int | None) -> HeartbeatReply:
        """One report, with the receipts from number `wanted` on; the first asks which those are."""
        report = self._report()
        if wanted is None:
            beat = Heartbeat(report.tokens_waiting, report.tokens_per_s)
            return _decode(await self._say("heartbeat", msgspec.json.encode(beat)), HeartbeatReply)
        page = self._receipts.page(wanted)
        now_ms = self._clock.unix_ms()
        message = head_message(self._node_id, self._known.fingerprint, page.count, page.head, now_ms)
        head = SignedHead(page.count, page.head, now_ms, self._identity.sign(RECEIPTS_PURPOSE, message))
        beat = Heartbeat(report.tokens_waiting, report.tokens_per_s, page.receipts, head)
        return _decode(await self._say("heartbeat", msgspec.json.encode(beat)), HeartbeatReply)

    async def _say(self, what: str, body: bytes) -> bytes:
        path = f"/v1/nodes/{self._node_id}/{what}"
        return await self._ask("POST", path, body, self._sign("POST", path, body))

    def _sign(self, method: str, path: str, body: bytes) -> dict[str, str]:
        """The headers that sign a request of ours under the session."""
        assert self._signer is not None
        signed = self._signer.sign(method, path, body, new_id("nrq", self._clock), self._clock.unix_ms() // 1000)
        lines = signed.headers.decode("ascii").splitlines()
        return dict(line.split(": ", 1) for line in lines)

    async def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        """A 200's body. Raises Refused for another status, and aiohttp's errors."""
        assert self._http is not None
        headers = {"Content-Type": "application/json", **headers}
        async with self._http.request(
            method, self._known.url + path, data=body or None, headers=headers, allow_redirects=False
        ) as reply:
            said = await reply.content.read(REPLY_BYTES_MAX)
            if reply.status != 200:
                raise Refused(reply.status, _message(said))
            return said

    def _remember(self) -> None:
        """From now on no token is needed."""
        with contextlib.suppress(OSError):  # then the token is needed again, and says so
            write_draft(self._file, msgspec.json.encode(self._known)).replace(self._file)

    def _tell_pending(self) -> None:
        if not self._told_pending:
            log.info("waiting for the gateway's operator: `embedmesh nodes approve %s`", self._node_id)
            self._told_pending = True


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("the gateway's answer is not of the protocol's form") from None


def _message(body: bytes) -> str:
    """The words of an error envelope."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "it does not say why; is it an embedmesh gateway?"
