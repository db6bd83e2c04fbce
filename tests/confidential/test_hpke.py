"""Our scheme is HPKE as others write it, and a change of one bit of anything breaks the seal."""

import hashlib
import hmac

import msgspec
import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey

from embedmesh.confidential.failures import SealBroken
from embedmesh.confidential.hpke_scheme import (
    PADDED_BYTES_MIN,
    REPLY_INFO,
    REQUEST_INFO,
    SUITE,
    HpkeOpened,
    HpkeReplies,
    Terms,
    open_sealed,
    pad,
    padded_size,
    seal,
    unpad,
)
from embedmesh.confidential.statements import digest_of, request_digest
from tests.confidential import rfc9180
from tests.confidential.calls import BODY, KEY, NODE_ID, OTHER_KEY, TERMS, hpke_call

# RFC 9180, appendix A.1.1: the base mode's set-up and its first encryption.
EPHEMERAL = bytes.fromhex("52c4a758a802cd8b936eceea314432798d5baf2d7e9235dc084ab1b9cfa2f736")
ENCAPSULATED = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
RECEIVER = bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
RECEIVER_PUBLIC = bytes.fromhex("3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d")
SHARED_SECRET = bytes.fromhex("fe0e18c9f024ce43799ae393c7e8fe8fce9d218875e8227b0187c04e7d2ea1fc")
INFO = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
AEAD_KEY = bytes.fromhex("4531685d41d65f03dc48f6b8302c05b0")
BASE_NONCE = bytes.fromhex("56d890e5accaaf011cff4b7d")
PLAINTEXT = bytes.fromhex("4265617574792069732074727574682c20747275746820626561757479")
FIRST = bytes.fromhex("f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a")
SECOND = bytes.fromhex("af2d7e9ac9ae7e270f46ba1f975be53c09f8d875bdc8535458c2494e8a6eab251c03d0c22a56b8ca42c2063b84")

ORACLE = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.AES128_GCM)
PRIVATE = X25519PrivateKey.from_private_bytes(bytes(range(3, 35)))  # of KEY

CALL, REPLIES = hpke_call()
OPENED = open_sealed(KEY, CALL.ciphertext, TERMS)
SEALED = OPENED.seal_reply(b'{"data":[]}')


def flipped(raw: bytes, bit: int) -> bytes:
    """The bytes with one bit changed; the number of the bit is taken modulo how many there are."""
    at, within = divmod(bit % (8 * len(raw)), 8)
    return raw[:at] + bytes([raw[at] ^ 1 << within]) + raw[at + 1 :]


bits = st.integers(0, 2**20)


# -- RFC 9180 ----------------------------------------------------------------------------------------------------------


def test_the_library_opens_the_first_message_of_the_rfc() -> None:
    """Its public form takes no associated data, as ours has none: the private one is the same code with some."""
    private = X25519PrivateKey.from_private_bytes(RECEIVER)
    assert private.public_key().public_bytes_raw() == RECEIVER_PUBLIC
    opened = openssl.hpke._decrypt_with_aad(SUITE, ENCAPSULATED + FIRST, private, INFO, b"Count-0")
    assert opened == PLAINTEXT


def test_our_own_reading_agrees_with_the_rfc() -> None:
    """It stands in for senders in other tests."""
    sender = X25519PrivateKey.from_private_bytes(EPHEMERAL)
    assert sender.public_key().public_bytes_raw() == ENCAPSULATED
    exchanged = sender.exchange(X25519PublicKey.from_public_bytes(RECEIVER_PUBLIC))
    shared = rfc9180.shared_secret(exchanged, ENCAPSULATED, RECEIVER_PUBLIC)
    assert shared == SHARED_SECRET
    assert rfc9180.key_and_nonce(shared, INFO) == (AEAD_KEY, BASE_NONCE)
    assert AESGCM(AEAD_KEY).encrypt(BASE_NONCE, PLAINTEXT, b"Count-0") == FIRST


def test_the_oracle_agrees_with_the_rfc() -> None:
    context = ORACLE.create_recipient_context(
        ENCAPSULATED, KEMKey.from_pyca_cryptography_key(X25519PrivateKey.from_private_bytes(RECEIVER)), INFO
    )
    assert context.open(FIRST, b"Count-0") == PLAINTEXT
    assert context.open(SECOND, b"Count-1") == PLAINTEXT


# -- a second implementation -------------------------------------------------------------------------------------------


@given(st.binary(max_size=2_000), st.text(max_size=20), st.integers(0, 10**15 - 1))
@settings(max_examples=40)
def test_another_implementation_opens_what_we_seal(body: bytes, name: str, number: int) -> None:
    """And finds what the scheme says: the reply secret, the length, the body, zeros."""
    terms = Terms(NODE_ID, name, "req_1", number, number)
    ciphertext, _ = seal(body, KEY.public, terms)
    info = REQUEST_INFO + msgspec.json.encode(terms)
    context = ORACLE.create_recipient_context(ciphertext[:32], KEMKey.from_pyca_cryptography_key(PRIVATE), info)
    plaintext = context.open(ciphertext[32:])
    assert plaintext[32:36] == len(body).to_bytes(4, "big")
    assert plaintext[36 : 36 + len(body)] == body
    assert plaintext[36 + len(body) :].strip(b"\0") == b""


