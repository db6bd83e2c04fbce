"""How a node comes to be one of ours: who it is, whether it may, where it is, and a key that both share.

In this order, each step before anything that the next one risks: the statement is of this minute, and its nonce ours
and new; it is signed by the identity that it names; an operator has said yes (by an invite, or by name); the address is
one that we may connect to; whoever answers there, with that certificate, is that identity. Only then a session key is
agreed and the node gets its first probe. docs/reference/node-protocol.md tells it from the node's side.

Anybody may ask, so that what strangers cost is bounded, with a share for each address: signatures that are checked, and
places among those that wait for an operator. Nodes that are admitted have a pace of their own, shared by node, from
where they have signed before.
"""

import asyncio
import re
import secrets

import msgspec

from embedmesh.fleet.addresses import AddressRefused, Lookup, Policy, parse, resolve
from embedmesh.gateway.nodes.http1 import tcp_dialler
from embedmesh.gateway.nodes.roster import Members
from embedmesh.rules import errors
from embedmesh.rules.errors import NodeFailure
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

CHALLENGE_S = 4.0  # a name is looked up, a connection made, one small exchange
REPLY_BYTES_MAX = 4_096
NOT_OURS = "The nonce is not one of this gateway's, or was used. GET /v1/nodes gives one."
NO_SUCH_NODE = "No admitted node has this key and this small id."
MINUTE_S = 60.0
COUNTRY_CODE = re.compile("[A-Z]{2}")
A_MINUTE_KNOWN_MAX = 600  # registrations of admitted nodes: each comes twice a day, and when it is started anew
A_MINUTE_STRANGERS_MAX = 3_000  # a hundred pending nodes ask twelve times each; 3,000 signatures take 0.3 s
AT_ONE_TIME_MAX = 8  # registrations that look at an address; each may keep a thread of the resolver busy


