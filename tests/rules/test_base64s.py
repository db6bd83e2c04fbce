"""Base64 has one form: what other readers would let pass is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.rules.base64s import decode64, encode64


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("AAAA\n", None),
        (" AAAA", None),
        ("AA AA", None),
        ("AA\r\nAA", None),
        ("AAAA\0", None),
        ("-_-_", None),  # the URL alphabet
        ("AA", None),  # no padding
        ("AAA", None),
        ("AA=", None),
        ("AAA==", None),
        ("AAAA=", None),
        ("AAAA====", None),
        ("AA==AAAA", None),  # padding in the middle
        ("=", None),
        ("====", None),
        ("A", None),
        ("AB==", None),  # unused bits that are not zero
        ("AAB=", None),
        ("/+/=", None),
        ("ÄAAA", None),
        ("AAA\uff21", None),  # a letter A of another script
        ("AAA\ud800", None),
        ("", 1),
        ("AAAA", 2),
        ("AAAA", 4),
    ],
)
def test_another_form_or_length_is_refused(text: str, size: int | None) -> None:
    with pytest.raises(ValueError) as refused:
        decode64(text, size)
    assert not text or text not in str(refused.value)


@given(st.binary(max_size=64))
def test_what_was_encoded_is_decoded(raw: bytes) -> None:
    assert decode64(encode64(raw), len(raw)) == raw


@given(st.text("AB+/=-_ \n", max_size=12))
def test_no_two_texts_stand_for_the_same_bytes(text: str) -> None:
    try:
        raw = decode64(text)
    except ValueError:
        return
    assert encode64(raw) == text
