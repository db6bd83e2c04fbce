"""An identity stays the same, stays private, and what it signed is worth something for its purpose only."""

import hashlib
import hmac
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.rules.errors import SetupError
from embedmesh.signing.identity import Identity, fingerprint, node_id, verify, verify_raw
from embedmesh.signing.private import make_once

NODE = Identity(bytes(range(32)))
SIGNED = NODE.sign(b"test", b"message")


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (bytes(32), 0o640, "chmod 600"),
        (bytes(32), 0o604, "chmod 600"),
        (b"", 0o600, "restore it from a backup"),
        (bytes(31), 0o600, "restore it from a backup"),
        (bytes(33), 0o600, "restore it from a backup"),
        (bytes(10_000), 0o600, "restore it from a backup"),
    ],
)
def test_a_file_that_is_no_private_identity_is_refused(content: bytes, mode: int, says: str, tmp_path: Path) -> None:
    """One line says what to do."""
    path = tmp_path / "identity"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(SetupError, match=says) as refused:
        Identity.load(path)
    assert "\n" not in str(refused.value)


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    """Told in one line, like everything at start-up."""
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="Cannot use the node identity"):
        Identity.load(tmp_path / "file" / "identity")
    with pytest.raises(SetupError, match="Is a directory"):
        (tmp_path / "folder").mkdir(mode=0o700)
        Identity.load(tmp_path / "folder")


def test_an_identity_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    """The second start finds the identity of the first, in a file of mode 0600, and nothing else lies beside it."""
    path = tmp_path / "new" / "identity"
    first = Identity.load(path)
    assert Identity.load(path).public_key == first.public_key
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_of_two_processes_the_first_one_wins(tmp_path: Path) -> None:
    """Whoever comes second leaves the file as it is, and no draft."""
    path = tmp_path / "identity"
    make_once(path, bytes(32))
    make_once(path, bytes(range(32)))
    assert Identity.load(path).public_key == Identity(bytes(32)).public_key
    assert list(tmp_path.iterdir()) == [path]


def test_a_derived_identity_is_by_hkdf() -> None:
    """The same secret and info give the same identity, the one that RFC 5869 says; another info gives another."""
    extracted = hmac.digest(bytes(32), b"secret", "sha256")
    seed = hmac.digest(extracted, b"gateway" + b"\x01", "sha256")
    assert Identity.from_seed(b"secret", b"gateway").public_key == Identity(seed).public_key
    assert Identity.from_seed(b"secret", b"other").public_key != Identity(seed).public_key


@pytest.mark.parametrize(
    ("public_key", "purpose", "message", "signature"),
    [
        (NODE.public_key, b"other", b"message", SIGNED),
        (NODE.public_key, b"test", b"massage", SIGNED),
        (Identity(bytes(32)).public_key, b"test", b"message", SIGNED),
        (NODE.public_key, b"test", b"message", NODE.sign_raw(b"message")),
        (NODE.public_key, b"test", b"message", SIGNED[:-1]),
        (NODE.public_key, b"test", b"message", SIGNED + b"\0"),
        (NODE.public_key, b"test", b"message", b""),
        (NODE.public_key[:-1], b"test", b"message", SIGNED),
        (NODE.public_key + b"\0", b"test", b"message", SIGNED),
        (b"", b"test", b"message", SIGNED),
        (b"\xff" * 32, b"test", b"message", SIGNED),  # not a point of the curve
    ],
)
def test_a_signature_of_something_else_is_refused(
    public_key: bytes, purpose: bytes, message: bytes, signature: bytes
) -> None:
    """Another purpose, message or key, and what is no key or no signature."""
    assert not verify(public_key, purpose, message, signature)


def test_a_signature_is_good_for_its_purpose() -> None:
    """And is Ed25519 over the prefix, the purpose, a zero byte and the message."""
    assert verify(NODE.public_key, b"test", b"message", SIGNED)
    assert verify_raw(NODE.public_key, b"embedmesh test\0message", SIGNED)


@given(st.binary(max_size=80), st.binary(max_size=80))
@settings(max_examples=40)
def test_junk_is_no_signature(public_key: bytes, signature: bytes) -> None:
    """Whatever comes, the answer is False and no exception."""
    assert not verify(public_key, b"test", b"message", signature)


def test_a_raw_signature_is_plain_ed25519() -> None:
    """The second test vector of RFC 8032 section 7.1."""
    identity = Identity(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert identity.public_key.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert identity.sign_raw(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_names_follow_from_the_public_key() -> None:
    """A node id is half of the key's SHA-256 in hex, a fingerprint all of it in base64url."""
    assert node_id(b"key") == "node_" + hashlib.sha256(b"key").hexdigest()[:32]
    assert fingerprint(b"") == "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
