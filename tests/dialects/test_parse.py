"""Contract section 2, row by row: what is accepted, and what is refused with which code and param."""

import json
import tracemalloc

import msgspec
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.dialects.openai.fields import FIELDS
from embedmesh.dialects.openai.parse import IGNORED_MAX, parse
from embedmesh.dialects.openai.spellings import COULD_CHANGE, HARMLESS
from embedmesh.dialects.openai.straight import parse_ordinary
from embedmesh.rules.embeddings import Call
from embedmesh.rules.errors import Failure
from embedmesh.rules.models import Modality, Model
from embedmesh.rules.served import NAMED_MODELS_MAX, ParseTerms
from tests.flow.world import CATALOGUE, MODEL, NATIVE

DEEP_33 = "[" * 33 + "]" * 33


def body(**members: object) -> bytes:
    return json.dumps({"model": "tiny", "input": "a"} | members).encode()


REFUSED = [
    # raw body or members, code, param
    (b"", "invalid_json", None),
    (b"{", "invalid_json", None),
    (b"\xff", "invalid_json", None),
    (b'{"model":"tiny","input":"\\ud800"}', "invalid_json", "input"),
    (b'{"model":"tiny","input":["a","\\ud800"]}', "invalid_json", "input.1"),
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
    ({"truncate": 1}, "invalid_type", "truncate"),
    ({"truncation": "end"}, "invalid_type", "truncation"),
    ({"truncate": "start", "truncation": True}, "invalid_value", "truncation"),
    ({"task": "classification"}, "invalid_value", "task"),
    ({"task": "CLUSTERING"}, "invalid_value", "task"),
    ({"task": 1}, "invalid_type", "task"),
    ({"task": "retrieval.query", "input_type": "passage"}, "invalid_value", "input_type"),
    ({"input_type": "query", "task": "text-matching"}, "invalid_value", "task"),
    ({"prompt_name": "document"}, "invalid_value", "prompt_name"),
    ({"prompt_name": "s2p"}, "invalid_value", "prompt_name"),
    ({"prompt_name": 1}, "invalid_type", "prompt_name"),
    ({"model": "acme/native", "prompt_name": "query"}, "invalid_value", "prompt_name"),
    ({"prompt_name": "query", "input_type": "document"}, "invalid_value", "prompt_name"),
    ({"prompt_name": "query", "task": "text-matching"}, "invalid_value", "prompt_name"),
    ({"output_dimension": 0}, "invalid_value", "output_dimension"),
    ({"output_dimension": 5}, "invalid_value", "output_dimension"),
    ({"output_dimension": "2"}, "invalid_type", "output_dimension"),
    ({"dimensions": 2, "output_dimension": 3}, "invalid_value", "output_dimension"),
    ({"truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "invalid_value", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 9}, "invalid_value", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": True}, "invalid_type", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -1, "truncate": "start"}, "invalid_value", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 5, "truncate": "none"}, "invalid_value", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 5, "truncation": False}, "invalid_value", "truncate_prompt_tokens"),
    ({"normalize": 1}, "invalid_type", "normalize"),
    ({"normalize": True, "normalized": False}, "invalid_value", "normalized"),
    ({"normalize": False, "dimensions": 2}, "invalid_value", "normalize"),
    ({"metadata": "a"}, "invalid_value", "metadata"),
    ({"timeout": "1"}, "invalid_value", "timeout"),
    ({"timeout": True}, "invalid_value", "timeout"),
    ({"stream": True}, "invalid_value", "stream"),
    ({"stream": 0}, "invalid_value", "stream"),
    ({"priority": "low"}, "invalid_value", "priority"),
    ({"keep_alive": []}, "invalid_value", "keep_alive"),
    ({"drop_params": "yes"}, "invalid_value", "drop_params"),
    ({"modality": "image"}, "invalid_value", "modality"),
    ({"output_dtype": "int4"}, "invalid_value", "output_dtype"),
    ({"embedding_type": ["float", "binary"]}, "invalid_type", "embedding_type"),
    ({"embedding_type": "base64", "encoding_format": "float"}, "invalid_value", "embedding_type"),
    ({"embedding_type": "binary", "output_dtype": "int8"}, "invalid_value", "embedding_type"),
    ({"late_chunking": True}, "invalid_value", "late_chunking"),
    (f'{{"model":"tiny","input":"a","metadata":{{"a":{DEEP_33}}}}}'.encode(), "invalid_json", None),
    ({"temperature": 1}, "unknown_parameter", "temperature"),
    ({"Model": "x"}, "unknown_parameter", "Model"),
    ({"x" * 100: 1}, "unknown_parameter", "x" * 64),
]


