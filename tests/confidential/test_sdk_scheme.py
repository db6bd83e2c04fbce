"""The SDK's scheme: what is sealed is opened, by `atoma-sdk` too; what comes back or was changed is refused."""

import base64
import hashlib
from types import SimpleNamespace

import pytest
from atoma_sdk import crypto_utils
from atoma_sdk.models.confidentialcomputeresponse import ConfidentialComputeResponse
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.confidential.failures import SealBroken
from embedmesh.confidential.sdk_scheme import check_response, open_sealed, plaintext_hash, seal
from embedmesh.confidential.statements import digest_of, request_digest
from tests.confidential.calls import BODY, KEY, NODE, OTHER_KEY, OTHER_NODE, changed, sdk_call
from tests.confidential.test_hpke import bits, flipped

CALL, REPLIES = sdk_call()
OPENED = open_sealed(KEY, CALL)
PARTS = OPENED.seal_reply(b"reply", NODE)
MEMBERS = ["ciphertext", "client_key", "node_key", "nonce", "salt", "body_hash"]


@given(st.sampled_from(MEMBERS), bits)
def test_a_changed_bit_of_a_request_is_refused(member: str, bit: int) -> None:
    with pytest.raises(SealBroken):
        open_sealed(KEY, changed(CALL, **{member: flipped(getattr(CALL, member), bit)}))


@pytest.mark.parametrize("bit", range(256))
def test_every_bit_of_the_client_key_counts(bit: int) -> None:
    """Also the highest one, which X25519 itself would ignore."""
    with pytest.raises(SealBroken):
        open_sealed(KEY, changed(CALL, client_key=flipped(CALL.client_key, bit)))


@given(st.sampled_from(["sealed", "nonce", "response_hash"]), bits)
def test_a_changed_bit_of_a_reply_is_refused(member: str, bit: int) -> None:
    bad = PARTS._replace(**{member: flipped(getattr(PARTS, member), bit)})
    with pytest.raises(SealBroken):
        REPLIES.open(bad.nonce, bad.sealed, bad.response_hash)


@given(st.sampled_from(["response_hash", "response_signature"]), bits)
def test_a_changed_bit_of_the_response_signature_is_refused(member: str, bit: int) -> None:
    bad = PARTS._replace(**{member: flipped(getattr(PARTS, member), bit)})
    with pytest.raises(SealBroken):
        check_response(NODE.public_key, bad.response_hash, bad.response_signature)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_wrong_length_is_refused(member: str) -> None:
    raw = getattr(CALL, member)
    for bad in (b"", raw[:-1], raw[1:], raw + b"\0", b"\0" + raw, raw + raw):
        with pytest.raises(SealBroken):
            open_sealed(KEY, changed(CALL, **{member: bad}))


@pytest.mark.parametrize("member", ["sealed", "nonce", "response_hash"])
def test_a_wrong_length_of_a_reply_is_refused(member: str) -> None:
    raw = getattr(PARTS, member)
    for wrong in (b"", raw[:-1], raw[1:], raw + b"\0", raw[:7], raw + raw):
        bad = PARTS._replace(**{member: wrong})
        with pytest.raises(SealBroken):
            REPLIES.open(bad.nonce, bad.sealed, bad.response_hash)
    for wrong in (b"", PARTS.response_signature[1:], PARTS.response_signature + b"\0", bytes(97)):
        with pytest.raises(SealBroken):
            check_response(NODE.public_key, PARTS.response_hash, wrong)


def test_a_signature_of_another_node_is_refused() -> None:
    other = OPENED.seal_reply(b"reply", OTHER_NODE)
    with pytest.raises(SealBroken):
        check_response(NODE.public_key, other.response_hash, other.response_signature)
    check_response(OTHER_NODE.public_key, other.response_hash, other.response_signature)


