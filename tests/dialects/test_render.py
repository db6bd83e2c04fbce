"""The reply says the same numbers in either encoding, and its shortened vectors have unit length."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.dialects.openai.render import render, reply_bytes_max, shorten, to_unit_length
from embedmesh.rules.embeddings import Call, Counted, Encoding
from embedmesh.rules.forwarding import Answer, Share
from tests.flow.world import vector_for

IDS = [[1, 2], [3]]
RAW = [vector_for(ids).tobytes() for ids in IDS]
ANSWER = Answer(b"".join(RAW), 4, 7, (Share("n0", 7),))
COUNTED = Counted(lengths=[4, 3], ids=IDS, truncated=1)


def vectors(call: Call) -> list[np.ndarray]:
    body = json.loads(render(call, COUNTED.truncated, ANSWER, {}).body)
    assert body["object"] == "list"
    assert body["model"] == call.model
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert {item["object"] for item in body["data"]} == {"embedding"}
    found = [item["embedding"] for item in body["data"]]
    if call.encoding == "base64":
        return [np.frombuffer(base64.b64decode(each), "<f4") for each in found]
    return [np.array(each, "<f4") for each in found]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_vectors_are_the_nodes_to_the_bit(encoding: Encoding) -> None:
    for vector, raw in zip(vectors(Call("tiny", texts=["a"], encoding=encoding)), RAW, strict=True):
        assert vector.tobytes() == raw


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_shortened_vectors_are_the_first_components_at_unit_length(encoding: Encoding, dimensions: int) -> None:
    for vector, raw in zip(
        vectors(Call("tiny", texts=["a"], encoding=encoding, dimensions=dimensions)), RAW, strict=True
    ):
        head = np.frombuffer(raw, "<f4")[:dimensions].astype(np.float64)
        assert vector == pytest.approx(head / np.linalg.norm(head), abs=1e-7)
        assert np.linalg.norm(vector.astype(np.float64)) == pytest.approx(1, abs=1e-6)


def test_the_full_width_is_left_as_it_is() -> None:
    for vector, raw in zip(vectors(Call("tiny", texts=["a"], dimensions=4)), RAW, strict=True):
        assert vector.tobytes() == raw


def test_headers_tell_cuts_beside_those_that_are_handed_in() -> None:
    headers = render(Call("tiny", texts=["a"]), COUNTED.truncated, ANSWER, {"x": "y"}).headers
    assert headers == {"x": "y", "x-embedmesh-truncated": "1"}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
def test_floats_are_the_shortest_decimals_that_give_back_the_same_float32(components: list[float]) -> None:
    vector = np.array(components, "<f4")
    answer = Answer(vector.tobytes(), 4, 3, (Share("n0", 3),))
    body = render(Call("tiny", texts=["a"]), 0, answer, {}).body
    printed = body.split(b'"embedding":[')[1].split(b"]")[0].split(b",")
    for text, component in zip(printed, vector, strict=True):
        assert np.float32(float(text)).tobytes() == component.tobytes()
        assert len(text.lstrip(b"-").replace(b".", b"").split(b"e")[0].strip(b"0")) <= 9


def test_a_vector_that_starts_with_zeros_stays_finite() -> None:
    matrix = np.array([[0, 0, 1, 0]], "<f4")
    assert shorten(matrix, 2).tolist() == [[0, 0]]


EDGES = np.array([-1.1754944e-38, -1.4e-45, -3.4028235e38, -0.12345679, 0.0, -1.0000001], "<f4")


@given(st.binary(min_size=4, max_size=64), st.integers(1, 40), st.sampled_from(["float", "base64"]), st.booleans())
def test_no_reply_is_larger_than_was_reckoned_before_its_work(
    raw: bytes, inputs: int, encoding: Encoding, cut: bool
) -> None:
    """Whatever finite components it has; its vectors counted in."""
    found = np.frombuffer(raw[: len(raw) // 4 * 4], "<f4")
    row = np.concatenate([EDGES, found[np.isfinite(found)]])
    call = Call("m", texts=["a"] * inputs, encoding=encoding, dimensions=len(row) - 1 if cut else None)
    data = row.tobytes() * inputs
    reply = render(call, 0, Answer(data, len(row), 2**40, ()), {})
    assert len(reply.body) + len(data) <= reply_bytes_max(call, len(row))


@pytest.mark.parametrize(("encoding", "times"), [("float", 1.25), ("base64", 1.1)])
def test_what_is_reckoned_is_not_much_more_than_a_large_reply_takes(encoding: Encoding, times: float) -> None:
    row = np.random.default_rng(1).standard_normal(384)
    data = (row / np.linalg.norm(row)).astype("<f4").tobytes() * 2_000
    call = Call("m", texts=["a"] * 2_000, encoding=encoding)
    taken = len(render(call, 0, Answer(data, 384, 6_000, ()), {}).body) + len(data)
    assert taken <= reply_bytes_max(call, 384) <= times * taken


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_normal_vectors_stay_as_they_are_to_the_bit(encoding: Encoding) -> None:
    for vector, raw in zip(vectors(Call("tiny", texts=["a"], encoding=encoding, normalize=True)), RAW, strict=True):
        assert vector.tobytes() == raw


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=4, max_size=4), st.integers(0, 99))
def test_others_are_scaled_to_unit_length(row: list[float], number: int) -> None:
    matrix = np.array([row, vector_for([number]), [0.0] * 4], "<f4")
    scaled = to_unit_length(matrix)
    assert scaled[1].tobytes() == matrix[1].tobytes()
    assert not scaled[2].any()
    length = np.linalg.norm(matrix[0].astype(np.float64))
    if length:
        assert np.linalg.norm(scaled[0].astype(np.float64)) == pytest.approx(1, abs=2e-6)
        assert scaled[0] == pytest.approx(matrix[0] / length, abs=2e-6)


def test_what_was_ignored_is_named_and_nothing_where_nothing_was() -> None:
    headers = render(Call("tiny", texts=["a"], ignored=("timeout", "user_note")), 0, ANSWER, {}).headers
    assert headers["x-embedmesh-ignored"] == "timeout,user_note"
    assert "x-embedmesh-ignored" not in render(Call("tiny", texts=["a"]), 0, ANSWER, {}).headers