@pytest.mark.parametrize(("asked", "code", "param"), REFUSED)
def test_what_is_refused_names_the_member_and_says_why(asked: object, code: str, param: str | None) -> None:
    raw = asked if isinstance(asked, bytes) else body(**asked)  # type: ignore[arg-type]
    with pytest.raises(Failure) as refused:
        parse(raw, CATALOGUE)
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
    ({"truncate_prompt_tokens": -1}, {"truncate": "end", "texts": ["a"], "single": True}),
    ({"truncate_prompt_tokens": -1, "truncation": True}, {"truncate": "end", "texts": ["a"], "single": True}),
    ({"truncate_prompt_tokens": 8}, {"truncate": "end", "keep": 8, "texts": ["a"], "single": True}),
    (
        {"truncate_prompt_tokens": 1, "truncate": "start"},
        {"truncate": "start", "keep": 1, "texts": ["a"], "single": True},
    ),
    ({"output_dimension": 3}, {"dimensions": 3, "texts": ["a"], "single": True}),
    ({"output_dimension": 3, "dimensions": 3}, {"dimensions": 3, "texts": ["a"], "single": True}),
    *(
        ({member: said}, {"role": role, "texts": ["a"], "single": True})
        for member in ("task", "input_type")
        for said, role in {
            "retrieval.query": "query",
            "retrieval.passage": "document",
            "text-matching": None,
            "RETRIEVAL_QUERY": "query",
            "RETRIEVAL_DOCUMENT": "document",
            "SEMANTIC_SIMILARITY": None,
            "QUESTION_ANSWERING": "query",
            "semantic_similarity": None,
            "query": "query",
            "passage": "document",
        }.items()
    ),
    ({"task": "RETRIEVAL_QUERY", "input_type": "query"}, {"role": "query", "texts": ["a"], "single": True}),
    ({"prompt_name": "query"}, {"role": "query", "texts": ["a"], "single": True}),
    ({"prompt_name": "query", "task": "retrieval.query"}, {"role": "query", "texts": ["a"], "single": True}),
    ({"normalize": True}, {"normalize": True, "texts": ["a"], "single": True}),
    ({"normalized": True, "normalize": True}, {"normalize": True, "texts": ["a"], "single": True}),
    ({"normalize": False}, {"texts": ["a"], "single": True}),
    ({"output_dtype": "float", "embedding_type": "float"}, {"texts": ["a"], "single": True}),
    ({"output_dtype": "binary"}, {"dtype": "binary", "normalize": True, "texts": ["a"], "single": True}),
    ({"embedding_type": ["int8"]}, {"dtype": "int8", "normalize": True, "texts": ["a"], "single": True}),
    ({"embedding_type": "base64"}, {"encoding": "base64", "texts": ["a"], "single": True}),
    ({"truncate": True}, {"truncate": "end", "texts": ["a"], "single": True}),
    *(
        ({member: value}, {"ignored": (member,), "texts": ["a"], "single": True})
        for member, value in {
            "metadata": {"trace": "1"},
            "timeout": 2.5,
            "stream": False,
            "priority": 3,
            "keep_alive": "5m",
            "drop_params": True,
            "modality": "text",
            "late_chunking": False,
        }.items()
    ),
    (
        {"timeout": 1, "metadata": {}, "stream": False},
        {"ignored": ("timeout", "metadata", "stream"), "texts": ["a"], "single": True},
    ),
    ({name: None for name in FIELDS if name not in ("model", "input")}, {"texts": ["a"], "single": True}),
]


@pytest.mark.parametrize(("asked", "understood"), ACCEPTED)
def test_what_is_accepted_is_understood(asked: dict[str, object], understood: dict[str, object]) -> None:
    call, model = parse(body(**asked), CATALOGUE)
    assert call == Call(**({"model": "tiny"} | understood))  # type: ignore[arg-type]
    assert model is MODEL


CONTRADICTIONS = [
    {"dimensions": 2, "output_dimension": 3},
    {"truncate": "start", "truncation": True},
    {"truncate_prompt_tokens": 5, "truncation": False},
    {"prompt_name": "query", "task": "text-matching"},
    {"normalize": True, "normalized": False},
]


