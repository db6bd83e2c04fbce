"""A node's private key stays where it is, meets real public keys only, and never gives a nonce twice."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.documents import read_keys, sign_keys
from embedmesh.confidential.failures import SealBroken, Untrusted
from embedmesh.confidential.hpke_scheme import REQUEST_INFO
from embedmesh.confidential.node_keys import FIELD, LOW_ORDER, DhKey
from tests.confidential import rfc9180
from tests.confidential.calls import KEY, NODE, TERMS, changed, hpke_call, sdk_call

OTHER_FORMS = (FIELD, FIELD + 1)  # of 0 and 1
TOP_BIT = 2**255
LOW_POINTS = [
    (number + top).to_bytes(32, "little") for number in (*sorted(LOW_ORDER), *OTHER_FORMS) for top in (0, TOP_BIT)
]
NO_KEYS = [b"", bytes(31), KEY.public[:31], KEY.public + b"\0", bytes(33)]
SECOND_FORMS = [(2**255 - 1).to_bytes(32, "little"), KEY.public[:31] + bytes([KEY.public[31] | 0x80])]


@pytest.mark.parametrize("number", sorted(LOW_ORDER))
def test_the_points_are_of_low_order(number: int) -> None:
    """The library itself finds the secret of zeros that makes them bad."""
    with pytest.raises(ValueError, match="shared key"):
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(number.to_bytes(32, "little")))


@pytest.mark.parametrize("bad", [*LOW_POINTS, *NO_KEYS, *SECOND_FORMS], ids=bytes.hex)
def test_what_is_no_key_is_refused_by_both_sides(bad: bytes) -> None:
    """Low order, a wrong length, or a second form of a good key: by the client before it sends, and by the node."""
    with pytest.raises(ValueError, match=r"X25519|shared key"):
        KEY.exchange(bad)
    with pytest.raises(ValueError, match=r"X25519|shared key"):
        sdk_scheme.seal(b"body", bad)
    with pytest.raises(ValueError, match=r"X25519|shared key"):
        hpke_scheme.seal(b"body", bad, TERMS)
    with pytest.raises(SealBroken):
        sdk_scheme.open_sealed(KEY, changed(sdk_call()[0], client_key=bad))
    with pytest.raises(SealBroken):
        hpke_scheme.open_sealed(KEY, bad + hpke_call()[0].ciphertext[32:], TERMS)
    with pytest.raises(Untrusted):
        read_keys(sign_keys(NODE, {}, {"hpke-1": bad}, 1, 2))


@pytest.mark.parametrize("bad", LOW_POINTS, ids=bytes.hex)
def test_a_request_under_the_secret_of_zeros_is_refused(bad: bytes) -> None:
    """An attacker knows that secret, and can seal under it: it is refused for the point, not for a bad tag."""
    info = (
        REQUEST_INFO
        + b'{"node_id":"'
        + TERMS.node_id.encode()
        + (b'","model_name":"m","request_id":"req_1","lock":41,"expires_ms":1800000000000}')
    )
    plaintext = bytes(32) + hpke_scheme.pad(b"body", 32)
    good = DhKey.new()
    control = rfc9180.encrypt(good.exchange(KEY.public), good.public, KEY.public, info, plaintext)
    assert hpke_scheme.open_sealed(KEY, control, TERMS).body == b"body"
    with pytest.raises(SealBroken):
        hpke_scheme.open_sealed(KEY, rfc9180.encrypt(bytes(32), bad, KEY.public, info, plaintext), TERMS)


def test_a_key_is_not_copied_or_shown() -> None:
    key = DhKey.new()
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied"):
            take(key)
    assert "object at 0x" in repr(key)
    assert not hasattr(key, "__dict__")


def test_new_keys_differ() -> None:
    keys = [DhKey.new() for _ in range(100)]
    assert len({key.public for key in keys}) == 100
    assert len({key.reply_nonce()[:4] for key in keys}) > 90


def test_no_nonce_is_given_twice() -> None:
    """Whatever is sealed under a key, by whichever thread, and however often one request is opened again."""
    key = DhKey.new()
    call = changed(sdk_call()[0])
    sealed, _ = sdk_scheme.seal(b"body", key.public)
    call = changed(
        call,
        node_key=key.public,
        client_key=sealed.client_key,
        salt=sealed.salt,
        nonce=sealed.nonce,
        ciphertext=sealed.ciphertext,
        body_hash=sealed.body_hash,
    )

    def answer(_: int) -> list[bytes]:
        opened = sdk_scheme.open_sealed(key, call)
        return [opened.seal_reply(b"reply", NODE).nonce for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        nonces = [nonce for some in pool.map(answer, range(250)) for nonce in some]
    assert len(nonces) == len(set(nonces)) == 5_000
    assert {len(nonce) for nonce in nonces} == {12}
    assert len({nonce[:4] for nonce in nonces}) == 1
