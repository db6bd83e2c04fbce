"""What is sealed is opened again by the same secret, for the same purpose and owner, and by nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.storage.secrets.sealed import NONCE_BYTES, Seal
from tests.storage.shop import SECRET

SEAL = Seal(SECRET)
PLAIN = b"a session key"
SEALED = SEAL.close(PLAIN, what="node", whose="node_1")
TAG_BYTES = 16


@pytest.mark.parametrize(
    ("seal", "what", "whose"),
    [
        (Seal(bytes(32)), "node", "node_1"),
        (SEAL, "invite", "node_1"),
        (SEAL, "node", "node_2"),
        (SEAL, "node", ""),
        (SEAL, "", "node_1"),
        (SEAL, "nod", "enode_1"),
        (SEAL, "node\0node_1", ""),
    ],
)
def test_another_secret_purpose_or_owner_opens_nothing(seal: Seal, what: str, whose: str) -> None:
    """One row's secret is worth nothing in another."""
    with pytest.raises(ValueError, match="something else, or was changed"):
        seal.open(SEALED, what=what, whose=whose)


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
@settings(max_examples=40)
def test_what_was_changed_is_refused(at: int, by: int) -> None:
    changed = bytearray(SEALED)
    changed[at] ^= by
    with pytest.raises(ValueError):
        SEAL.open(bytes(changed), what="node", whose="node_1")


@pytest.mark.parametrize(
    "sealed",
    [b"x", SEALED[:-1], SEALED + b"\0", SEALED[:NONCE_BYTES], bytes(28), SEALED[1:]],
    ids=["a byte", "cut", "longer", "a nonce only", "zeros", "shifted"],
)
def test_junk_is_refused(sealed: bytes) -> None:
    """Of any length."""
    with pytest.raises(ValueError, match="something else, or was changed"):
        SEAL.open(sealed, what="node", whose="node_1")


@given(st.binary(max_size=100))
@settings(max_examples=40)
def test_it_comes_back(plain: bytes) -> None:
    """Another process with the same secret opens it; nothing stays nothing, and is not told from junk by its length."""
    sealed = SEAL.close(plain, what="node", whose="node_1")
    assert Seal(SECRET).open(sealed, what="node", whose="node_1") == plain
    assert len(sealed) == (NONCE_BYTES + len(plain) + TAG_BYTES if plain else 0)
    assert not plain or len(plain) < 4 or plain not in sealed


def test_the_same_is_sealed_differently_each_time() -> None:
    """Nobody sees which rows hold the same."""
    assert SEAL.close(PLAIN, what="node", whose="node_1") != SEALED
