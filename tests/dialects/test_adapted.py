"""Other APIs' requests become OpenAI's, their replies and failures are in their own words."""

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.dialects import cohere, google, ollama, tei
from embedmesh.dialects.adapted import Adapted
from embedmesh.dialects.quantised import FORMS
from embedmesh.rules.errors import ContextLengthExceeded, Failure, InvalidValue
from embedmesh.rules.forwarding import Answer, Share
from embedmesh.rules.models import Model
from embedmesh.rules.served import ORDINARY

TINY = Model(id="tiny", folder="x", width=4, max_tokens=16, price=1, prompts={"query": "q: "})
OTHER = Model(id="other", folder="y", width=4, max_tokens=16, price=1)
ONE, TWO = Catalogue((TINY,)), Catalogue((TINY, OTHER))
VECTORS = np.array([[0.5, -0.5, 0.5, 0.5], [0.6, 0.0, -0.8, 0.0]], "<f4")
ANSWER = Answer(VECTORS.tobytes(), 4, 7, (Share("n0", 7),))
GOOGLE, GOOGLE_SEVERAL = google.dialects(lambda failure: 400)


def parsed(dialect: Adapted, catalogue: Catalogue = ONE, named: str | None = None, **asked: Any) -> Any:
    return dialect.parse(json.dumps(asked).encode(), catalogue, ORDINARY, named=named)[0]


def replied(dialect: Adapted, named: str | None = None, **asked: Any) -> Any:
    call = parsed(dialect, named=named, **asked)
    body = dialect.render(call, 0, ANSWER, {}).body
    assert len(body) + len(ANSWER.data) <= dialect.reply_bytes_max(call, 4)
    return json.loads(body)


def test_ollama_cuts_long_texts_and_scales_unless_told_otherwise() -> None:
    call = parsed(ollama.EMBED, model="tiny:latest", input=["a", "b"], keep_alive="5m", options={"num_ctx": 8})
    assert (call.texts, call.truncate, call.normalize, call.model) == (["a", "b"], "end", True, "tiny")
    assert parsed(ollama.EMBED, model="tiny", input="a", truncate=False).truncate == "none"
    reply = replied(ollama.EMBED, model="tiny", input=["a", "b"])
    assert np.array(reply["embeddings"], "<f4").tobytes() == VECTORS.tobytes()
    assert (reply["prompt_eval_count"], reply["total_duration"]) == (7, 0)
    assert replied(ollama.EMBEDDINGS, model="tiny", prompt="a")["embedding"] == VECTORS[0].tolist()


def test_texts_for_a_foreign_model_are_not_cut_and_a_tag_is_dropped_only_where_it_is_no_name() -> None:
    """Nobody here has its tokenizer: to ask for a cut would refuse every request."""
    foreign = Model(id="far", width=4, max_tokens=16, price=1)
    tagged = Model(id="tiny:latest", folder="z", width=4, max_tokens=16, price=1)
    there = Catalogue((TINY, foreign, tagged))
    assert parsed(ollama.EMBED, there, model="far", input="a").truncate == "none"
    assert parsed(ollama.EMBEDDINGS, there, model="far:latest", prompt="a").truncate == "none"
    assert parsed(cohere.EMBED, there, model="far", texts=["a"]).truncate == "none"
    assert parsed(ollama.EMBED, there, model="tiny:latest", input="a").model == "tiny:latest"


def test_what_fails_once_a_request_is_parsed_is_told_in_its_own_words() -> None:
    words = '`input.1` has 9 tokens; it takes at most 5. Shorten it, or send "truncate": "end".'
    told = json.loads(tei.EMBED.envelope(ContextLengthExceeded(words, param="input.1")))
    assert told["error"] == "`inputs.1` has 9 tokens; it takes at most 5. Shorten it."
    words = 'The reply would take up to 9 bytes. Split the inputs, or ask for "encoding_format": "base64".'
    told = json.loads(cohere.EMBED.envelope(InvalidValue(words, param="input")))
    assert told == {"message": "The reply would take up to 9 bytes. Split the inputs."}


