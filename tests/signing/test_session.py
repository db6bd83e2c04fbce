"""Both sides arrive at the same two sessions, and only if they agree about everything that went before."""

import hashlib
import hmac
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from embedmesh.signing.identity import node_id
from embedmesh.signing.session import Ephemeral, Session, transcript

NODE_ID = node_id(bytes(32))
GATEWAY_KEY = bytes(range(32))


def agreed(node: bytes, gateway: bytes, nonce: bytes = b"nonce", of: str = NODE_ID, by: bytes = GATEWAY_KEY) -> bytes:
    """The transcript of one registration."""
    return transcript(node_public=node, gateway_public=gateway, node_id=of, gateway_public_key=by, nonce=nonce)


@pytest.mark.parametrize(
    "public",
    [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    ],
)
def test_a_key_that_decides_the_secret_alone_is_refused(public: str) -> None:
    """Points of low order give zeros with every key."""
    ours, theirs = Ephemeral(), bytes.fromhex(public)
    with pytest.raises(ValueError):
        ours.agree(theirs, agreed(ours.public, theirs))


def test_a_transcript_of_other_keys_is_refused() -> None:
    """Both halves must be the ones that are agreed on."""
    ours, theirs, third = Ephemeral(), Ephemeral(), Ephemeral()
    for said in (agreed(ours.public, third.public), agreed(third.public, theirs.public), b""):
        with pytest.raises(ValueError, match="these two keys"):
            ours.agree(theirs.public, said)


@pytest.mark.parametrize(
    "wrong",
    [
        {"node_public": bytes(31)},
        {"gateway_public": bytes(33)},
        {"gateway_public_key": b""},
        {"node_id": "node_"},
        {"node_id": "n\u00f6de_" + "0" * 32},
        {"nonce": bytes(65)},
    ],
)
def test_a_transcript_has_fixed_lengths(wrong: dict[str, object]) -> None:
    """So no two registrations have the same one."""
    right: dict[str, Any] = {
        "node_public": bytes(32),
        "gateway_public": bytes(32),
        "node_id": NODE_ID,
        "gateway_public_key": bytes(32),
        "nonce": b"",
    }
    transcript(**right)
    with pytest.raises(ValueError):
        transcript(**(right | wrong))


def test_both_sides_agree() -> None:
    """The same sessions on both sides; the gateway's and the node's have nothing in common."""
    node, gateway = Ephemeral(), Ephemeral()
    said = agreed(node.public, gateway.public)
    sessions = node.agree(gateway.public, said)
    assert gateway.agree(node.public, said) == sessions
    assert sessions.of_gateway.key != sessions.of_node.key
    assert sessions.of_gateway.key_id != sessions.of_node.key_id
    assert [(len(each.key_id), len(each.key)) for each in sessions] == [(16, 32)] * 2


def test_the_keys_are_by_hkdf() -> None:
    """As RFC 5869 says, written out: salt over the transcript, then two keys and two ids."""
    node, gateway = Ephemeral(), Ephemeral()
    said = agreed(node.public, gateway.public)
    shared = node._key.exchange(X25519PublicKey.from_public_bytes(gateway.public))
    extracted = hmac.digest(hashlib.sha256(said).digest(), shared, "sha256")
    blocks = [b""]
    for at in (1, 2, 3):
        blocks.append(hmac.digest(extracted, blocks[-1] + b"embedmesh session v1" + bytes([at]), "sha256"))
    assert gateway.agree(node.public, said) == (
        Session(blocks[3][:8].hex(), blocks[1]),
        Session(blocks[3][8:16].hex(), blocks[2]),
    )


def test_everything_that_was_said_decides_the_keys() -> None:
    """With another nonce, node, gateway or order of the halves there are other keys."""
    node, gateway = Ephemeral(), Ephemeral()
    said = [
        agreed(node.public, gateway.public),
        agreed(gateway.public, node.public),
        agreed(node.public, gateway.public, nonce=b"other"),
        agreed(node.public, gateway.public, of=node_id(b"other")),
        agreed(node.public, gateway.public, by=bytes(32)),
    ]
    assert len({node.agree(gateway.public, each).of_gateway.key for each in said}) == len(said)


def test_a_key_is_not_shown_by_accident() -> None:
    """A log of the object names it, no more."""
    assert repr(Session("0123456789abcdef", b"secret")) == "Session(key_id='0123456789abcdef')"
