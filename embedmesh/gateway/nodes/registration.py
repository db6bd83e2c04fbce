"""How a node registers: who it is, whether it may join, where it is, and a session key.

The order lets each check protect the next one: the statement is of this minute, and its nonce ours and new; it is
signed by the identity that it names; an operator has approved the node (by an invite, or by name); we may connect to
its address; the node that answers there, with that certificate, has that identity. Only then a session key is agreed
and the node gets its first probe. docs/reference/node-protocol.md describes it from the node's side.

Strangers may register, so that what they cost is bounded, with a share for each address: checked signatures, and
entries among the nodes that wait for approval. Admitted nodes have their own rate, shared by node, from addresses that
they have signed from before.
"""

import asyncio
import re
import secrets

import msgspec

from embedmesh.fleet.addresses import AddressRefused, Lookup, Policy, parse, resolve
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.rules import errors
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.limits import ADDRESS_CHECKS_MAX, KNOWN_A_MINUTE_MAX, STRANGERS_A_MINUTE_MAX
from embedmesh.rules.membership import (
    CHALLENGE,
    HEARTBEAT_S,
    NONCE_S,
    STATEMENT,
    TRANSCRIPT,
    Challenge,
    ChallengeAnswer,
    Greeting,
    Registration,
    Standing,
    Statement,
    Welcome,
)
from embedmesh.rules.ports import Clock
from embedmesh.rules.shares import Pace
from embedmesh.signing import atoma
from embedmesh.signing.certificates import is_certificate, pinned_context
from embedmesh.signing.identity import Identity, node_id, verify
from embedmesh.signing.invites import check_proof
from embedmesh.signing.nonces import Nonces
from embedmesh.signing.session import Ephemeral, transcript
from embedmesh.storage.nodes import NodeBooks, NodeRecord
from embedmesh.upstream.pools import tcp_pool

CHALLENGE_S = 4.0  # for a look-up, a connection, and one small exchange
CHALLENGE_REPLY_BYTES_MAX = 4_096
NOT_OURS = "The nonce is not from this gateway, or was used. GET /v1/nodes gives one."
NO_SUCH_ATOMA_NODE = "No admitted node has this key and this small id."
COUNTRY_CODE = re.compile("[A-Z]{2}")


