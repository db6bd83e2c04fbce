"""A node's statement about an answer is good for that lock, request and reply, and for no other."""

import msgspec
import pytest

from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.failures import Untrusted
from embedmesh.confidential.statements import read_answer, request_digest, sign_answer
from embedmesh.rules.confidential import ANSWER, SealedAnswer
from tests.confidential.calls import KEY, LOCK, NODE, OTHER_NODE, TERMS, hpke_call, sdk_call

CALL, REPLIES = hpke_call()
DIGEST = request_digest(CALL)
SEALED = hpke_scheme.open_sealed(KEY, CALL.ciphertext, TERMS).seal_reply(b"reply")


def answer(sealed: bytes = SEALED, status: int = 200, tokens: int = 4) -> SealedAnswer:
    statement, signature = sign_answer(NODE, LOCK, DIGEST, sealed, status, tokens, 1)
    return SealedAnswer(statement, signature, sealed)


GOOD = answer()


def rewritten(old: bytes, new: bytes) -> SealedAnswer:
    """The node itself signs another statement."""
    statement = GOOD.statement.replace(old, new)
    assert statement != GOOD.statement
    return SealedAnswer(statement, NODE.sign(ANSWER, statement), SEALED)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (msgspec.structs.replace(GOOD, signature=bytes(64)), "signature"),
        (msgspec.structs.replace(GOOD, signature=OTHER_NODE.sign(ANSWER, GOOD.statement)), "signature"),
        (msgspec.structs.replace(GOOD, signature=NODE.sign(b"receipts", GOOD.statement)), "signature"),
        (msgspec.structs.replace(GOOD, signature=NODE.sign_raw(GOOD.statement)), "signature"),
        (msgspec.structs.replace(GOOD, statement=GOOD.statement + b" "), "signature"),
        (rewritten(b'"tokens":4', b'"tokens": 4'), "form"),
        (rewritten(b'"tokens":4', b'"tokens":3,"tokens":4'), "form"),
        (rewritten(b'"tokens":4', b'"tokens":4,"more":4'), "form"),
        (rewritten(b'"tokens":4', b'"tokens":-4'), "form"),
        (rewritten(b'"status":200', b'"status":201'), "form"),
        (rewritten(b'"version":1', b'"version":2'), "form"),
        (rewritten(b'"node_id":"node_', b'"node_id":"NODE_'), "node"),
        (rewritten(b'"lock":41', b'"lock":42'), "lock"),
        (msgspec.structs.replace(GOOD, sealed=SEALED[:-1]), "reply"),
        (msgspec.structs.replace(GOOD, sealed=b""), "reply"),
        (msgspec.structs.replace(GOOD, sealed=SEALED[1:], nonce=SEALED[:1]), "reply"),
        (answer(b"", 200), "count"),
        (answer(SEALED, 400, 1), "count"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(bad: SealedAnswer, reason: str) -> None:
    with pytest.raises(Untrusted) as refused:
        read_answer(bad, NODE.public_key, LOCK, DIGEST)
    assert refused.value.reason == reason


def test_an_answer_to_another_request_is_refused() -> None:
    other, _ = hpke_call()
    with pytest.raises(Untrusted, match="request"):
        read_answer(GOOD, NODE.public_key, LOCK, request_digest(other))
    with pytest.raises(Untrusted, match="lock"):
        read_answer(GOOD, NODE.public_key, LOCK + 1, DIGEST)
    with pytest.raises(Untrusted, match="signature"):
        read_answer(GOOD, OTHER_NODE.public_key, LOCK, DIGEST)


def test_an_answer_in_each_scheme_is_good() -> None:
    assert read_answer(GOOD, NODE.public_key, LOCK, DIGEST).tokens == 4
    assert REPLIES.open(GOOD.sealed) == b"reply"
    refused = answer(b"", 400, 0)
    assert read_answer(refused, NODE.public_key, LOCK, DIGEST).status == 400

    call, replies = sdk_call()
    parts = sdk_scheme.open_sealed(KEY, call).seal_reply(b"reply", NODE)
    digest = request_digest(call)
    statement, signature = sign_answer(NODE, LOCK, digest, parts.sealed, 200, 2, 1, nonce=parts.nonce)
    signed = SealedAnswer(statement, signature, *parts)
    assert read_answer(signed, NODE.public_key, LOCK, digest).tokens == 2
    assert replies.open(parts.nonce, parts.sealed, parts.response_hash) == b"reply"
