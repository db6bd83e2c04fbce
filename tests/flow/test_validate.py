"""Contract section 2, row by row: what is accepted, and what is refused with which code and param."""

import json

import pytest

from embedmesh.flow.members import MEMBERS
from embedmesh.flow.validate import validate
from embedmesh.rules.embeddings import Call
from embedmesh.rules.errors import Failure
from tests.flow.world import CATALOGUE, MODEL, NATIVE

DEEP_33 = "[" * 33 + "]" * 33


def body(**members: object) -> bytes:
    return json.dumps({"model": "tiny", "input": "a"} | members).encode()


REFUSED = [
    # raw body or members, code, param
    (b"", "invalid_json", None),
    (b"{", "invalid_json", None),
    (b"\xff", "invalid_json", None),
    (b'{"model":"tiny","input":"\\ud800"}', "invalid_json", None),
    (b'{"model":"tiny","input":"a","dimensions":NaN}', "invalid_json", None),
    (b'{"model":"tiny","input":"a"} x', "invalid_json", None),
    (b"\xef\xbb\xbf{}", "invalid_json", None),
    (f'{{"model":"tiny","input":{DEEP_33}}}'.encode(), "invalid_json", None),
    (f'{{"model":"tiny","input":"a","x":{DEEP_33}}}'.encode(), "invalid_json", None),
    (b"[]", "invalid_type", None),
    (b'"a"', "invalid_type", None),
    (b"null", "invalid_type", None),
    (b'{"input":"a"}', "missing_parameter", "model"),
    (b'{"model":null,"input":"a"}', "missing_parameter", "model"),
    (b'{"model":"tiny"}', "missing_parameter", "input"),
    (b'{"model":"tiny","input":null}', "missing_parameter", "input"),
    ({"model": 5}, "invalid_type", "model"),
    ({"model": "gpt-4"}, "model_not_found", "model"),
    ({"model": ""}, "model_not_found", "model"),
    ({"model": "tiny:fast"}, "model_not_found", "model"),
    ({"model": "tiny:int8"}, "model_not_found", "model"),
    ({"input": ""}, "empty_input", "input"),
    ({"input": []}, "empty_input", "input"),
    ({"input": ["a", ""]}, "empty_input", "input.1"),
    ({"input": [[1], []]}, "empty_input", "input.1"),
    ({"input": 5}, "invalid_type", "input"),
    ({"input": {"a": 1}}, "invalid_type", "input"),
    ({"input": True}, "invalid_type", "input"),
    ({"input": [True]}, "invalid_type", "input.0"),
    ({"input": [None]}, "invalid_type", "input.0"),
    ({"input": [1.5]}, "invalid_type", "input.0"),
    ({"input": ["a", "b", "c", 4]}, "invalid_type", "input.3"),
    ({"input": [1, 2, "c"]}, "invalid_type", "input.2"),
    ({"input": [1, True]}, "invalid_type", "input.1"),
    ({"input": [1, 2.0]}, "invalid_type", "input.1"),
    ({"input": [1, -1]}, "invalid_value", "input.1"),
    ({"input": [[1], "b"]}, "invalid_type", "input.1"),
    ({"input": [[1], [2, "b"]]}, "invalid_type", "input.1"),
    ({"input": [[1], [[2]]]}, "invalid_type", "input.1"),
    ({"input": ["a"] * 2049}, "too_many_inputs", "input"),
    ({"input": [[1]] * 2049}, "too_many_inputs", "input"),
    ({"encoding_format": "hex"}, "invalid_value", "encoding_format"),
    ({"encoding_format": "FLOAT"}, "invalid_value", "encoding_format"),
    ({"encoding_format": 1}, "invalid_type", "encoding_format"),
    ({"dimensions": 0}, "invalid_value", "dimensions"),
    ({"dimensions": -1}, "invalid_value", "dimensions"),
    ({"dimensions": 5}, "invalid_value", "dimensions"),
    ({"dimensions": 10**30}, "invalid_type", "dimensions"),
    ({"dimensions": True}, "invalid_type", "dimensions"),
    ({"dimensions": 2.0}, "invalid_type", "dimensions"),
    ({"dimensions": "2"}, "invalid_type", "dimensions"),
    ({"user": 5}, "invalid_type", "user"),
    ({"user": "u" * 513}, "invalid_value", "user"),
    ({"input_type": "classification"}, "invalid_value", "input_type"),
    ({"input_type": 1}, "invalid_type", "input_type"),
    ({"truncate": "middle"}, "invalid_value", "truncate"),
    ({"truncate": True}, "invalid_type", "truncate"),
    ({"truncation": "end"}, "invalid_type", "truncation"),
    ({"truncate": "start", "truncation": True}, "invalid_value", "truncation"),
    ({"temperature": 1}, "unknown_parameter", "temperature"),
    ({"Model": "x"}, "unknown_parameter", "Model"),
    ({"x" * 100: 1}, "unknown_parameter", "x" * 64),
]


