"""Images by the allow-list: strict base64 of a known kind, in the form that the caller wants, and never an address."""

import json
from typing import Any

import pytest

from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.generation import Prompt, StreamState, TokenCounts, Whole
from tests.dialects.generation import DIALECTS, GIF, JPEG, MODELS, PNG, WEBP, parsed

IMAGES = DIALECTS["images"]
PAINTER = MODELS["painter"]
EITHER = parsed("images")


def whole(*data: Any, prompt: Prompt = EITHER, **members: object) -> Whole:
    reply = {"created": 5, "data": list(data)} | members
    return IMAGES.whole(prompt, PAINTER, json.dumps(reply).encode(), "req_1", 1_700_000_000)


def image(*data: Any, prompt: Prompt = EITHER) -> dict[str, str]:
    [found] = json.loads(whole(*data, prompt=prompt).data)["data"]
    made: dict[str, str] = found
    return made


def url(kind: str, encoded: str) -> str:
    return f"data:image/{kind};base64,{encoded}"


@pytest.mark.parametrize(("kind", "encoded"), [("png", PNG), ("jpeg", JPEG), ("webp", WEBP)])
@pytest.mark.parametrize("told", ["b64_json", "url", "both"])
def test_an_image_comes_in_the_form_that_is_asked_for(kind: str, encoded: str, told: str) -> None:
    said = {"b64_json": encoded} if told == "b64_json" else {"url": url("png", encoded)}
    said = {"b64_json": encoded, "url": "https://elsewhere.example/a.png"} if told == "both" else said
    as_url, as_base64 = parsed("images", response_format="url"), parsed("images", response_format="b64_json")
    assert image(said) == {"b64_json": encoded, "url": url(kind, encoded)}
    assert image(said, prompt=as_url) == {"url": url(kind, encoded)}
    assert image(said, prompt=as_base64) == {"b64_json": encoded}


def test_a_reply_has_our_time_and_what_is_allowed() -> None:
    reply = whole(
        {"b64_json": PNG, "revised_prompt": "a black cat", "seed": 7}, usage={"input_tokens": 1}, model="/srv/x"
    )
    assert json.loads(reply.data) == {
        "created": 1_700_000_000,
        "data": [{"b64_json": PNG, "url": url("png", PNG), "revised_prompt": "a black cat"}],
    }
    assert (reply.images, reply.usage, reply.text) == (1, None, "")
    assert IMAGES.with_usage(reply, TokenCounts(1, 1)) == reply.data


WRONG: dict[str, list[Any]] = {
    "an address": [{"url": "https://elsewhere.example/a.png"}],
    "an address of the inside": [{"url": "http://10.0.0.1/a.png", "b64_json": None}],
    "an address as base64": [{"b64_json": "https://elsewhere.example/a.png"}],
    "a file": [{"url": "file:///srv/a.png"}],
    "a script": [{"url": "data:text/html;base64," + PNG}],
    "another kind": [{"b64_json": GIF}],
    "markup": [{"url": "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="}],
    "no padding": [{"b64_json": JPEG.rstrip("=")}],
    "line breaks": [{"b64_json": PNG[:20] + "\n" + PNG[20:]}],
    "another alphabet": [{"b64_json": PNG[:-4] + "-_AA"}],
    "padding in the middle": [{"b64_json": PNG[:20] + "====" + PNG[20:]}],
    "bits that are none": [{"b64_json": JPEG[:-2] + "B="}],
    "another script": [{"b64_json": PNG[:-1] + "é"}],
    "nothing": [{"b64_json": ""}],
    "no image": [{}],
    "null": [{"b64_json": None, "url": None}],
    "a number": [{"b64_json": 5}],
    "a number instead of an image": [5],
    "no images": [],
    "more than asked for": [{"b64_json": PNG}] * 2,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_image_is_refused(what: str) -> None:
    with pytest.raises(WrongAnswer):
        whole(*WRONG[what])


def test_as_many_images_as_asked_for() -> None:
    prompt = parsed("images", n=3)
    assert whole(*[{"b64_json": PNG}] * 3, prompt=prompt).images == 3
    with pytest.raises(WrongAnswer):
        whole(*[{"b64_json": PNG}] * 2, prompt=prompt)


@pytest.mark.parametrize(
    "reply", [b"", b"[]", b"<html>", b'{"data":{}}', b'{"data":"a"}', b"{}", b'{"data":' + b"[" * 9_999]
)
def test_a_reply_of_another_form_is_refused(reply: bytes) -> None:
    with pytest.raises(WrongAnswer):
        IMAGES.whole(EITHER, PAINTER, reply, "req_1", 1)


def test_a_revised_prompt_without_end_is_left_out() -> None:
    assert "revised_prompt" not in image({"b64_json": PNG, "revised_prompt": "a" * 70_000})
    assert "revised_prompt" not in image({"b64_json": PNG, "revised_prompt": 5})


def test_images_have_no_stream() -> None:
    with pytest.raises(WrongAnswer):
        IMAGES.piece(EITHER, PAINTER, b"{}", StreamState("req_1", 1))
