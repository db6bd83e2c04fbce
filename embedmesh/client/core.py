"""A confidential request, step by step, without I/O: lock, seal, read the reply. Every check is here.

    step = LockStep(wanted, trust)      send `step.body`
    sealed = step.read(reply, now_ms)   checks whom to seal for, and seals; send `sealed.body`
    rows = sealed.read(reply)           checks the reply, and opens it

Before `read` of a LockStep has returned, no byte of what is wanted can have left: `LockStep.body` has the model's name
and a bound of its tokens. A SealedStep is sealed once, for one lock; its body may be sent again, and is the same then.
"""

import secrets
from base64 import b64encode
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from embedmesh.client.answer import Rows, read_rows
from embedmesh.client.errors import WrongCall
from embedmesh.client.pins import Pins
from embedmesh.client.refusals import Problem, read_problem
from embedmesh.client.wanted import Wanted
from embedmesh.client.words import node_not_trusted, reply_not_trusted
from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.documents import KnownKeys
from embedmesh.confidential.failures import SealBroken, Untrusted
from embedmesh.confidential.hpke_scheme import EventOpener
from embedmesh.confidential.statements import digest_of, read_answer
from embedmesh.rules.base64s import decode64
from embedmesh.rules.confidential import (
    HPKE_SCHEME,
    NODES_LOCKED_MAX,
    SDK_SCHEME,
    AnswerStatement,
    KeyDocument,
    SealedAnswer,
    SignedKeys,
)
from embedmesh.rules.exchange import NEXT_LOCK_HEADER
from embedmesh.rules.limits import LOCK_S, REQUEST_BODY_BYTES_MAX, REQUEST_TOKENS_MAX
from embedmesh.rules.membership import NONCE_S, Whole
from embedmesh.signing.identity import node_id

KEY_BYTES = 32
CLOCKS_DIFFER_MS = NONCE_S * 1000  # at most, as between nodes and gateways
ENVELOPE_BYTES_MAX = 2_048  # of a sealed request, beside the ciphertext
UNREADABLE = "confidential_refused"  # the code of a refusal that says nothing to anybody
NO_REASON = "it could not open the request, or does not take it, and nobody is told which"

NO_LOCK = msgspec.Raw(b"")

Open = Callable[[SealedAnswer], bytes]


class SealedFor(NamedTuple):
    """What a request was sealed for, and what opens the reply: see `SealedStep`."""

    public_key: bytes  # the node's identity
    lock: int
    units: int
    digest: bytes  # of the request
    opener: Open
    events: Callable[[], EventOpener] | None


class Trust(msgspec.Struct, frozen=True):
    """Whom to seal for, and how. Without pins the gateway is trusted, which only the SDK's scheme allows."""

    pins: Pins | None
    scheme: str = HPKE_SCHEME
    documents: KnownKeys = msgspec.field(default_factory=KnownKeys)

    def __post_init__(self) -> None:
        if self.scheme not in (HPKE_SCHEME, SDK_SCHEME):
            raise WrongCall(f"The scheme must be {HPKE_SCHEME}, or {SDK_SCHEME} to do as the published SDKs do.")
        if self.pins is None and self.scheme == HPKE_SCHEME:
            raise WrongCall("A confidential call needs pins: the identities of the nodes that may read it.")


class _LockReply(msgspec.Struct, frozen=True):
    public_key: str
    stack_small_id: Whole
    scheme: str
    expires_ms: Whole
    max_num_tokens: Whole
    model: str
    keys: SignedKeys


class _Sealed(msgspec.Struct, frozen=True):
    """What is sealed and signed of a reply or a refusal, in base64."""

    ciphertext: str
    statement: str
    statement_signature: str
    nonce: str = ""
    response_hash: str = ""
    signature: str = ""


class _SealedUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class _SealedReply(_Sealed, frozen=True, kw_only=True):
    usage: _SealedUsage
    next_lock: msgspec.Raw = NO_LOCK


class _RefusedError(msgspec.Struct, frozen=True):
    sealed: _Sealed


class _Refused(msgspec.Struct, frozen=True):
    error: _RefusedError


