"""Confidential requests: what client, gateway and node say about them. `embedmesh.confidential` seals them.

A caller locks a node (`LockTerms`): money is set aside, and one node under one of its keys is named. The caller seals
its request for that key, the gateway carries it (`SealedCall`), the node answers with what only the caller can read and
a statement that everybody can (`SealedAnswer`).
"""

from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from embedmesh.rules.holds import Hold, HoldState, PriorRequest
from embedmesh.rules.membership import Digest, Key, Signature, Whole
from embedmesh.rules.models import Model

SDK_SCHEME: Final = (
    "atoma-sdk-1"  # of the published SDKs: X25519, HKDF-SHA256, AES-256-GCM; the gateway's word is trusted
)
HPKE_SCHEME: Final = "hpke-1"  # RFC 9180: X25519, HKDF-SHA256, AES-128-GCM; everything is bound to the node's identity
Scheme = Literal["atoma-sdk-1", "hpke-1"]

KEY_DOCUMENT = b"confidential keys"  # what a node's identity signs a KeyDocument for,
ANSWER = b"confidential answer"  # and an AnswerStatement
LOCK_ID_MAX = 10**15 - 1  # exact wherever JSON is read
NODES_LOCKED_MAX = 64  # that a lock may be asked for by name
UNUSED = bytes(32)  # the body hash of the claim of a lock that no request has used yet

Blob = Annotated[bytes, Meta(max_length=8 * 1024 * 1024)]


def claim_key(lock_id: int) -> str:
    """What stands for an `Idempotency-Key` in the claim of a lock. No header can hold it."""
    return f"\0lock:{lock_id}"


class KeyDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of a node under which it takes confidential requests, one for each scheme, and for which models.

    `public_key` is the node's identity (Ed25519); `models` maps ids to digests of weights. Times in Unix milliseconds.
    """

    version: Literal[1]
    node_id: str
    public_key: Key
    models: Annotated[dict[str, str], Meta(max_length=64)]
    keys: dict[Scheme, Key]
    not_before_ms: Whole
    not_after_ms: Whole


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody else says of a node's keys; `kind` names its form."""

    kind: Annotated[str, Meta(max_length=64)]
    statement: Annotated[bytes, Meta(max_length=16_384)]
    signature: Annotated[bytes, Meta(max_length=1_024)]


class SignedKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`document` is the JSON of a KeyDocument, byte for byte what the node's identity has signed."""

    document: Annotated[bytes, Meta(max_length=16_384)]
    signature: Signature
    evidence: Annotated[tuple[Evidence, ...], Meta(max_length=4)] = ()


class SealedCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/confidential/embeddings` of a node, in MessagePack: what the gateway forwards.

    `model` is the catalogue's id, `model_name` what the caller wrote; the sealed request must name the same. `units`
    are the tokens of the lock. `node_key` says for which of the node's keys it was sealed. Of HPKE, `ciphertext` begins
    with the encapsulated key, and `request_id` and `expires_ms` are the caller's own words, bound by the seal. The four
    members behind them are those of the SDK's scheme.
    """

    scheme: Scheme
    model: str
    model_name: Annotated[str, Meta(max_length=200)]
    lock: Whole
    units: Whole
    node_key: Key
    ciphertext: Blob
    request_id: Annotated[str, Meta(max_length=64)] = ""
    expires_ms: Whole = 0
    client_key: Annotated[bytes, Meta(max_length=32)] = b""
    salt: Annotated[bytes, Meta(max_length=16)] = b""
    nonce: Annotated[bytes, Meta(max_length=12)] = b""
    body_hash: Annotated[bytes, Meta(max_length=32)] = b""


class AnswerStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node stands by. `status` 200: it embedded `tokens`. 400: it refused, and `tokens` is 0.

    `request_digest` is of the sealed request, `reply_digest` SHA-256 of the sealed reply (of nothing: of b"").
    """

    version: Literal[1]
    node_id: str
    lock: Whole
    request_digest: Digest
    reply_digest: Digest
    status: Literal[200, 400]
    tokens: Whole
    time_ms: Whole


class SealedAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node's answer. `statement` is the JSON of an AnswerStatement, signed by the node's identity.

    `sealed` is for the caller: the reply, or why the request was refused; empty where the seal could not be opened, and
    then nothing says why. The last three members are those of the SDK's scheme.
    """

    statement: Annotated[bytes, Meta(max_length=4_096)]
    signature: Signature
    sealed: Annotated[bytes, Meta(max_length=256 * 1024 * 1024)] = b""
    nonce: Annotated[bytes, Meta(max_length=12)] = b""
    response_hash: Annotated[bytes, Meta(max_length=32)] = b""
    response_signature: Annotated[bytes, Meta(max_length=97)] = b""


class CheckedAnswer(msgspec.Struct, frozen=True):
    """A node's answer whose statement fits the call, and is signed by the node."""

    answer: SealedAnswer
    statement: AnswerStatement


class SealingNode(msgspec.Struct, frozen=True):
    """A node that can take a confidential request, and its verified keys. `ask`: nano-USD per million tokens."""

    node_id: str  # as this gateway names it
    small_id: int
    signed: SignedKeys
    document: KeyDocument
    ask: int = 0


class LockTerms(msgspec.Struct, frozen=True):
    """One node, one key and an amount of money, for one request of one account until `expires_ms` (Unix time).

    `node_id` as the gateways name it; `identity` is that of the node that signed the key document. `units` are tokens.
    """

    lock_id: int
    account_id: str
    key_id: str
    hold_id: str
    node_id: str
    identity: bytes
    node_key: bytes
    scheme: Scheme
    model: str
    units: int
    price: int  # nano-USD per million tokens, as it was when the money was set aside
    expires_ms: int


class LockState(NamedTuple):
    """What became of a lock. The last two are of the request that has used it; without a claim it was long ago."""

    used_ms: int | None
    state: str  # of its hold
    body_hash: bytes | None
    reply: bytes | None


class FoundLock(NamedTuple):
    """A lock of an account as it was when it was looked for, and how many bytes of the account's replies are kept."""

    terms: LockTerms
    use: LockState
    kept_bytes: int

    def is_free(self, now_ms: int) -> bool:
        """Whether a request may use it, as far as is known."""
        unused = self.use.used_ms is None and self.use.state == HoldState.OPEN.value
        return unused and self.terms.expires_ms > now_ms


class Locks(Protocol):
    """Locks in the store: any gateway can redeem them."""

    async def open(self, terms: LockTerms, hold: Hold) -> None:
        """Set the hold's money aside and remember the lock. Raises as `Ledger.hold` does, or RateLimited.

        At one time a key may have LOCKS_OF_KEY_MAX open, an account LOCKS_OF_ACCOUNT_MAX.
        """
        ...

    def drop(self, terms: LockTerms) -> None:
        """A lock was opened of which nobody has heard: it was never there. For an unused one."""
        ...

    async def find(self, account_id: str, lock_id: int) -> FoundLock:
        """The lock of this account, whatever became of it. Raises LockNotFound or StoreUnavailable."""
        ...

    async def redeem(self, found: FoundLock, body_hash: bytes, deadline_ms: int) -> Hold | PriorRequest:
        """Use the lock, once: its hold is this gateway's from now on, and lasts until `deadline_ms`.

        Where the same request has used it before, that one is returned. Raises LockUsed, LockExpired, StoreUnavailable.
        """
        ...


class SealingFleet(Protocol):
    """The nodes that take confidential requests."""

    def choose_sealing(self, model: Model, scheme: Scheme, among: frozenset[str] | None = None) -> SealingNode | None:
        """The node that would be done first, of those whose keys for the scheme last long enough; None without.

        `among` are the ids of nodes, as their identities give them, that the caller would seal for.
        """
        ...
