"""JSON of more values than any request has is refused before it is parsed; what a request may have never is."""

import json

import pytest

from embedmesh.dialects.openai.values import ARRAYS_MAX, COMMAS_MAX, COUNTED_FROM_BYTES, STRINGS_MAX, check_values
from embedmesh.rules.errors import Failure
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, REQUEST_TOKENS_MAX


def body(given: object) -> bytes:
    return json.dumps({"model": "m", "input": given}).encode()


NASTY = '"[{,\\' * 2_000
ACCEPTED = {
    "the most texts": body(["a" * 20] * REQUEST_INPUTS_MAX),
    "the most ids": body([12_345] * REQUEST_TOKENS_MAX),
    "the most arrays of ids": body([[7] * 146] * REQUEST_INPUTS_MAX),
    "marks in a text": body("[{,]}" * 200_000),
    "escaped marks in texts": body([NASTY] * 20),
    "escapes before a string's end": body(['a\\"' * 5_000, "\\" * 9_999, "\\" * 10_000, '"']),
    "escaped marks beside many ids": body([[1] * 100_000]) [:-1] + b',"user":' + json.dumps(NASTY).encode() + b"}",
    "small": b"[" * (COUNTED_FROM_BYTES - 1),
}  # fmt: skip
REFUSED = {
    "texts": (body([""] * (STRINGS_MAX + 1)), "too_many_inputs"),
    "texts with escapes": (body(['\\"'] * (STRINGS_MAX + 1)), "too_many_inputs"),
    "arrays": (body([[]] * (ARRAYS_MAX + 1)), "too_many_inputs"),
    "objects": (body([{}] * (ARRAYS_MAX + 1)), "too_many_inputs"),
    "ids": (body([1] * (COMMAS_MAX + 2)), "max_tokens_per_request"),
    "ids beside an escape": (body([1] * (COMMAS_MAX + 2))[:-1] + b',"user":"\\\\"}', "max_tokens_per_request"),
    "depth": (b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
    "depth of objects": (b'[{"a": ' * 50_000, "invalid_json"),
    "brackets that stay open": (b"[0," * 50_000, "invalid_json"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_a_request_may_have_is_left_to_the_parser(name: str) -> None:
    check_values(ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_more_values_than_a_request_may_have_are_refused(name: str) -> None:
    given, code = REFUSED[name]
    with pytest.raises(Failure) as refused:
        check_values(given)
    assert refused.value.code == code