class LockStep:
    """Asks for a node to be locked. `ahead` are the headers by which a sealed request asks for the next lock."""

    def __init__(self, wanted: Wanted, trust: Trust) -> None:
        """Raises WrongCall where the request is too large to be sealed."""
        size = hpke_scheme.padded_size(len(wanted.body) + ENVELOPE_BYTES_MAX) * 4 // 3 + ENVELOPE_BYTES_MAX
        if size > REQUEST_BODY_BYTES_MAX:
            raise WrongCall(f"Sealed, the request has more than {REQUEST_BODY_BYTES_MAX:,} bytes. Split it.")
        self._wanted = wanted
        self._trust = trust
        self.units = wanted.lock_tokens or _units(wanted.tokens_max)
        asks: dict[str, Any] = {
            "model": wanted.model,
            "max_num_tokens": self.units,
            "timeout": LOCK_S,
            "scheme": trust.scheme,
        }
        pins = trust.pins
        nodes: list[str] = []
        if pins is not None and not pins.verifiers and len(pins.nodes) <= NODES_LOCKED_MAX:
            nodes = asks["nodes"] = sorted(map(node_id, pins.nodes))  # a hint: what comes back is checked all the same
        self.body = msgspec.json.encode(asks)
        self.ahead = {NEXT_LOCK_HEADER: " ".join((str(self.units), *nodes))}

    def read(self, reply: bytes, now_ms: int, units: int | None = None) -> "SealedStep":
        """Seal for the node of this lock; `units` are those that it was asked for, if more than are needed.

        Raises NodeNotTrusted; `reason` is "not_pinned" where another may do.
        """
        try:
            lock = msgspec.json.decode(reply, type=_LockReply)
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise node_not_trusted("form") from None
        if lock.scheme != self._trust.scheme:
            raise node_not_trusted("scheme")
        try:
            document = self._trust.documents.read(lock.keys)
        except Untrusted as error:
            raise node_not_trusted(error.reason) from None
        self._check_who(lock.keys, document)
        try:
            node_key = decode64(lock.public_key, KEY_BYTES)
        except ValueError:
            raise node_not_trusted("key") from None
        if document.keys.get(self._trust.scheme) != node_key:  # type: ignore[call-overload]  # any str may be asked for
            raise node_not_trusted("key")
        if not document.not_before_ms - CLOCKS_DIFFER_MS <= now_ms < document.not_after_ms:
            raise node_not_trusted("clock")
        ids = document.models.keys()
        if lock.model not in ({self._wanted.model} & ids or ids):  # what is no id may be another name of any
            raise node_not_trusted("model")
        if lock.max_num_tokens != (units or self.units):
            raise node_not_trusted("units")
        latest_ms = min(now_ms + LOCK_S * 1000 + CLOCKS_DIFFER_MS, document.not_after_ms)
        if not now_ms - CLOCKS_DIFFER_MS <= lock.expires_ms <= latest_ms:
            raise node_not_trusted("expiry")
        return _seal(self._wanted, self._trust.scheme, lock, document, node_key)

    def _check_who(self, signed: SignedKeys, document: KeyDocument) -> None:
        pins = self._trust.pins
        if pins is None or document.public_key in pins.nodes:
            return
        for verifier in pins.verifiers:
            try:
                verifier.verify(signed, document)
            except Untrusted:
                continue
            return
        raise node_not_trusted("not_pinned", offered=document.node_id, pinned=pins.in_words())