@pytest.mark.parametrize(("asked", "code", "param"), REFUSED)
def test_what_is_refused_names_the_member_and_says_why(asked: object, code: str, param: str | None) -> None:
    raw = asked if isinstance(asked, bytes) else body(**asked)  # type: ignore[arg-type]
    with pytest.raises(Failure) as refused:
        validate(raw, CATALOGUE)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert len(refused.value.message) > 20, "the message must say what to do"


ACCEPTED = [
    ({}, {"texts": ["a"], "single": True}),
    ({"input": ["a", "b"]}, {"texts": ["a", "b"]}),
    ({"input": [3, 4]}, {"ids": [[3, 4]], "single": True}),
    ({"input": [[3], [4, 5]]}, {"ids": [[3], [4, 5]]}),
    ({"input": list(range(2049))}, {"ids": [list(range(2049))], "single": True}),
    ({"input": ["a"] * 2048}, {"texts": ["a"] * 2048}),
    ({"input": " \n"}, {"texts": [" \n"], "single": True}),
    ({"model": "acme/tiny:exact"}, {"model": "acme/tiny:exact", "texts": ["a"], "single": True}),
    ({"encoding_format": "base64"}, {"encoding": "base64", "texts": ["a"], "single": True}),
    ({"encoding_format": None}, {"texts": ["a"], "single": True}),
    ({"dimensions": 1}, {"dimensions": 1, "texts": ["a"], "single": True}),
    ({"dimensions": 4}, {"dimensions": 4, "texts": ["a"], "single": True}),
    ({"user": "u" * 512}, {"user": "u" * 512, "texts": ["a"], "single": True}),
    ({"user": ""}, {"user": "", "texts": ["a"], "single": True}),
    ({"input_type": "query"}, {"role": "query", "texts": ["a"], "single": True}),
    ({"input_type": "search_query"}, {"role": "query", "texts": ["a"], "single": True}),
    ({"input_type": "document"}, {"role": "document", "texts": ["a"], "single": True}),
    ({"input_type": "search_document"}, {"role": "document", "texts": ["a"], "single": True}),
    ({"input_type": "passage"}, {"role": "document", "texts": ["a"], "single": True}),
    ({"truncate": "END"}, {"truncate": "end", "texts": ["a"], "single": True}),
    ({"truncate": "Start"}, {"truncate": "start", "texts": ["a"], "single": True}),
    ({"truncate": "NONE"}, {"truncate": "none", "texts": ["a"], "single": True}),
    ({"truncation": True}, {"truncate": "end", "texts": ["a"], "single": True}),
    ({"truncation": False}, {"truncate": "none", "texts": ["a"], "single": True}),
    ({"unknown": None}, {"texts": ["a"], "single": True}),
    ({"truncate": "end", "truncation": True}, {"truncate": "end", "texts": ["a"], "single": True}),
    ({name: None for name in MEMBERS if name not in ("model", "input")}, {"texts": ["a"], "single": True}),
]


@pytest.mark.parametrize(("asked", "understood"), ACCEPTED)
def test_what_is_accepted_is_understood(asked: dict[str, object], understood: dict[str, object]) -> None:
    call, model = validate(body(**asked), CATALOGUE)
    assert call == Call(**({"model": "tiny"} | understood))  # type: ignore[arg-type]
    assert model is MODEL


def test_a_name_alias_or_suffix_finds_the_model() -> None:
    for name, model in (("acme/tiny", MODEL), ("tiny", MODEL), ("tiny:exact", MODEL), ("acme/native", NATIVE)):
        assert validate(body(model=name), CATALOGUE)[1] is model


def test_refusals_never_repeat_the_callers_text() -> None:
    """A message may name a member; it must not hold what the caller wrote into it."""
    secret = "rosebud"
    for members in ({"model": secret}, {"encoding_format": secret}, {"input": [1, secret]}, {"truncate": secret}):
        with pytest.raises(Failure) as refused:
            validate(body(**members), CATALOGUE)
        assert secret not in refused.value.message