def test_cohere_gives_every_type_that_is_asked_for() -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    reply = replied(cohere.EMBED, model="tiny", texts=["a", "b"], input_type="search_query", embedding_types=kinds)
    found = reply["embeddings"]
    assert np.array(found["float"], "<f4").tobytes() == VECTORS.tobytes()
    assert [base64.b64decode(each) for each in found["base64"]] == [row.tobytes() for row in VECTORS]
    assert found["int8"] == [[64, -64, 64, 64], [76, 0, -102, 0]]
    assert found["uint8"] == [[192, 64, 192, 192], [204, 128, 26, 128]]
    assert found["ubinary"] == [[0b10110000], [0b10000000]]
    assert found["binary"] == [[0b10110000 - 128], [0]]
    assert (reply["texts"], reply["id"], reply["meta"]["billed_units"]) == (
        ["a", "b"],
        "embeddings",
        {"input_tokens": 7},
    )
    flat = replied(cohere.EMBED_V1, model="tiny", texts=["a", "b"])
    assert flat["response_type"] == "embeddings_floats" and np.array(flat["embeddings"]).shape == (2, 4)


def test_cohere_takes_inputs_for_texts_and_bounds_tokens() -> None:
    inputs = [{"content": [{"type": "text", "text": each}]} for each in ("a", "b")]
    call = parsed(cohere.EMBED, model="tiny", inputs=inputs, input_type="search_query", max_tokens=4, truncate="START")
    assert (call.texts, call.role, call.keep, call.truncate) == (["a", "b"], "query", 4, "start")


def test_tei_has_the_model_of_its_path_or_the_only_one() -> None:
    faster = msgspec.structs.replace(TINY, id="tiny:fast", tier="fast")
    assert parsed(tei.EMBED, Catalogue((TINY, faster)), inputs="a").model == "tiny"
    call = parsed(tei.EMBED, inputs="a")
    assert (call.model, call.truncate, call.normalize) == ("tiny", "none", True)
    assert parsed(tei.EMBED, TWO, "other", inputs="a", truncate=True, truncation_direction="Left").truncate == "start"
    with pytest.raises(Failure) as failed:
        parsed(tei.EMBED, TWO, inputs="a")
    assert failed.value.code == "missing_parameter" and "/tei/MODEL/embed" in failed.value.message
    assert np.array(replied(tei.EMBED, inputs=["a", "b"]), "<f4").tobytes() == VECTORS.tobytes()


def test_google_wants_requests_that_agree() -> None:
    one = {"content": {"parts": [{"text": "a"}], "role": "user"}, "model": "models/tiny", "taskType": "RETRIEVAL_QUERY"}
    call = parsed(GOOGLE_SEVERAL, named="tiny", requests=[one, one | {"content": {"parts": [{"text": "b"}]}}])
    assert (call.texts, call.role) == (["a", "b"], "query")
    with pytest.raises(Failure) as failed:
        parsed(GOOGLE_SEVERAL, named="tiny", requests=[one, one | {"taskType": "SEMANTIC_SIMILARITY"}])
    assert failed.value.param == "requests.1.taskType"
    reply = replied(GOOGLE, named="tiny", content=one["content"], outputDimensionality=2)
    assert np.linalg.norm(reply["embedding"]["values"]) == pytest.approx(1, abs=1e-6)


REFUSED = [
    (ollama.EMBED, {"input": "a"}, "missing_parameter", "model"),
    (ollama.EMBED, {"model": "tiny", "input": ["a", 1]}, "invalid_type", "input.1"),
    (ollama.EMBED, {"model": "tiny", "input": "a", "dimensions": 5}, "invalid_value", "dimensions"),
    (ollama.EMBEDDINGS, {"model": "nope", "prompt": "a"}, "model_not_found", "model"),
    (ollama.EMBEDDINGS, {"model": "tiny", "prompt": ""}, "invalid_value", "prompt"),
    (cohere.EMBED, {"model": "tiny"}, "missing_parameter", "texts"),
    (cohere.EMBED, {"model": "tiny", "texts": ["a"], "images": []}, "unknown_parameter", "images"),
    (cohere.EMBED, {"model": "tiny", "input": ["a"]}, "unknown_parameter", "input"),
    (cohere.EMBED, {"model": "tiny", "texts": ["a"], "input_type": "clustering"}, "invalid_value", "input_type"),
    (cohere.EMBED, {"model": "tiny", "texts": ["a"], "max_tokens": 17}, "invalid_value", "max_tokens"),
    (
        cohere.EMBED,
        {"model": "tiny", "texts": ["a"], "embedding_types": ["int4"]},
        "invalid_value",
        "embedding_types.0",
    ),
    (tei.EMBED, {"inputs": []}, "invalid_value", "inputs"),
    (tei.EMBED, {"inputs": "a", "prompt_name": "document"}, "invalid_value", "prompt_name"),
    (GOOGLE, {"content": {"parts": []}}, "invalid_value", "content.parts"),
    (GOOGLE, {"content": {"parts": [{"text": "a"}]}, "taskType": "CLUSTERING"}, "invalid_value", "taskType"),
]


