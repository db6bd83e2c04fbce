"""A gateway takes a nonce once, if it made it itself, and not long ago; asking for nonces costs it no memory."""

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.rules.membership import NONCE_S
from embedmesh.signing.nonces import NONCE_MAC_BYTES, NONCE_RANDOM_BYTES, NONCE_TIME_BYTES, USED_NONCES_MAX, Nonces

KEY = bytes(range(32))
NOW = 1_700_000_000


@pytest.mark.parametrize(
    ("age_s", "taken"),
    [(-1, False), (NONCE_S + 1, False), (10**6, False), (0, True), (1, True), (NONCE_S, True)],
)
def test_a_nonce_is_good_for_a_minute(age_s: int, taken: bool) -> None:
    """Neither older, nor from a time that has not come."""
    nonces = Nonces(KEY)
    assert nonces.take(nonces.make(NOW), NOW + age_s) == taken


@pytest.mark.parametrize(
    "nonce",
    [
        b"",
        b"x",
        bytes(NONCE_MAC_BYTES),
        bytes(NONCE_TIME_BYTES + NONCE_RANDOM_BYTES + NONCE_MAC_BYTES),
        NOW.to_bytes(NONCE_TIME_BYTES, "big") + bytes(NONCE_RANDOM_BYTES + NONCE_MAC_BYTES),
        Nonces(bytes(32)).make(NOW),
        Nonces(KEY).make(NOW)[:-1],
        Nonces(KEY).make(NOW) + b"\0",
        b"\0" + Nonces(KEY).make(NOW),
    ],
    ids=["nothing", "a byte", "a MAC's length", "zeros", "a time", "another key's", "short", "long", "shifted"],
)
def test_what_this_gateway_did_not_make_is_not_taken(nonce: bytes) -> None:
    """Junk of any length, and another gateway's."""
    assert not Nonces(KEY).take(nonce, NOW)


@given(st.integers(0, NONCE_TIME_BYTES + NONCE_RANDOM_BYTES + NONCE_MAC_BYTES - 1), st.integers(1, 255))
@settings(max_examples=40)
def test_a_nonce_cannot_be_changed(at: int, by: int) -> None:
    """Not its time, not its chance, not its MAC: one that was used could be used again."""
    nonces = Nonces(KEY)
    nonce = bytearray(nonces.make(NOW))
    nonce[at] ^= by
    assert not nonces.take(bytes(nonce), NOW)


def test_a_nonce_is_taken_once() -> None:
    """As long as it would be good; each is another one, also within a second."""
    nonces = Nonces(KEY)
    first, second = nonces.make(NOW), nonces.make(NOW)
    assert first != second
    for nonce in (first, second):
        assert nonces.take(nonce, NOW)
        assert [nonces.take(nonce, NOW + later) for later in (0, 1, NONCE_S, NONCE_S + 1)] == [False] * 4


def test_a_restarted_gateway_takes_the_nonces_that_it_gave_before() -> None:
    """They follow from its key: a node that asked just before need not ask again."""
    assert Nonces(KEY).take(Nonces(KEY).make(NOW), NOW + 1)


def test_used_nonces_are_bounded_and_forgotten() -> None:
    """More in a minute than a fleet could need are a flood and are refused; two minutes later there is room again."""
    nonces = Nonces(KEY)
    for _ in range(USED_NONCES_MAX):
        assert nonces.take(nonces.make(NOW), NOW)
    assert not nonces.take(nonces.make(NOW), NOW)
    later = NOW + 2 * NONCE_S + 1
    assert nonces.take(nonces.make(later), later)
    assert len(nonces._used) == 1


def test_what_was_not_taken_leaves_nothing() -> None:
    """Who only asks, or sends junk, fills no memory."""
    nonces = Nonces(KEY)
    for _ in range(100):
        nonces.make(NOW)
        nonces.take(secrets.token_bytes(38), NOW)
    assert not nonces._used