def test_a_request_for_another_key_or_scheme_is_refused() -> None:
    with pytest.raises(SealBroken):
        open_sealed(OTHER_KEY, CALL)
    with pytest.raises(SealBroken):
        open_sealed(OTHER_KEY, changed(CALL, node_key=OTHER_KEY.public))
    with pytest.raises(SealBroken):
        open_sealed(KEY, changed(CALL, scheme="hpke-1"))


def test_what_was_sealed_by_oneself_is_no_message_of_the_other() -> None:
    """The client's request comes back as its reply, the node's reply as a request: key, tag and hash are all good."""
    with pytest.raises(SealBroken):
        REPLIES.open(CALL.nonce, CALL.ciphertext, CALL.body_hash)
    reflected = changed(CALL, nonce=PARTS.nonce, ciphertext=PARTS.sealed, body_hash=PARTS.response_hash)
    with pytest.raises(SealBroken):
        open_sealed(KEY, reflected)


def test_a_reply_to_another_request_is_refused() -> None:
    _, others = sdk_call()
    with pytest.raises(SealBroken):
        others.open(PARTS.nonce, PARTS.sealed, PARTS.response_hash)


def test_two_seals_of_the_same_have_nothing_in_common() -> None:
    several = [seal(BODY, KEY.public)[0] for _ in range(20)]
    for member in ("client_key", "salt", "nonce", "ciphertext"):
        assert len({getattr(sealed, member) for sealed in several}) == 20
    assert {sealed.body_hash for sealed in several} == {plaintext_hash(BODY)}  # what the scheme gives away


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_what_is_sealed_is_opened(body: bytes, reply: bytes) -> None:
    call, replies = sdk_call(body)
    opened = open_sealed(KEY, call)
    assert opened.plaintext == body
    parts = opened.seal_reply(reply, NODE)
    assert replies.open(parts.nonce, parts.sealed, parts.response_hash) == reply
    check_response(NODE.public_key, parts.response_hash, parts.response_signature)


def test_the_digest_is_of_all_that_was_sealed() -> None:
    parts = CALL.client_key + CALL.salt + CALL.nonce + CALL.body_hash + CALL.ciphertext
    assert request_digest(CALL) == hashlib.sha256(b"atoma-sdk-1\0" + parts).digest()
    assert request_digest(CALL) == digest_of(
        "atoma-sdk-1",
        CALL.ciphertext,
        client_key=CALL.client_key,
        salt=CALL.salt,
        nonce=CALL.nonce,
        body_hash=CALL.body_hash,
    )


def test_the_published_sdk_and_we_understand_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It seals and we open, we answer and it opens: its own functions, without its network."""
    lock = SimpleNamespace(public_key=base64.b64encode(KEY.public).decode(), stack_small_id=41)
    monkeypatch.setattr(crypto_utils, "Nodes", lambda _: SimpleNamespace(nodes_create_lock=lambda model: lock))
    private = X25519PrivateKey.generate()
    body = SimpleNamespace(model_dump_json=lambda: BODY.decode())
    sdk = SimpleNamespace(sdk_configuration=None)
    _, salt, sent = crypto_utils.encrypt_message(sdk, private, body, "m")  # type: ignore[arg-type]
    call = changed(
        CALL,
        ciphertext=base64.b64decode(sent.ciphertext),
        client_key=base64.b64decode(sent.client_dh_public_key),
        salt=base64.b64decode(sent.salt),
        nonce=base64.b64decode(sent.nonce),
        body_hash=base64.b64decode(sent.plaintext_body_hash),
    )
    opened = open_sealed(KEY, call)
    assert opened.plaintext == BODY

    parts = opened.seal_reply(b'{"data":[]}', NODE)
    reply = ConfidentialComputeResponse(
        ciphertext=base64.b64encode(parts.sealed).decode(),
        nonce=base64.b64encode(parts.nonce).decode(),
        response_hash=base64.b64encode(parts.response_hash).decode(),
    )
    node = X25519PublicKey.from_public_bytes(KEY.public)
    assert crypto_utils.decrypt_message(private, node, salt, reply) == b'{"data":[]}'