@pytest.mark.parametrize(("dialect", "asked", "code", "param"), REFUSED)
def test_a_refusal_names_the_dialects_own_member(dialect: Adapted, asked: Any, code: str, param: str) -> None:
    with pytest.raises(Failure) as failed:
        parsed(dialect, named="tiny" if dialect in (GOOGLE, GOOGLE_SEVERAL, tei.EMBED) else None, **asked)
    assert (failed.value.code, failed.value.param) == (code, param)
    assert param.partition(".")[0] in failed.value.message
    assert "clustering" not in failed.value.message.lower(), "values of callers are not repeated"
    assert failed.value.message in json.dumps(json.loads(dialect.envelope(failed.value)), ensure_ascii=False).replace(
        '\\"', '"'
    )


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"a"', b"{", b'{"model": "tiny", "input": "\\ud800"}', b"\xff", b"[" * 99]
)
def test_what_is_no_request_at_all_is_refused(body: bytes) -> None:
    for dialect in (ollama.EMBED, cohere.EMBED, tei.EMBED, GOOGLE):
        with pytest.raises(Failure) as failed:
            dialect.parse(body, ONE, ORDINARY, named=None)
        assert failed.value.code in ("invalid_json", "invalid_type")


def test_bits_are_those_of_numpy_and_round_trip() -> None:
    rows = np.random.default_rng(1).standard_normal((3, 20)).astype("<f4")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bits = np.unpackbits(FORMS["ubinary"](rows), axis=1)
    assert (bits[:, :20] == (rows > 0)).all() and not bits[:, 20:].any()
    assert ((FORMS["binary"](rows).astype(int) + 128) == FORMS["ubinary"](rows)).all()
    assert np.abs(FORMS["int8"](rows) / 127 - rows).max() <= 0.5 / 127 + 1e-6
    assert (FORMS["uint8"](rows).astype(int) - 128 == FORMS["int8"](rows)).all()


def test_bits_are_those_of_the_examples_that_vendors_publish() -> None:
    """Voyage's documentation of `output_dtype` has this vector and these two bytes."""
    published = [
        -0.03955078,
        0.006214142,
        -0.07446289,
        -0.039001465,
        0.0046463013,
        0.00030612946,
        -0.08496094,
        0.03994751,
    ]
    row = np.array([published], "<f4")
    assert (FORMS["ubinary"](row).tolist(), FORMS["binary"](row).tolist()) == ([[77]], [[-51]])


def test_fewer_bits_are_what_vendors_define() -> None:
    """Bits as Voyage, Jina, Cohere and sentence-transformers define them: unpacked, one is a positive component."""
    rows = np.array([[0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 0.5, -0.5, 0.25]], "<f4")
    signed, unsigned = np.array(FORMS["binary"](rows), np.int8), np.array(FORMS["ubinary"](rows), np.uint8)
    for each in (unsigned, (signed.astype(np.int16) + 128).astype(np.uint8)):
        assert np.unpackbits(each, axis=1)[0].tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 1, *[0] * 7]
    # Halves go to the even number, as IEEE 754 rounds; the range is symmetric, so that -x is -x.
    assert FORMS["int8"](rows).tolist() == [[0, 0, 0, 0, 127, -127, 64, -64, 32]]
    assert FORMS["uint8"](rows).tolist() == [[128, 128, 128, 128, 255, 1, 192, 64, 160]]
