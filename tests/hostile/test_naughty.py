"""515 strings that have broken other people's programs, through the whole real endpoint.

As `input` they are texts like any other: all of them in one request, every fourth alone and in small company. Anywhere
else they are refused in the envelope, and never said back: every fourth is tried there. `make thorough` tries all.
"""

import json
from collections.abc import Sequence
from urllib.parse import quote

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.rig.http import Reply, Wire, http_request
from bench.rig.live import Live
from tests.data import outside_data, quick_or

pytestmark = [pytest.mark.model, pytest.mark.story]

WIDTH = 384
FEW = 7  # texts a request
SAME = 1e-6  # a text alone and in any batch
FREE_HEADER = "x-request-id"  # any legal value will do
EVERY = quick_or(1, quick=4)  # of the strings, but in the request that has all
NAME_CHARS_MAX = 64  # of an unknown member's name, in the refusal

Vectors = NDArray[np.float64]


@pytest.fixture(scope="module")
def strings() -> list[str]:
    found: list[str] = json.loads(outside_data("naughty_strings.json").read_bytes())
    assert len(found) == 515
    return found


@pytest.fixture(scope="module")
def texts(strings: Sequence[str]) -> list[str]:
    """Those that can be embedded: one of them is the empty string."""
    return [each for each in strings if each]


def vectors(reply: Reply) -> Vectors:
    assert reply.status == 200, reply.body
    return np.array([item["embedding"] for item in reply.json()["data"]], np.float64)


@pytest.fixture(scope="module")
def alone(live: Live, texts: Sequence[str]) -> Vectors:
    """Each text that is tried, in a request of its own. Shape (texts, width)."""
    with live.wire() as wire:
        return np.concatenate([vectors(wire.ask(live.embed({"input": text}))) for text in texts[::EVERY]])


@pytest.fixture(scope="module")
def all_at_once(live: Live, texts: Sequence[str]) -> Vectors:
    """All texts in one request. Shape (texts, width)."""
    with live.wire() as wire:
        return vectors(wire.ask(live.embed({"input": texts})))


def test_each_is_embedded(texts: Sequence[str], alone: Vectors, all_at_once: Vectors) -> None:
    for found, expected in ((alone, texts[::EVERY]), (all_at_once, texts)):
        assert found.shape == (len(expected), WIDTH)
        assert np.isfinite(found).all()
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < SAME


def test_company_changes_nothing(live: Live, texts: Sequence[str], alone: Vectors, all_at_once: Vectors) -> None:
    """Neither a few others nor all of them."""
    tried = texts[::EVERY]
    batches = [list(tried[start : start + FEW]) for start in range(0, len(tried), FEW)]
    with live.wire() as wire:
        together = np.concatenate([vectors(wire.ask(live.embed({"input": batch}))) for batch in batches])
    for found in (together, all_at_once[::EVERY]):
        assert found.shape == alone.shape
        assert np.abs(found - alone).max() <= SAME


def test_the_empty_one_is_refused(live: Live, strings: Sequence[str]) -> None:
    with live.wire() as wire:
        assert_refused(wire.ask(live.embed({"input": ""})), "", "empty_input")
        reply = wire.ask(live.embed({"input": strings}))
    assert reply.json()["error"]["param"] == f"input.{strings.index('')}"


def assert_refused(reply: Reply, sent: str, *codes: str) -> str:
    """A 4xx in the envelope. Returns its message: where it is the same for all of them, it says none of them back."""
    assert 400 <= reply.status < 500, (sent, reply)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] in codes, (sent, error)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    ("member", "codes"),
    [
        ("model", ("model_not_found",)),
        ("encoding_format", ("invalid_value",)),
        ("input_type", ("invalid_value",)),
        ("truncate", ("invalid_value",)),
        ("dimensions", ("invalid_type",)),
        ("truncation", ("invalid_type",)),
    ],
)
def test_as_another_member(live: Live, texts: Sequence[str], member: str, codes: Sequence[str]) -> None:
    messages = set()
    with live.wire() as wire:
        for text in texts[::EVERY]:
            reply = wire.ask(live.embed({"input": "a", member: text}))
            if member == "truncate" and text.lower() == "none":
                assert reply.status == 200
            else:
                messages.add(assert_refused(reply, text, *codes))
    assert len(messages) == 1


def test_as_the_user_they_are_accepted(live: Live, strings: Sequence[str]) -> None:
    """Any string is a user of the caller's: it is hashed, and neither refused nor said back."""
    with live.wire() as wire:
        for text in strings[::EVERY]:
            reply = wire.ask(live.embed({"input": "a", "user": text, "dimensions": 2}))
            assert reply.status == 200, (text, reply)


def test_as_a_member_name_only_the_short_start_is_said_back(live: Live, strings: Sequence[str]) -> None:
    with live.wire() as wire:
        for text in strings[::EVERY]:
            reply = wire.ask(live.embed({"input": "a", text: 1}))
            assert (reply.status, reply.code) == (400, "unknown_parameter")
            error = reply.json()["error"]
            assert error["param"] == (text[:NAME_CHARS_MAX] or None)
            assert len(text) <= NAME_CHARS_MAX or text[: NAME_CHARS_MAX + 1] not in error["message"]


@pytest.mark.parametrize("header", ["Authorization", "x-request-id", "Content-Type", "Content-Encoding"])
def test_as_a_header(live: Live, texts: Sequence[str], header: str) -> None:
    """The parser, or the route, refuses in the envelope; a caller's request id may be anything legal."""
    messages = set()
    for text in texts[::EVERY]:
        with live.wire() as wire:
            reply = ask_with_header(wire, live, header, text)
        if reply.status == 200:
            assert header == FREE_HEADER, text
        else:
            codes = ("invalid_value", "invalid_api_key", "unsupported_media_type")
            messages.add(assert_refused(reply, text, *codes))
    assert len(messages) <= 2  # the parser's and the route's


def ask_with_header(wire: Wire, live: Live, header: str, value: str) -> Reply:
    """A right request but for one header, whose value is sent as it is, in UTF-8."""
    body = json.dumps({"model": "all-MiniLM-L6-v2", "input": "a", "dimensions": 2}).encode()
    return wire.ask(http_request("POST", "/v1/embeddings", body, key=live.api_key, headers={header: value}))


def test_as_a_path(live: Live, texts: Sequence[str]) -> None:
    """Percent-encoded, as a model's id: 404 in the envelope."""
    messages = set()
    with live.wire() as wire:
        for text in texts[::EVERY]:
            reply = wire.ask(http_request("GET", "/v1/models/" + quote(text, safe=""), key=live.api_key))
            messages.add(assert_refused(reply, text, "model_not_found"))
    assert len(messages) == 1