class Registrar:
    """Registers nodes for one gateway, whose identity is `identity`."""

    def __init__(
        self,
        identity: Identity,
        nonces: Nonces,
        books: NodeBooks,
        roster: Roster,
        policy: Policy,
        lookup: Lookup,
        clock: Clock,
        *,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._identity = identity
        self._nonces = nonces
        self._books = books
        self._roster = roster
        self._policy = policy
        self._lookup = lookup
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._looking = asyncio.Semaphore(ADDRESS_CHECKS_MAX)
        self._last_from: dict[str, str] = {}  # the address that an admitted node last signed from, by node id
        self._under_way: set[bytes] = set()  # public keys of the nodes whose addresses are being checked
        busy = "This gateway takes {} registrations a minute of {}. Try again in a minute."
        self._known = Pace(
            KNOWN_A_MINUTE_MAX, 60.0, clock, busy.format(KNOWN_A_MINUTE_MAX, "nodes, of each a share of that")
        )
        self._strangers = Pace(
            STRANGERS_A_MINUTE_MAX,
            60.0,
            clock,
            busy.format(STRANGERS_A_MINUTE_MAX, "nodes that it does not know, from each address a share of that"),
        )

    def greet(self) -> Greeting:
        """Who we are, and a nonce."""
        return Greeting(self._identity.public_key, self._nonces.make(self._now_s()))

    async def register(self, registration: Registration, origin: str) -> Welcome:
        """Register a node, or update it. Raises a Failure that says what to correct. `origin` is the sender."""
        statement = self._read(registration)
        known = self._roster.by_key(statement.public_key)
        admitted = known is not None and known.standing is Standing.ADMITTED
        self._check_pace(known, origin)
        if not verify(statement.public_key, STATEMENT, registration.statement, registration.signature):
            raise errors.InvalidApiKey("The statement is not signed by the key that it names.")
        if known is not None and known.standing is Standing.REMOVED:
            raise errors.InsufficientScope("This node was removed by the operator of this gateway.")
        name = node_id(statement.public_key)
        if not admitted and not await self._shows_invite(registration, name):
            pending = await self._roster.note_pending(  # we do not connect to it, nor keep what it offers
                statement.public_key, origin, address=statement.address, country=statement.country
            )
            return Welcome(node_id=pending.node_id, small_id=pending.small_id, standing="pending")
        if not self._nonces.take(statement.nonce, self._now_s()):  # another registration with it was faster
            raise errors.InvalidApiKey(NOT_OURS)
        if not admitted and not await self._books.use_invite(str(registration.invite_id), name):
            raise errors.InvalidApiKey("The join token was used by another node just now.")
        self._last_from[name] = origin
        ip = await self._find(statement.address, statement.certificate, statement.public_key)
        return await self._admit(statement, ip)

    def _check_pace(self, known: NodeRecord | None, origin: str) -> None:
        """Before a signature is checked. The node's name proves nothing yet, unless that node has signed from there
        before. Raises Overloaded.
        """
        if known is not None and known.standing is Standing.ADMITTED and self._last_from.get(known.node_id) == origin:
            self._known.take(known.node_id)
        else:
            self._strangers.take(origin)

    async def move(self, data: dict[str, object], signature: str, origin: str) -> NodeRecord:
        """An admitted node has another address, in an Atoma node's three fields. Raises a CallerFailure."""
        try:
            public_key = atoma.signer(signature)
            known = self._roster.by_key(public_key)
            if known is None or known.standing is not Standing.ADMITTED:
                raise errors.InsufficientScope(NO_SUCH_ATOMA_NODE)
            self._check_pace(known, origin)
            atoma.check(data, signature)
            self._last_from[known.node_id] = origin
        except ValueError as error:
            raise errors.InvalidValue(f"This is not a valid registration: {error}.", param="signature") from None
        if known.small_id != data["node_small_id"]:
            raise errors.InsufficientScope(NO_SUCH_ATOMA_NODE)
        address = str(data["public_address"])
        ip = await self._find(address, known.certificate, public_key)
        country = str(data["country"]).upper()
        if not COUNTRY_CODE.fullmatch(country):  # a name, which has no code
            country = known.country
        return await self._roster.move(public_key, address=address, ip=ip, country=country)

    def _read(self, registration: Registration) -> Statement:
        try:
            statement = msgspec.json.decode(registration.statement, type=Statement)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            message = f"The statement does not follow the protocol: {error}."
            raise errors.InvalidValue(message, param="statement") from None
        if abs(self._clock.unix_ms() - statement.time_ms) > NONCE_S * 1000:
            raise errors.InvalidValue("The node's clock and the gateway's differ by over a minute. Set the clocks.")
        if not self._nonces.fresh(statement.nonce, self._now_s()):
            raise errors.InvalidApiKey(NOT_OURS)
        return statement

    async def _shows_invite(self, registration: Registration, of: str) -> bool:
        """Whether it shows an invite that it may use. A wrong one is refused."""
        if registration.invite_id is None or registration.proof is None:
            return False
        verifier = await self._books.invite(registration.invite_id, of)
        if verifier is None or not check_proof(verifier, registration.statement, registration.proof):
            raise errors.InvalidApiKey("The join token is not valid, was used by another node, or has expired.")
        return True

    async def _find(self, address: str, certificate: bytes, public_key: bytes) -> str:
        """The IP of an address at which the node itself answers; "" for a node that dials out."""
        if not address:
            return ""
        if public_key in self._under_way:
            raise errors.Overloaded("This node's address is being checked for another registration. Try again.")
        self._under_way.add(public_key)
        try:
            endpoint = parse(address)
            if endpoint.tls and not is_certificate(certificate):
                raise errors.InvalidValue("The certificate cannot be pinned: it must be in DER, with CA:FALSE.")
            async with self._looking, asyncio.timeout(CHALLENGE_S):
                ip = await resolve(endpoint, self._policy, self._lookup)
                await self._challenge(ip, endpoint.port, address, certificate if endpoint.tls else b"", public_key)
        except AddressRefused as refused:
            raise errors.InvalidValue(f"The address is refused. {refused}", param="address") from None
        except ValueError as error:
            raise errors.InvalidValue(f"The address is invalid. {error}", param="address") from None
        except (NodeFailure, TimeoutError):
            raise errors.InvalidValue(
                "The node does not answer at its address with its own identity. Can this gateway reach it? A node "
                "without a reachable address joins without one, and dials out.",
                param="address",
            ) from None
        finally:
            self._under_way.discard(public_key)
        return ip

    async def _challenge(self, ip: str, port: int, address: str, certificate: bytes, public_key: bytes) -> None:
        nonce = secrets.token_bytes(32)
        signature = self._identity.sign(CHALLENGE, nonce)
        body = msgspec.json.encode(Challenge(nonce, self._identity.public_key, signature))
        head = "POST /v1/challenge HTTP/1.1\r\nHost: node\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body
        tls = pinned_context(certificate) if certificate else None
        pool = tcp_pool(ip, port, tls, certificate=certificate or None)
        try:
            reply = await pool.exchange(lambda: request, CHALLENGE_REPLY_BYTES_MAX)
        finally:
            pool.close()
        try:
            answer = msgspec.json.decode(reply.body, type=ChallengeAnswer) if reply.status == 200 else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = None
        if answer is None or not verify(public_key, CHALLENGE, nonce + address.encode(), answer.signature):
            raise NodeFailure("another server answers there")

    async def _admit(self, statement: Statement, ip: str) -> Welcome:
        ephemeral = Ephemeral()
        agreed = transcript(
            node_public=statement.ephemeral,
            gateway_public=ephemeral.public,
            node_id=node_id(statement.public_key),
            gateway_public_key=self._identity.public_key,
            nonce=statement.nonce,
        )
        try:
            sessions = ephemeral.agree(statement.ephemeral, agreed)
        except ValueError:
            raise errors.InvalidValue("The node's half of the session key is invalid.", param="ephemeral") from None
        record = await self._roster.admit(
            statement.public_key,
            sessions,
            address=statement.address,
            ip=ip,
            certificate=statement.certificate,
            country=statement.country,
            offers=statement.offers,
            inputs_max=statement.inputs_max,
        )
        return Welcome(
            node_id=record.node_id,
            small_id=record.small_id,
            standing="admitted",
            ephemeral=ephemeral.public,
            signature=self._identity.sign(TRANSCRIPT, agreed),
            heartbeat_s=self._heartbeat_s,
        )

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000
