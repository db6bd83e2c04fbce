"""The SDK's scheme, byte for byte: what the published SDK has sealed with known randomness, and what it opens."""

import base64
import functools
import json
from typing import Any

import pytest

from embedmesh.confidential import sdk_scheme
from embedmesh.confidential.failures import SealBroken
from embedmesh.confidential.node_keys import DhKey
from embedmesh.confidential.sdk_scheme import plaintext_hash
from embedmesh.rules.base64s import decode64
from embedmesh.rules.confidential import SealedCall
from embedmesh.signing.identity import Identity
from tests.data import find_outside_data, outside_data

FILE = "atoma_confidential_vectors.json"
PREFIX = bytes.fromhex("a0a1a2a3")  # of the nonces of the file's replies


@functools.cache
def vectors() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(outside_data(FILE).read_text(encoding="utf-8"))
    return found


def names(section: str) -> list[str]:
    """What there is, for one test each; where the file is absent, one test says so."""
    if find_outside_data(FILE) is None:
        return ["absent"]
    return [entry["name"] for entry in vectors()[section]]


def entry(section: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in vectors()[section] if one["name"] == name)
    return found


def node_key() -> DhKey:
    return DhKey(bytes.fromhex(vectors()["keys"]["node_private_hex"]), PREFIX)


def identity() -> Identity:
    return Identity(bytes.fromhex(vectors()["node_registration"]["ed25519_seed_hex"]))


def read(envelope: dict[str, Any]) -> SealedCall:
    """The envelope as the gateway passes it on. Raises ValueError for base64 in another form."""
    return SealedCall(
        scheme="atoma-sdk-1",
        model=envelope["model_name"],
        model_name=envelope["model_name"],
        lock=envelope["stack_small_id"],
        units=8_192,
        node_key=decode64(envelope["node_dh_public_key"], 32),
        ciphertext=decode64(envelope["ciphertext"]),
        client_key=decode64(envelope["client_dh_public_key"], 32),
        salt=decode64(envelope["salt"], 16),
        nonce=decode64(envelope["nonce"], 12),
        body_hash=decode64(envelope["plaintext_body_hash"], 32),
    )


def read_loosely(envelope: dict[str, Any]) -> SealedCall:
    """As `read`, by a gateway that checks no lengths."""
    return SealedCall(
        scheme="atoma-sdk-1",
        model="m",
        model_name="m",
        lock=41,
        units=8_192,
        node_key=base64.b64decode(envelope["node_dh_public_key"]),
        ciphertext=base64.b64decode(envelope["ciphertext"]),
        client_key=base64.b64decode(envelope["client_dh_public_key"]),
        salt=base64.b64decode(envelope["salt"] + "=="),
        nonce=base64.b64decode(envelope["nonce"]),
        body_hash=base64.b64decode(envelope["plaintext_body_hash"]),
    )


def seal_again(case: dict[str, Any]) -> tuple[sdk_scheme.SdkSealed, sdk_scheme.SdkReplies]:
    envelope = case["request_envelope"]
    return sdk_scheme.seal(
        case["request_plaintext"].encode(),
        decode64(vectors()["keys"]["node_public_base64"]),
        private=bytes.fromhex(vectors()["keys"]["client_private_hex"]),
        salt=decode64(envelope["salt"]),
        nonce=decode64(envelope["nonce"]),
    )


def replies(case: dict[str, Any]) -> list[dict[str, Any]]:
    return case["reply_chunks"] if "reply_chunks" in case else [case["reply"]]


def test_keys_and_hashes() -> None:
    keys = vectors()["keys"]
    client = DhKey(bytes.fromhex(keys["client_private_hex"]), PREFIX)
    assert base64.b64encode(client.public).decode() == keys["client_public_base64"]
    assert base64.b64encode(node_key().public).decode() == keys["node_public_base64"]
    assert client.exchange(node_key().public).hex() == keys["shared_secret_hex"]
    assert node_key().exchange(client.public).hex() == keys["shared_secret_hex"]
    for one in vectors()["hashes"]:
        assert base64.b64encode(plaintext_hash(one["text"].encode())).decode() == one["blake2b_256_base64"]


@pytest.mark.parametrize("name", names("cases"))
def test_a_request_is_sealed_as_the_sdk_seals_it(name: str) -> None:
    """The same plaintext, keys, salt and nonce give the same envelope."""
    case = entry("cases", name)
    sealed, _ = seal_again(case)
    written = {
        "ciphertext": sealed.ciphertext,
        "client_dh_public_key": sealed.client_key,
        "node_dh_public_key": sealed.node_key,
        "nonce": sealed.nonce,
        "plaintext_body_hash": sealed.body_hash,
        "salt": sealed.salt,
    }
    for member, raw in written.items():
        assert base64.b64encode(raw).decode() == case["request_envelope"][member]


@pytest.mark.parametrize("name", names("cases"))
def test_a_request_of_the_sdk_is_opened_and_answered(name: str) -> None:
    """The node finds the plaintext, and seals each reply with the same bytes, hash and signature."""
    case = entry("cases", name)
    key, node = node_key(), identity()
    opened = sdk_scheme.open_sealed(key, read(case["request_envelope"]))
    assert opened.plaintext == case["request_plaintext"].encode()
    for reply in replies(case):
        envelope = reply["envelope"]
        wanted = decode64(envelope["nonce"])
        while True:  # the file's replies are not all of this case
            parts = opened.seal_reply(reply["plaintext"].encode(), node)
            if parts.nonce == wanted:
                break
            assert parts.nonce < wanted
        assert base64.b64encode(parts.sealed).decode() == envelope["ciphertext"]
        assert base64.b64encode(parts.response_hash).decode() == envelope["response_hash"]
        assert base64.b64encode(parts.response_signature).decode() == envelope["signature"]


@pytest.mark.parametrize("name", names("cases"))
def test_a_reply_is_opened(name: str) -> None:
    """The client finds the plaintext and the node's signature."""
    case = entry("cases", name)
    _, client = seal_again(case)
    for reply in replies(case):
        envelope = {member: decode64(text) for member, text in reply["envelope"].items() if member != "usage"}
        found = client.open(envelope["nonce"], envelope["ciphertext"], envelope["response_hash"])
        assert found == reply["plaintext"].encode()
        sdk_scheme.check_response(identity().public_key, envelope["response_hash"], envelope["signature"])


def test_the_response_signature_is_over_the_hash_alone() -> None:
    said = vectors()["response_signature"]
    digest = plaintext_hash(said["plaintext_with_members_cut"].encode())
    assert base64.b64encode(digest).decode() == said["response_hash"]
    sdk_scheme.check_response(identity().public_key, digest, decode64(said["signature"], 97))


@pytest.mark.parametrize("name", names("refuse"))
def test_an_envelope_to_refuse_is_refused(name: str) -> None:
    """By its form where that is wrong, and by the node even where the gateway would let every form pass."""
    change = entry("refuse", name)["change"]
    envelope = vectors()["cases"][0]["request_envelope"] | change
    with pytest.raises((ValueError, SealBroken)):
        sdk_scheme.open_sealed(node_key(), read(envelope))
    if name not in ("url-safe base64", "no padding"):  # of those two nothing but the form is wrong
        with pytest.raises(SealBroken):
            sdk_scheme.open_sealed(node_key(), read_loosely(envelope))