@pytest.mark.parametrize("members", CONTRADICTIONS)
def test_members_that_contradict_each_other_are_both_named(members: dict[str, object]) -> None:
    said = refusal(body(**members)).message
    assert said == " and ".join(f"`{name}`" for name in members) + " contradict each other: send one of them."


def test_a_name_alias_or_suffix_finds_the_model() -> None:
    for name, model in (("acme/tiny", MODEL), ("tiny", MODEL), ("tiny:exact", MODEL), ("acme/native", NATIVE)):
        assert parse(body(model=name), CATALOGUE)[1] is model


def test_refusals_never_repeat_the_callers_text() -> None:
    """A message may name a member; it must not hold what the caller wrote into it."""
    secret = "rosebud"
    for members in (
        {"model": secret},
        {"encoding_format": secret},
        {"input": [1, secret]},
        {"truncate": secret},
        {"task": secret},
        {"prompt_name": secret},
        {"output_dtype": secret},
    ):
        with pytest.raises(Failure) as refused:
            parse(body(**members), CATALOGUE)
        assert secret not in refused.value.message


# -- a model that there is not ----------------------------------------------------------------------------------------


def refusal(raw: bytes, terms: ParseTerms | None = None, catalogue: Catalogue = CATALOGUE) -> Failure:
    with pytest.raises(Failure) as refused:
        parse(raw, catalogue, terms or ParseTerms())
    return refused.value


def test_who_asks_for_an_unknown_model_is_told_which_are_served_and_how_to_give_one_that_name() -> None:
    said = refusal(body(model="text-embedding-3-small"), ParseTerms(serves=lambda model: model is NATIVE)).message
    assert "acme/native" in said and "acme/tiny" not in said
    assert 'aliases = ["the name you asked for"]' in said and "text-embedding" not in said


def test_of_very_many_models_ten_are_named() -> None:
    many = Catalogue(tuple(msgspec.structs.replace(MODEL, id=f"m{n}", aliases=()) for n in range(40)))
    said = refusal(body(model="other"), catalogue=many).message
    assert sum(f"m{n}," in said or f"m{n}." in said for n in range(40)) == NAMED_MODELS_MAX
    assert len(said) < 500


def test_with_nothing_served_it_says_so_and_names_no_alias() -> None:
    said = refusal(body(model="other"), ParseTerms(serves=lambda model: False)).message
    assert "No model is served now" in said and "aliases" not in said


# -- normal vectors, and members that nobody knows --------------------------------------------------------------------


def test_vectors_that_are_normal_by_themselves_cannot_be_had_otherwise() -> None:
    """Of a model whose files are not here nobody knows how they are."""
    normal = ParseTerms(normal={MODEL.id})
    assert refusal(body(normalize=False), normal).param == "normalize"
    assert parse(body(normalize=True), CATALOGUE, normal)[0].normalize
    foreign = Catalogue((msgspec.structs.replace(MODEL, folder="", digest=""),))
    assert refusal(body(normalize=False), catalogue=foreign).param == "normalize"


LENIENT = ParseTerms(ignore_unknown=True)


def test_unknown_members_are_ignored_and_named_where_the_operator_says_so() -> None:
    call, _ = parse(body(temperature=0.5, seed=1, store=False, user="u"), CATALOGUE, LENIENT)
    assert call.ignored == ("temperature", "seed", "store")
    assert refusal(body(temperature=0.5)).code == "unknown_parameter"


@pytest.mark.parametrize(
    "name",
    [
        *("pooling", "instruction", "Prompt", "output_type", "quantization", "dims", "texts"),
        *("chunk_size", "add_special_tokens", "MODEL", "truncate_dim", "images", "late_chunk", "title", "options"),
        *("a b", "x" * 65, "", "näme", "a,b", "a\r\nSet-Cookie: b"),
    ],
)
def test_what_could_change_vectors_is_refused_all_the_same(name: str) -> None:
    refused = refusal(body(**{name: 1}), LENIENT)
    assert (refused.code, refused.param) == ("unknown_parameter", name[:64] or None)


def test_known_members_are_as_strict_as_ever_where_unknown_ones_are_ignored() -> None:
    for members in ({"stream": True}, {"dimensions": 0}, {"task": "classification"}, {"normalize": 1}):
        assert refusal(body(**members), LENIENT).code.startswith("invalid_")
    assert refusal(body(whatever=json.loads(DEEP_33)), LENIENT).code == "invalid_json"


def test_no_more_than_a_handful_of_ignored_members_are_named() -> None:
    call, _ = parse(body(**{f"x{n}": n for n in range(1_000)}), CATALOGUE, LENIENT)
    assert len(call.ignored) == IGNORED_MAX