class Registrar:
    """Registers nodes for one gateway, whose identity is `identity`."""

    def __init__(
        self,
        identity: Identity,
        nonces: Nonces,
        books: NodeBooks,
        members: Members,
        policy: Policy,
        lookup: Lookup,
        clock: Clock,
        *,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._identity = identity
        self._nonces = nonces
        self._books = books
        self._members = members
        self._policy = policy
        self._lookup = lookup
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._looking = asyncio.Semaphore(AT_ONE_TIME_MAX)
        self._last_from: dict[str, str] = {}  # where nodes that may join have signed, by node id
        self._under_way: set[bytes] = set()  # the public keys of nodes whose addresses are looked at
        busy = "This gateway takes {} registrations a minute of {}. Try again in a minute."
        self._known = Pace(
            A_MINUTE_KNOWN_MAX, MINUTE_S, clock, busy.format(A_MINUTE_KNOWN_MAX, "nodes, of each a share of that")
        )
        self._strangers = Pace(
            A_MINUTE_STRANGERS_MAX,
            MINUTE_S,
            clock,
            busy.format(A_MINUTE_STRANGERS_MAX, "nodes that it does not know, from each address a share of that"),
        )

    def greet(self) -> Greeting:
        """Who we are, and a nonce."""
        return Greeting(self._identity.public_key, self._nonces.make(self._now_s()))

    async def register(self, asked: Registration, origin: str) -> Welcome:
        """Take a node in, or take it back with what has changed. Raises a Failure that says what to mend.

        `origin` says from where it was asked.
        """
        statement = self._read(asked)
        known = self._members.by_key(statement.public_key)
        admitted = known is not None and known.standing is Standing.ADMITTED
        self._check_pace(known, origin)
        if not verify(statement.public_key, STATEMENT, asked.statement, asked.signature):
            raise errors.InvalidApiKey("The statement is not signed by the key that it names.")
        if known is not None and known.standing is Standing.REMOVED:
            raise errors.InsufficientScope("This node was removed by the operator of this gateway.")
        if not admitted and not await self._shows_invite(asked, node_id(statement.public_key)):
            return await self._note_pending(statement, origin)
        if not self._nonces.take(statement.nonce, self._now_s()):  # another registration with it was faster
            raise errors.InvalidApiKey(NOT_OURS)
        if not admitted:
            await self._use_invite(asked, node_id(statement.public_key))
        self._last_from[node_id(statement.public_key)] = origin
        ip = await self._find(statement.address, statement.certificate, statement.public_key)
        return await self._admit(statement, ip)

    def _check_pace(self, known: NodeRecord | None, origin: str) -> None:
        """Before a signature is looked at. That it names an admitted node proves nothing yet, unless that has signed
        from there before. Raises Overloaded.
        """
        if known is not None and known.standing is Standing.ADMITTED and self._last_from.get(known.node_id) == origin:
            self._known.take(known.node_id)
        else:
            self._strangers.take(origin)

    async def move(self, data: dict[str, object], signature: str, origin: str) -> NodeRecord:
        """The three fields of an Atoma node: an admitted node has another address. Raises a CallerFailure."""
        try:
            public_key = atoma.signer(signature)
            known = self._members.by_key(public_key)
            if known is None or known.standing is not Standing.ADMITTED:
                raise errors.InsufficientScope(NO_SUCH_NODE)
            self._check_pace(known, origin)
            atoma.check(data, signature)
            self._last_from[known.node_id] = origin
        except ValueError as error:
            raise errors.InvalidValue(f"This is no registration: {error}.", param="signature") from None
        if known.small_id != data["node_small_id"]:
            raise errors.InsufficientScope(NO_SUCH_NODE)
        address = str(data["public_address"])
        ip = await self._find(address, known.certificate, public_key)
        country = str(data["country"]).upper()
        if not COUNTRY_CODE.fullmatch(country):  # a name: of which no code can be guessed
            country = known.country
        return await self._members.move(public_key, address=address, ip=ip, country=country)

    def _read(self, asked: Registration) -> Statement:
        try:
            statement = msgspec.json.decode(asked.statement, type=Statement)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            message = f"The statement is not of the protocol's form: {error}."
            raise errors.InvalidValue(message, param="statement") from None
        if abs(self._clock.unix_ms() - statement.time_ms) > NONCE_S * 1000:
            raise errors.InvalidValue("The node's clock and the gateway's differ by more than a minute: set them.")
        if not self._nonces.fresh(statement.nonce, self._now_s()):
            raise errors.InvalidApiKey(NOT_OURS)
        return statement

    async def _shows_invite(self, asked: Registration, of: str) -> bool:
        """Whether it shows one that it may use. A wrong one is refused, none is no invitation."""
        if asked.invite_id is None or asked.proof is None:
            return False
        verifier = await self._books.invite(asked.invite_id, of)
        if verifier is None or not check_proof(verifier, asked.statement, asked.proof):
            raise errors.InvalidApiKey("The join token is not valid, was used by another node, or has expired.")
        return True

    async def _use_invite(self, asked: Registration, of: str) -> None:
        assert asked.invite_id is not None
        if not await self._books.use_invite(asked.invite_id, of):
            raise errors.InvalidApiKey("The join token was used by another node just now.")

    async def _note_pending(self, statement: Statement, origin: str) -> Welcome:
        """Somebody unknown asks: an operator may say yes. Nothing is connected to, and what it offers is not kept."""
        record = await self._members.note_pending(
            statement.public_key, origin, address=statement.address, country=statement.country
        )
        return Welcome(node_id=record.node_id, small_id=record.small_id, standing="pending")

    async def _find(self, address: str, certificate: bytes, public_key: bytes) -> str:
        """The IP of an address at which that very node answers; nothing for one that dials out."""
        if not address:
            return ""
        if public_key in self._under_way:
            raise errors.Overloaded("This node's address is being looked at for another registration of it. Try again.")
        self._under_way.add(public_key)
        try:
            endpoint = parse(address)
            if endpoint.tls and not is_certificate(certificate):
                raise errors.InvalidValue("The certificate is not one that can be pinned (CA:FALSE, DER).")
            async with self._looking, asyncio.timeout(CHALLENGE_S):
                ip = await resolve(endpoint, self._policy, self._lookup)
                await self._challenge(ip, endpoint.port, address, certificate if endpoint.tls else b"", public_key)
        except AddressRefused as refused:
            raise errors.InvalidValue(f"The address is refused. {refused}", param="address") from None
        except ValueError as error:
            raise errors.InvalidValue(f"The address is not one. {error}", param="address") from None
        except (NodeFailure, TimeoutError):
            raise errors.InvalidValue(
                "Nobody answers at the node's address as the node that registered it. Can this gateway reach it? A "
                "node without a reachable address joins without one, and dials out.",
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
        wires = tcp_dialler(ip, port, tls, certificate=certificate or None)
        try:
            reply = await wires.exchange(lambda: request, REPLY_BYTES_MAX)
        finally:
            wires.close()
        try:
            answer = msgspec.json.decode(reply.body, type=ChallengeAnswer) if reply.status == 200 else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = None
        if answer is None or not verify(public_key, CHALLENGE, nonce + address.encode(), answer.signature):
            raise NodeFailure("somebody else answers there")

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
            raise errors.InvalidValue("The node's half of the session key is not one.", param="ephemeral") from None
        said = _said(statement) | {"ip": ip, "certificate": statement.certificate}
        record = await self._members.admit(statement.public_key, sessions, **said)
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


def _said(statement: Statement) -> dict[str, object]:
    """What a node says of itself, as members of its record."""
    return {
        "address": statement.address,
        "country": statement.country,
        "offers": statement.offers,
        "inputs_max": statement.inputs_max,
    }
