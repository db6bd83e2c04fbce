"""Keys of a node are believed where its identity has signed them, and where its operator vouches for them."""

from embedmesh.confidential.attestation import KeyAttester, SignedStatement
from embedmesh.confidential.documents import read_keys, sign_keys
from tests.confidential.calls import KEY, NODE, NODE_ID, OPERATOR

SIGNED = sign_keys(NODE, {"m": "digest"}, {"hpke-1": KEY.public}, 1_000, 2_000, KeyAttester(OPERATOR))


def test_a_document_is_read() -> None:
    document = read_keys(SIGNED)
    assert document.node_id == NODE_ID
    assert document.keys == {"hpke-1": KEY.public}
    SignedStatement(OPERATOR.public_key).verify(SIGNED, document)
