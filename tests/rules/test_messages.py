"""The compact form of ids says what it was made of, and nothing that does not add up is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.rules.embeddings import EmbedIds, pack_ids, unpack_ids

IDS = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=20), max_size=20)


@given(IDS)
def test_what_is_packed_is_unpacked(ids: list[list[int]]) -> None:
    assert unpack_ids(pack_ids("m", ids)) == ids


def test_the_bytes_are_little_endian() -> None:
    """Whatever the machine's own order is."""
    assert pack_ids("m", [[1, 256], []]) == EmbedIds("m", b"\2\0\0\0\0\0\0\0", b"\1\0\0\0\0\1\0\0")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(lengths: bytes, ids: bytes) -> None:
    """Never more inputs or ids than there are bytes for."""
    try:
        got = unpack_ids(EmbedIds("m", lengths, ids))
    except ValueError:
        return
    assert len(got) == len(lengths) // 4
    assert sum(map(len, got)) == len(ids) // 4


@pytest.mark.parametrize(("lengths", "ids"), [(b"\1\0\0\0", b""), (b"", b"\0\0\0\0"), (b"\0", b""), (b"", b"\0\0")])
def test_what_does_not_add_up_is_refused(lengths: bytes, ids: bytes) -> None:
    with pytest.raises(ValueError):
        unpack_ids(EmbedIds("m", lengths, ids))
