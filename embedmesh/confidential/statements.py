"""What a node says in the clear about a confidential request, signed by its identity: who carries it can check it."""

import hashlib
from typing import TypeVar

import msgspec

from embedmesh.confidential.failures import Untrusted
from embedmesh.rules.confidential import ANSWER, AnswerStatement, SealedAnswer, SealedCall
from embedmesh.signing.identity import Identity, node_id, verify

T = TypeVar("T", bound=msgspec.Struct)

SDK_NONCE_BYTES = (0, 12)  # of a reply: none in our scheme, and where nothing is sealed


def request_digest(call: SealedCall) -> bytes:
    """SHA-256 of everything that was sealed."""
    return digest_of(
        call.scheme,
        call.ciphertext,
        client_key=call.client_key,
        salt=call.salt,
        nonce=call.nonce,
        body_hash=call.body_hash,
    )


def digest_of(
    scheme: str,
    ciphertext: bytes,
    *,
    client_key: bytes = b"",
    salt: bytes = b"",
    nonce: bytes = b"",
    body_hash: bytes = b"",
) -> bytes:
    """As `request_digest`, from the parts; all but the ciphertext have a fixed length in each scheme."""
    digest = hashlib.sha256(scheme.encode("ascii") + b"\0" + client_key + salt + nonce + body_hash)
    digest.update(ciphertext)
    return digest.digest()


def reply_digest(sealed: bytes, nonce: bytes = b"") -> bytes:
    """SHA-256 of a sealed reply; the nonce is that of the SDK's scheme."""
    digest = hashlib.sha256(nonce)
    digest.update(sealed)
    return digest.digest()


def sign_answer(
    identity: Identity,
    lock: int,
    digest: bytes,
    sealed: bytes,
    status: int,
    tokens: int,
    time_ms: int,
    *,
    nonce: bytes = b"",
) -> tuple[bytes, bytes]:
    """The JSON of an AnswerStatement and its signature. `digest` is the request's."""
    statement = msgspec.json.encode(
        AnswerStatement(
            version=1,
            node_id=node_id(identity.public_key),
            lock=lock,
            request_digest=digest,
            reply_digest=reply_digest(sealed, nonce),
            status=200 if status == 200 else 400,
            tokens=tokens,
            time_ms=time_ms,
        )
    )
    return statement, identity.sign(ANSWER, statement)


def read_answer(answer: SealedAnswer, public_key: bytes, lock: int, digest: bytes) -> AnswerStatement:
    """The statement of the node of that identity about this lock and request. Raises Untrusted."""
    if not verify(public_key, ANSWER, answer.statement, answer.signature):
        raise Untrusted("signature")
    statement = read_strictly(answer.statement, AnswerStatement)
    if statement.node_id != node_id(public_key):
        raise Untrusted("node")
    if statement.lock != lock:
        raise Untrusted("lock")
    if statement.request_digest != digest:
        raise Untrusted("request")
    if len(answer.nonce) not in SDK_NONCE_BYTES or statement.reply_digest != reply_digest(answer.sealed, answer.nonce):
        raise Untrusted("reply")
    if statement.tokens if statement.status == 400 else not answer.sealed:
        raise Untrusted("count")
    return statement


def read_strictly(raw: bytes, kind: type[T]) -> T:
    """The struct, if this is the one JSON that we would write of it: no second reading. Raises Untrusted."""
    try:
        value = msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, ValueError):
        raise Untrusted("form") from None
    if msgspec.json.encode(value) != raw:
        raise Untrusted("form")
    return value
