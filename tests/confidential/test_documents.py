"""Keys of a node are believed where its identity has signed them, and where its operator vouches for them."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.confidential.attestation import ATTESTATION, KeyAttester, SignedStatement
from embedmesh.confidential.documents import read_keys, sign_keys
from embedmesh.confidential.failures import Untrusted
from embedmesh.rules.confidential import KEY_DOCUMENT, Evidence, SignedKeys
from embedmesh.signing.identity import node_id
from tests.confidential.calls import KEY, NODE, NODE_ID, OPERATOR, OTHER_KEY, OTHER_NODE
from tests.confidential.test_hpke import bits, flipped

SIGNED = sign_keys(
    NODE,
    {"m": "digest"},
    {"atoma-sdk-1": OTHER_KEY.public, "hpke-1": KEY.public},
    1_000,
    2_000,
    KeyAttester(OPERATOR),
)
EVIDENCE = SIGNED.evidence[0]
VERIFIER = SignedStatement(OPERATOR.public_key)


def rewritten(old: bytes, new: bytes) -> SignedKeys:
    """The node itself signs another document."""
    document = SIGNED.document.replace(old, new)
    assert document != SIGNED.document
    return SignedKeys(document, NODE.sign(KEY_DOCUMENT, document))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (SignedKeys(SIGNED.document, bytes(64)), "signature"),
        (SignedKeys(SIGNED.document, OTHER_NODE.sign(KEY_DOCUMENT, SIGNED.document)), "signature"),
        (SignedKeys(SIGNED.document, NODE.sign(b"confidential answer", SIGNED.document)), "signature"),
        (SignedKeys(SIGNED.document, NODE.sign_raw(SIGNED.document)), "signature"),
        (SignedKeys(b"", SIGNED.signature), "form"),
        (SignedKeys(b"{}", SIGNED.signature), "form"),
        (rewritten(b'"version":1', b'"version":2'), "form"),
        (rewritten(b'"version":1', b'"version":1,"more":1'), "form"),
        (rewritten(b'"version":1,', b'"version":1, '), "form"),
        (rewritten(b'"models":{', b'"models":{"m":"other",'), "form"),  # a member twice
        (rewritten(b'"hpke-1"', b'"hpke-2"'), "form"),
        (rewritten(b'"hpke-1"', b'"hpke-\\u0031"'), "form"),
        (rewritten(b'"not_before_ms":1000', b'"not_before_ms":1e3'), "form"),
        (rewritten(b'"not_before_ms":1000', b'"not_before_ms":-1'), "form"),
        (rewritten(b'"not_before_ms":1000', b'"not_before_ms":2000'), "validity"),
        (rewritten(b'"not_before_ms":1000', b'"not_before_ms":3000'), "validity"),
        (rewritten(NODE_ID.encode(), node_id(OTHER_NODE.public_key).encode()), "node"),
        (sign_keys(NODE, {}, {"hpke-1": bytes(32)}, 1, 2), "key"),
        (sign_keys(NODE, {}, {"hpke-1": KEY.public, "atoma-sdk-1": bytes(32)}, 1, 2), "key"),
        (sign_keys(NODE, {}, {"hpke-1": KEY.public[:31]}, 1, 2), "form"),
    ],
)
def test_a_document_that_is_not_what_the_node_signed_is_refused(bad: SignedKeys, reason: str) -> None:
    with pytest.raises(Untrusted) as refused:
        read_keys(bad)
    assert refused.value.reason == reason


@given(bits, st.sampled_from(["document", "signature"]))
def test_a_changed_bit_of_a_document_is_refused(bit: int, member: str) -> None:
    with pytest.raises(Untrusted):
        read_keys(msgspec.structs.replace(SIGNED, **{member: flipped(getattr(SIGNED, member), bit)}))


def test_a_document_is_read() -> None:
    """With what was signed, for whom, for how long; the evidence is another matter."""
    document = read_keys(SIGNED)
    assert document.node_id == NODE_ID
    assert document.public_key == NODE.public_key
    assert document.models == {"m": "digest"}
    assert document.keys == {"hpke-1": KEY.public, "atoma-sdk-1": OTHER_KEY.public}
    assert (document.not_before_ms, document.not_after_ms) == (1_000, 2_000)
    assert read_keys(msgspec.structs.replace(SIGNED, evidence=())) == document
    assert read_keys(msgspec.json.decode(msgspec.json.encode(SIGNED), type=SignedKeys)) == document


# -- evidence ----------------------------------------------------------------------------------------------------------


def statement(**members: object) -> Evidence:
    """The operator signs another statement."""
    said = {
        "version": 1,
        "document_digest": hashlib.sha256(SIGNED.document).digest(),
        "node_id": NODE_ID,
        "not_after_ms": 2_000,
    }
    raw = msgspec.json.encode(said | members)
    return Evidence("operator-statement", raw, OPERATOR.sign(ATTESTATION, raw))


OTHERS = sign_keys(NODE, {"m": "digest"}, {"hpke-1": OTHER_KEY.public}, 1_000, 2_000, KeyAttester(OPERATOR))
SPACED = EVIDENCE.statement + b" "


@pytest.mark.parametrize(
    "evidence",
    [
        (),
        (msgspec.structs.replace(EVIDENCE, kind="enclave-quote"),),
        (msgspec.structs.replace(EVIDENCE, signature=bytes(64)),),
        (msgspec.structs.replace(EVIDENCE, signature=b""),),
        (msgspec.structs.replace(EVIDENCE, signature=OTHER_NODE.sign(ATTESTATION, EVIDENCE.statement)),),
        (msgspec.structs.replace(EVIDENCE, signature=OPERATOR.sign(KEY_DOCUMENT, EVIDENCE.statement)),),
        (KeyAttester(NODE).attest(SIGNED.document),),  # the node vouches for itself
        OTHERS.evidence,  # for other keys of the same node
        (EVIDENCE, *OTHERS.evidence),  # one that is good does not make up for one that is not
        (Evidence(EVIDENCE.kind, SPACED, OPERATOR.sign(ATTESTATION, SPACED)),),
        (statement(version=2),),
        (statement(more=1),),
        (statement(document_digest=bytes(32)),),
        (statement(node_id=node_id(OTHER_NODE.public_key)),),
        (statement(not_after_ms=1_999),),  # ends before the keys do
    ],
)
def test_evidence_that_is_not_the_operators_word_is_refused(evidence: tuple[Evidence, ...]) -> None:
    with pytest.raises(Untrusted):
        VERIFIER.verify(msgspec.structs.replace(SIGNED, evidence=evidence), read_keys(SIGNED))


@given(bits, st.sampled_from(["statement", "signature"]))
def test_a_changed_bit_of_evidence_is_refused(bit: int, member: str) -> None:
    bad = msgspec.structs.replace(EVIDENCE, **{member: flipped(getattr(EVIDENCE, member), bit)})
    with pytest.raises(Untrusted):
        VERIFIER.verify(msgspec.structs.replace(SIGNED, evidence=(bad,)), read_keys(SIGNED))


def test_the_operators_word_is_believed() -> None:
    """Also for longer than the keys last, and beside evidence of a kind that this verifier does not know."""
    document = read_keys(SIGNED)
    VERIFIER.verify(SIGNED, document)
    for evidence in ((statement(not_after_ms=3_000),), (EVIDENCE, Evidence("enclave-quote", b"?", b""))):
        VERIFIER.verify(msgspec.structs.replace(SIGNED, evidence=evidence), document)


def test_another_operators_word_is_not() -> None:
    with pytest.raises(Untrusted):
        SignedStatement(NODE.public_key).verify(SIGNED, read_keys(SIGNED))
