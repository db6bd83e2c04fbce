"""A join token is whole or refused, and is proved without being sent."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.signing.identity import fingerprint
from embedmesh.signing.invites import Invite, check_proof, make_invite, proof, verifier

INVITE = Invite("abcdefABCDEF", "0123456789abcdefghijklmnopqrstuv", fingerprint(bytes(32)))
TEXT = INVITE.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "emj_",
        TEXT[:-1],
        TEXT + "A",
        TEXT + "\n",
        " " + TEXT,
        TEXT.upper(),
        TEXT.replace("emj_", "em_"),
        TEXT.replace("a", "b", 1),
        TEXT.replace("0123", "1023"),  # two letters swapped
        TEXT.replace("0123", "\u0661123"),  # a digit, but not one of ours
        TEXT[:-1] + "\u00e9",
        "x" * 100_000,
    ],
)
def test_what_is_no_join_token_is_refused(text: str) -> None:
    """In words that do not repeat it."""
    with pytest.raises(ValueError, match="97 characters"):
        Invite.parse(text)


@given(st.integers(0, len(TEXT) - 1), st.characters())
@settings(max_examples=40)
def test_a_typo_is_found(at: int, typed: str) -> None:
    """One character typed wrongly, anywhere."""
    mistyped = TEXT[:at] + typed + TEXT[at + 1 :]
    if mistyped != TEXT:
        with pytest.raises(ValueError):
            Invite.parse(mistyped)


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=40)
def test_a_token_is_read_back_as_it_was_made(gateway_public_key: bytes) -> None:
    """By fixed lengths, whatever characters the fingerprint has."""
    invite = make_invite(gateway_public_key)
    assert len(invite.text) == 97
    assert Invite.parse(invite.text) == invite
    assert invite.fingerprint == fingerprint(gateway_public_key)


def test_no_token_is_made_twice() -> None:
    """Id and secret are drawn anew."""
    first, second = make_invite(bytes(32)), make_invite(bytes(32))
    assert first.invite_id != second.invite_id
    assert first.secret != second.secret


def test_a_token_is_not_shown_by_accident() -> None:
    """Neither in a log of the object nor in a message about it is the secret."""
    assert INVITE.secret not in repr(INVITE)


@pytest.mark.parametrize(
    ("secret", "statement", "proved"),
    [
        (INVITE.secret, b"other", proof(INVITE.secret, b"statement")),
        ("other", b"statement", proof(INVITE.secret, b"statement")),
        (INVITE.secret, b"statement", b""),
        (INVITE.secret, b"statement", proof(INVITE.secret, b"statement")[:-1]),
        (INVITE.secret, b"statement", verifier(INVITE.secret)),
    ],
)
def test_a_proof_of_something_else_is_refused(secret: str, statement: bytes, proved: bytes) -> None:
    """Another secret, another statement, or no proof."""
    assert not check_proof(verifier(secret), statement, proved)


def test_a_proof_is_checked_without_the_secret() -> None:
    """The gateway keeps a hash only."""
    assert check_proof(verifier(INVITE.secret), b"statement", proof(INVITE.secret, b"statement"))
