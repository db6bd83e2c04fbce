"""A log's head stands for every receipt in it, in its order."""

import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.rules.membership import Receipt
from embedmesh.signing.receipts import EMPTY_LOG_HEAD, Chain, head_message, replay

FIRST = Receipt(1, "req_1", b"a" * 32, b"b" * 32, 300, 1_700_000_000_000)
SECOND = Receipt(2, "req_2", b"c" * 32, b"d" * 32, 7, 1_700_000_000_001)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_gap_is_refused(number: int) -> None:
    """Numbers count from one, each once."""
    chain = Chain()
    chain.add(FIRST)
    with pytest.raises(ValueError):
        chain.add(msgspec.structs.replace(SECOND, number=number))
    assert (chain.count, chain.head) == (1, replay(EMPTY_LOG_HEAD, [FIRST]))


@pytest.mark.parametrize(
    "fields",
    [
        (0, "req", bytes(32), bytes(32), 1, 1),
        (1, "r" * 65, bytes(32), bytes(32), 1, 1),
        (1, "req", bytes(31), bytes(32), 1, 1),
        (1, "req", bytes(32), bytes(33), 1, 1),
        (1, "req", bytes(32), bytes(32), -1, 1),
        (1, "req", bytes(32), bytes(32), 1, 10**15),
        (1, "req", bytes(32), bytes(32), 1),
        (1, "req", bytes(32), bytes(32), 1, 1, 1),
    ],
)
def test_what_is_no_receipt_is_not_read(fields: tuple[object, ...]) -> None:
    """Each field has its limits, and there are six."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Receipt)


def test_the_encoding_is_written_down() -> None:
    """By hand: an array of six, integers in their shortest form, strings as strings, digests as binary."""
    encoded = (
        b"\x96\x01\xa5req_1\xc4\x20" + b"a" * 32 + b"\xc4\x20" + b"b" * 32 + b"\xcd\x01\x2c"
        b"\xcf" + (1_700_000_000_000).to_bytes(8)
    )
    chain = Chain()
    chain.add(FIRST)
    assert chain.head == hashlib.sha256(bytes(32) + encoded).digest()
    assert msgspec.msgpack.decode(encoded, type=Receipt) == FIRST


def test_a_chain_goes_on_where_it_was() -> None:
    """From a kept head and count, and by replaying, the head is the same."""
    chain = Chain()
    chain.add(FIRST)
    later = Chain(chain.head, chain.count)
    chain.add(SECOND)
    later.add(SECOND)
    assert chain.head == later.head == replay(EMPTY_LOG_HEAD, [FIRST, SECOND])
    assert chain.count == 2


@given(st.lists(st.integers(1, 5), max_size=4), st.lists(st.integers(1, 5), max_size=4))
@settings(max_examples=40)
def test_other_logs_have_other_heads(one: list[int], other: list[int]) -> None:
    """No receipt can be changed, dropped, added or moved."""
    heads = [
        replay(EMPTY_LOG_HEAD, [msgspec.structs.replace(FIRST, tokens=each) for each in log]) for log in (one, other)
    ]
    assert (heads[0] == heads[1]) == (one == other)


def test_a_head_is_signed_with_all_that_it_means() -> None:
    """Node, gateway, count, head and time are in the message."""
    said = ("node_0", "fingerprint", 2, b"h" * 32, 1_700_000_000_000)
    assert msgspec.msgpack.decode(head_message(*said)) == list(said)