@given(st.binary(max_size=2_000), st.binary(max_size=2_000))
@settings(max_examples=40)
def test_we_open_what_another_implementation_seals(body: bytes, answer: bytes) -> None:
    """And it opens our reply, by HKDF (RFC 5869) written out."""
    info = REQUEST_INFO + msgspec.json.encode(TERMS)
    encapsulated, context = ORACLE.create_sender_context(KEMKey.from_pyca_cryptography_key(PRIVATE.public_key()), info)
    secret = hashlib.sha256(body).digest()
    ciphertext = encapsulated + context.seal(secret + pad(body, 32))
    opened = open_sealed(KEY, ciphertext, TERMS)
    assert opened.body == body

    sealed = opened.seal_reply(answer)
    extracted = hmac.digest(sealed[:16] + hashlib.sha256(b"hpke-1\0" + ciphertext).digest(), secret, "sha256")
    derived = hmac.digest(extracted, REPLY_INFO + msgspec.json.encode(TERMS) + b"\x01", "sha256")
    plaintext = AESGCM(derived[:16]).decrypt(derived[16:28], sealed[16:], None)
    assert plaintext[4 : 4 + len(answer)] == answer


# -- refusals ----------------------------------------------------------------------------------------------------------


@given(bits)
def test_a_changed_bit_of_a_request_is_refused(bit: int) -> None:
    with pytest.raises(SealBroken):
        open_sealed(KEY, flipped(CALL.ciphertext, bit), TERMS)


@given(bits)
def test_a_changed_bit_of_a_reply_is_refused(bit: int) -> None:
    with pytest.raises(SealBroken):
        REPLIES.open(flipped(SEALED, bit))


OTHER_TERMS = [
    msgspec.structs.replace(TERMS, node_id="node_" + "0" * 32),
    msgspec.structs.replace(TERMS, model_name="n"),
    msgspec.structs.replace(TERMS, model_name="m "),
    msgspec.structs.replace(TERMS, model_name=""),
    msgspec.structs.replace(TERMS, request_id="req_2"),
    msgspec.structs.replace(TERMS, request_id=""),
    msgspec.structs.replace(TERMS, model_name="mreq_1", request_id=""),
    msgspec.structs.replace(TERMS, model_name='m","request_id":"req_1'),
    msgspec.structs.replace(TERMS, lock=42),
    msgspec.structs.replace(TERMS, expires_ms=TERMS.expires_ms + 1),
    msgspec.structs.replace(TERMS, lock=TERMS.expires_ms, expires_ms=TERMS.lock),
]


@pytest.mark.parametrize("terms", OTHER_TERMS)
def test_other_terms_are_refused_in_both_directions(terms: Terms) -> None:
    """A node that reads other terms cannot open the request, and the client cannot open what is sealed under them."""
    with pytest.raises(SealBroken):
        open_sealed(KEY, CALL.ciphertext, terms)
    secret, digest = bytes(32), bytes(32)
    sealed = HpkeOpened(secret, digest, terms, b"").seal_reply(b"reply")
    assert HpkeReplies(secret, digest, terms).open(sealed) == b"reply"
    with pytest.raises(SealBroken):
        HpkeReplies(secret, digest, TERMS).open(sealed)


@given(st.sampled_from(["model_name", "request_id"]), bits)
def test_a_changed_bit_of_the_terms_is_refused(member: str, bit: int) -> None:
    old = getattr(TERMS, member)
    new = flipped(old.encode(), bit).decode("latin-1")
    with pytest.raises(SealBroken):
        open_sealed(KEY, CALL.ciphertext, msgspec.structs.replace(TERMS, **{member: new}))


@given(st.sampled_from(["lock", "expires_ms"]), st.integers(0, 49))
def test_a_changed_bit_of_a_number_of_the_terms_is_refused(member: str, bit: int) -> None:
    with pytest.raises(SealBroken):
        changed = {member: getattr(TERMS, member) ^ 1 << bit}
        open_sealed(KEY, CALL.ciphertext, msgspec.structs.replace(TERMS, **changed))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 33, 47, 48, 84, len(CALL.ciphertext) - 1])
def test_a_cut_request_is_refused(size: int) -> None:
    with pytest.raises(SealBroken):
        open_sealed(KEY, CALL.ciphertext[:size], TERMS)
    with pytest.raises(SealBroken):
        open_sealed(KEY, CALL.ciphertext + bytes(len(CALL.ciphertext) - size), TERMS)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, len(SEALED) - 1])
def test_a_cut_reply_is_refused(size: int) -> None:
    with pytest.raises(SealBroken):
        REPLIES.open(SEALED[:size])
    with pytest.raises(SealBroken):
        REPLIES.open(SEALED + bytes(len(SEALED) - size))