def test_every_member_that_is_understood_would_be_refused_if_it_were_not() -> None:
    """The list of what could change vectors covers at least those that do."""
    understood = {name for name, member in FIELDS.items() if member.says not in (None, "user")}
    assert {name for name in understood if not COULD_CHANGE.search(name)} == set()
    assert {name for name, member in FIELDS.items() if member.says is None} == set(HARMLESS)


# -- broken text is placed --------------------------------------------------------------------------------------------

BROKEN = [
    # the body, what is said of it, the member
    (b"\xef\xbb\xbf{}", "starts with a byte order mark", None),
    ('{"model":"tiny"}'.encode("utf-16"), "starts with a byte order mark", None),
    ("{}".encode("utf-32"), "starts with a byte order mark", None),
    (b'{"model":"tiny","input":"\xff"}', "not UTF-8 at byte 25 ", None),
    (b"\xff", "not UTF-8 at byte 0 ", None),
    (b'{"input":"a\xc3', "not UTF-8 at byte 11 ", None),
    (b'{"input":"\xed\xa0\x80"}', "not UTF-8 at byte 10 ", None),
    (b'{"a":1}\x80', "not UTF-8 at byte 7 ", None),
    ('{"input":"ä€😀'.encode() + b"\xf0\x9f\x98" + b'"}', "not UTF-8 at byte 19 ", None),
    (b'{"input":"' + b"a" * 65_525 + b'\xe2\x82"}', "not UTF-8 at byte 65535 ", None),
    (b'{"input":"' + b"a" * 65_525 + b'\xe2\x82\xac\xff"}', "not UTF-8 at byte 65538 ", None),
    (b'{"input":"\\ud800"}', "`input` holds half a surrogate pair", "input"),
    (b'{"input":["a","x\\ude00"]}', "`input.1` holds half a surrogate pair", "input.1"),
    (b'{"input":["a","\\\\","\\ud83d\\ude00 \\ud83d!"]}', "`input.2` holds half a surrogate pair", "input.2"),
    ('{"input":["äöü€","\\ud83d\\u0041"]}'.encode(), "`input.1` holds half a surrogate pair", "input.1"),
    (b'{"input":"a","user":"\\udfff","x":[]}', "`user` holds half a surrogate pair", "user"),
    (b'{"input":"a","input":["b","\\ud800"],"user":"c"}', "`input.1` holds half a surrogate pair", "input.1"),
    (
        '{"input":["€'.encode() + "😀ä".encode() * 20_000 + b'","\\ud800"]}',
        "`input.1` holds half a surrogate pair",
        "input.1",
    ),
    (b'{"input":[["\\ud800"]]}', "`input.0.0` holds half a surrogate pair", "input.0.0"),
    (b'{"\\ud800":1}', "The body holds half a surrogate pair (line 1, column ", None),
    (b'{"secret words":"\\ud800"}', "The body holds half a surrogate pair (line 1, column ", None),
    (b'["\\ud800"]', "The body holds half a surrogate pair (line 1, column ", None),
    (b'{"input":"a', "not valid JSON (line 1, column 12)", None),
]


@pytest.mark.parametrize(("raw", "said", "param"), BROKEN)
def test_broken_text_is_placed(raw: bytes, said: str, param: str | None) -> None:
    refused = refusal(raw)
    assert refused.code == "invalid_json"
    assert said in refused.message
    assert refused.param == param


def test_to_find_the_place_takes_no_more_memory_than_the_body() -> None:
    """As one text of the body's characters it would be four times as large."""
    raw = b'{"input":"' + "😀".encode() * 1_000_000 + b"\xff"
    tracemalloc.start()
    assert "byte 4000010 " in refusal(raw).message
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(raw)


@pytest.mark.parametrize(("modality", "path"), [("chat", "/v1/chat/completions"), ("images", "/v1/images/generations")])
def test_a_model_that_generates_makes_no_vectors(modality: Modality, path: str) -> None:
    """The ordinary way leaves it to this one, which says what the model does instead."""
    talker = Model(id="acme/talker", width=0, max_tokens=8, price=1, modalities=(modality,))
    catalogue = Catalogue((MODEL, talker))
    raw = body(model="acme/talker")
    assert parse_ordinary(raw, catalogue) is None
    with pytest.raises(Failure, match=path) as refused:
        parse(raw, catalogue)
    assert (refused.value.code, refused.value.param) == ("unsupported_modality", "model")