class SealedStep:
    """One sealed request, for one lock."""

    def __init__(
        self,
        wanted: Wanted,
        body: bytes,
        *,
        document: KeyDocument,
        lock: int,
        units: int,
        digest: bytes,
        opener: Open,
        events: Callable[[], EventOpener] | None = None,
    ) -> None:
        """`opener` opens a whole reply, `events` those of a stream."""
        self.body = body
        self.about = SealedFor(document.public_key, lock, units, digest, opener, events)
        self.node_id = document.node_id
        self._wanted = wanted
        self._public_key = document.public_key
        self._lock = lock
        self._units = units
        self._digest = digest
        self._open = opener

    def read(self, reply: bytes) -> Rows:
        """The vectors of a reply with status 200; `next_lock` is in them, not checked yet. Raises ReplyNotTrusted."""
        try:
            told = msgspec.json.decode(reply, type=_SealedReply)
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise reply_not_trusted("form") from None
        answer, statement = self._checked(told)
        if statement.status != 200:
            raise reply_not_trusted("status")
        if not 0 < statement.tokens <= self._units:
            raise reply_not_trusted("tokens")
        if not told.usage.prompt_tokens == told.usage.total_tokens == statement.tokens:
            raise reply_not_trusted("usage")
        try:
            rows = read_rows(self._opened(answer), self._wanted)
        except ValueError as error:
            raise reply_not_trusted(str(error)) from None
        if rows.model != self._wanted.model:
            raise reply_not_trusted("model")
        if rows.tokens != statement.tokens:
            raise reply_not_trusted("usage")
        next_lock = bytes(told.next_lock)
        return rows if next_lock in (b"", b"null") else msgspec.structs.replace(rows, next_lock=next_lock)

    def read_refusal(self, status: int, reply: bytes) -> Problem | None:
        """What the node says about a refusal; None where only the gateway speaks. Raises ReplyNotTrusted."""
        try:
            told = msgspec.json.decode(reply, type=_Refused).error.sealed
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
        answer, statement = self._checked(told)
        if statement.status == 200:
            raise reply_not_trusted("status")
        if not answer.sealed:
            return Problem(status, UNREADABLE, NO_REASON)
        return read_problem(status, self._opened(answer))

    def _checked(self, told: _Sealed) -> tuple[SealedAnswer, AnswerStatement]:
        """What the node has answered to this request and no other, and its word on that. Raises ReplyNotTrusted."""
        try:
            answer = SealedAnswer(
                statement=decode64(told.statement),
                signature=decode64(told.statement_signature),
                sealed=decode64(told.ciphertext),
                nonce=decode64(told.nonce),
                response_hash=decode64(told.response_hash),
                response_signature=decode64(told.signature),
            )
        except ValueError:
            raise reply_not_trusted("form") from None
        try:
            return answer, read_answer(answer, self._public_key, self._lock, self._digest)
        except Untrusted as error:
            raise reply_not_trusted(error.reason) from None

    def _opened(self, answer: SealedAnswer) -> bytes:
        try:
            return self._open(answer)
        except SealBroken:
            raise reply_not_trusted("seal") from None


def _seal(wanted: Wanted, scheme: str, lock: _LockReply, document: KeyDocument, node_key: bytes) -> SealedStep:
    envelope: dict[str, Any] = {
        "model_name": wanted.model,
        "stack_small_id": lock.stack_small_id,
        "node_dh_public_key": lock.public_key,
    }
    if scheme == HPKE_SCHEME:
        request_id = secrets.token_hex(16)
        lock_id, expires_ms = lock.stack_small_id, lock.expires_ms
        terms = hpke_scheme.Terms(document.node_id, wanted.model, request_id, lock_id, expires_ms, wanted.operation)
        ciphertext, replies = hpke_scheme.seal(wanted.body, node_key, terms)
        events = replies.events
        envelope |= {"scheme": scheme, "request_id": request_id, "expires_ms": lock.expires_ms}
        envelope["ciphertext"] = _text(ciphertext)
        digest = digest_of(scheme, ciphertext)
        opener: Open = lambda answer: replies.open(answer.sealed)  # noqa: E731
    else:
        envelope_parts, digest, opener = _seal_as_sdks(wanted.body, node_key, document.public_key)
        envelope |= envelope_parts
        events = None
    if wanted.stream:
        envelope["stream"] = True
    body = msgspec.json.encode(envelope)
    return SealedStep(
        wanted,
        body,
        document=document,
        lock=lock.stack_small_id,
        units=lock.max_num_tokens,
        digest=digest,
        opener=opener,
        events=events,
    )


def _seal_as_sdks(body: bytes, node_key: bytes, identity: bytes) -> tuple[dict[str, str], bytes, Open]:
    """Members of the envelope, the request's digest, and what opens the reply."""
    sealed, replies = sdk_scheme.seal(body, node_key)
    members = {
        "client_dh_public_key": _text(sealed.client_key),
        "salt": _text(sealed.salt),
        "nonce": _text(sealed.nonce),
        "ciphertext": _text(sealed.ciphertext),
        "plaintext_body_hash": _text(sealed.body_hash),
    }
    digest = digest_of(
        SDK_SCHEME,
        sealed.ciphertext,
        client_key=sealed.client_key,
        salt=sealed.salt,
        nonce=sealed.nonce,
        body_hash=sealed.body_hash,
    )

    def opened(answer: SealedAnswer) -> bytes:
        sdk_scheme.check_response(identity, answer.response_hash, answer.response_signature)
        return replies.open(answer.nonce, answer.sealed, answer.response_hash)

    return members, digest, opened


def _units(tokens_max: int) -> int:
    """How many tokens to lock: in steps, as the lengths of sealed requests are, or the lock would tell the length."""
    return min(hpke_scheme.padded_size(tokens_max), REQUEST_TOKENS_MAX)


def _text(raw: bytes) -> str:
    return b64encode(raw).decode("ascii")