def test_a_request_for_another_key_is_refused() -> None:
    with pytest.raises(SealBroken):
        open_sealed(OTHER_KEY, CALL.ciphertext, TERMS)


def test_a_reply_to_another_request_is_refused() -> None:
    """Also to the same body under the same terms, and the request itself as its reply, whole or in part."""
    other, others = hpke_call()
    with pytest.raises(SealBroken):
        others.open(SEALED)
    for reflected in (CALL.ciphertext, CALL.ciphertext[32:], CALL.ciphertext[:16] + CALL.ciphertext[32:]):
        with pytest.raises(SealBroken):
            REPLIES.open(reflected)
    with pytest.raises(SealBroken):
        open_sealed(KEY, SEALED, TERMS)
    assert request_digest(other) != request_digest(CALL)


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        bytes(31),
        bytes(35),
        bytes(36),  # not padded at all
        bytes(255),
        bytes(257),  # no bucket
        bytes(36) + bytes(219) + b"\x01",  # padding that is not zeros
        bytes(32) + (221).to_bytes(4, "big") + bytes(220),  # longer than there is
        bytes(32) + (2**32 - 1).to_bytes(4, "big") + bytes(220),
        bytes(512),  # the bucket of a longer body
    ],
)
def test_what_is_padded_in_another_way_is_refused(plaintext: bytes) -> None:
    ciphertext = SUITE.encrypt(plaintext, PRIVATE.public_key(), REQUEST_INFO + msgspec.json.encode(TERMS))
    with pytest.raises(SealBroken):
        open_sealed(KEY, ciphertext, TERMS)


def test_a_refusal_says_nothing_of_why() -> None:
    reasons = set()
    for ciphertext, terms in ((b"", TERMS), (flipped(CALL.ciphertext, 1), TERMS), (CALL.ciphertext, OTHER_TERMS[0])):
        with pytest.raises(SealBroken) as refused:
            open_sealed(KEY, ciphertext, terms)
        reasons.add((str(refused.value), refused.value.args, refused.value.__cause__))
    assert len(reasons) == 1


# -- what lengths say --------------------------------------------------------------------------------------------------


def test_buckets() -> None:
    """All short ones are alike; longer ones grow by at most a sixteenth, to few different sizes."""
    assert {padded_size(size) for size in range(257)} == {PADDED_BYTES_MIN}
    assert [padded_size(size) for size in (257, 272, 273, 511, 513, 1_000, 4_097, 65_537)] == [
        *(272, 272, 288, 512, 544, 1_024, 4_352, 67_584),
    ]
    sizes = [padded_size(size) for size in range(1, 100_000)]
    assert sizes == sorted(sizes)
    assert all(size <= padded <= max(256, size + size // 16 + 1) for size, padded in enumerate(sizes, 1))
    assert all(padded_size(padded) == padded for padded in set(sizes))
    assert len(set(sizes)) < 200


@given(st.integers(0, 3_000), st.integers(0, 3_000))
@settings(max_examples=60)
def test_lengths_show_the_bucket_and_nothing_else(one: int, other: int) -> None:
    """Of requests and replies."""
    requests = [seal(bytes(size), KEY.public, TERMS) for size in (one, other)]
    same = padded_size(36 + one) == padded_size(36 + other)
    assert (len(requests[0][0]) == len(requests[1][0])) == same
    replies = [OPENED.seal_reply(bytes(size)) for size in (one, other)]
    same = padded_size(4 + one) == padded_size(4 + other)
    assert (len(replies[0]) == len(replies[1])) == same


@given(st.binary(max_size=1_000), st.sampled_from([0, 32]))
def test_what_was_padded_is_found_again(body: bytes, before: int) -> None:
    assert unpad(bytes(before) + pad(body, before), before) == body


# -- what works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 219, 220, 221, 5_000, 4 * 1024 * 1024])
def test_a_request_and_its_reply_of_every_size(size: int) -> None:
    body = BODY[: size % len(BODY)] + bytes(size - size % len(BODY))
    ciphertext, replies = seal(body, KEY.public, TERMS)
    opened = open_sealed(KEY, ciphertext, TERMS)
    assert opened.body == body
    assert replies.open(opened.seal_reply(body)) == body


def test_two_seals_of_the_same_have_nothing_in_common() -> None:
    requests = [seal(BODY, KEY.public, TERMS)[0] for _ in range(20)]
    replies = [OPENED.seal_reply(b"reply") for _ in range(20)]
    for several, part in ((requests, slice(0, 32)), (requests, slice(-16, None)), (replies, slice(0, 16))):
        assert len({one[part] for one in several}) == 20
    assert all(REPLIES.open(reply) == b"reply" for reply in replies)


def test_the_terms_are_those_of_the_call() -> None:
    assert Terms.of(CALL, NODE_ID) == TERMS


def test_the_digest_is_of_the_scheme_and_the_ciphertext() -> None:
    assert request_digest(CALL) == hashlib.sha256(b"hpke-1\0" + CALL.ciphertext).digest()
    assert digest_of("hpke-1", CALL.ciphertext) == request_digest(CALL)
