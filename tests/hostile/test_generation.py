"""Bytes that nobody planned for: a request is a Prompt or a CallerFailure, a node's reply is ours or a NodeFailure."""

import json
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.dialects.openai.members import CHAT, COMPLETIONS, IMAGES
from embedmesh.rules.errors import CallerFailure, NodeBroke, WrongAnswer
from embedmesh.rules.generation import Generating, Prompt, StreamState
from embedmesh.rules.limits import GENERATED_CHOICES_MAX
from tests.data import quick_or
from tests.dialects.generation import DIALECTS, MODELS, PNG, RIGHT, find, parsed
from tests.dialects.makes import CHAT_REPLIES, CHAT_STREAMS, TEXT_REPLIES, TEXT_STREAMS, TOOL_REPLIES, TOOL_STREAMS
from tests.dialects.test_generation_requests import ACCEPTED, REFUSED

MESSAGE_CHARS_MAX = 400  # one or two sentences, with at most a short name of the caller's in them

WORDS = (
    "user assistant tool text image_url function json_schema auto talker loose seer native painter loose-painter stop"
)
NAMES = "role content type text image_url url name tool_calls function arguments id index delta message choices usage"
MORE_NAMES = "logprobs finish_reason error object data b64_json tokens"
words = st.sampled_from([*WORDS.split(), "", "\ud800", "\x00", "1024x1024", f"data:image/png;base64,{PNG}"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), words)
inner_names = st.one_of(st.sampled_from(f"{NAMES} {MORE_NAMES}".split()), st.text(max_size=6))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(inner_names, inner, max_size=5),
    max_leaves=16,
)
MEMBERS = {"chat": CHAT, "completions": COMPLETIONS, "images": IMAGES}
ROWS = {modality: [row[1] for row in [*ACCEPTED, *REFUSED] if row[0] == modality] for modality in MEMBERS}


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


def check_request(modality: Generating, body: bytes) -> None:
    try:
        prompt, model = DIALECTS[modality].parse(body, find)
    except CallerFailure as failure:
        assert type(failure) is not CallerFailure
        assert 10 < len(failure.message) <= MESSAGE_CHARS_MAX
        assert failure.param is None or len(failure.param) <= MESSAGE_CHARS_MAX
        return
    assert modality in model.modalities
    assert 1 <= prompt.choices <= prompt.generated <= GENERATED_CHOICES_MAX
    assert prompt.output_max is None or prompt.output_max >= 1
    assert not prompt.body.keys() & {"model", "stream", "stream_options", "max_tokens", "max_completion_tokens"}
    json.dumps(prompt.body)
    assert all(type(text) is str for text in prompt.texts)


@pytest.mark.parametrize("modality", DIALECTS)
@settings(max_examples=quick_or(300, quick=50), deadline=None)
@given(data=st.data())
def test_any_request_is_a_prompt_or_the_caller_s_failure(modality: Generating, data: st.DataObject) -> None:
    names = st.sampled_from([*MEMBERS[modality]]) | st.text(max_size=80)
    members = data.draw(st.dictionaries(names, values, max_size=4))
    row = data.draw(st.sampled_from(ROWS[modality])) if data.draw(st.booleans()) else {}
    check_request(modality, dumped(RIGHT[modality] | row | members))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A right body with a piece of it cut out, repeated or replaced by anything."""
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 12)))
    return whole[:start] + draw(st.binary(max_size=8) | st.just(whole[start:end] * 2)) + whole[end:]


@pytest.mark.parametrize("modality", DIALECTS)
@settings(max_examples=quick_or(200, quick=33), deadline=None)
@given(data=st.data())
def test_a_damaged_request_is_the_caller_s_failure(modality: Generating, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS[modality]))
    check_request(modality, data.draw(damaged(dumped(RIGHT[modality] | row))))


REPLIES: dict[Generating, list[Any]] = {
    "chat": [*CHAT_REPLIES.values(), *TOOL_REPLIES.values(), *chain(*CHAT_STREAMS.values(), *TOOL_STREAMS.values())],
    "completions": [*TEXT_REPLIES.values(), *chain(*TEXT_STREAMS.values())],
    "images": [{"data": [{"b64_json": PNG}]}],
}
PROMPTS: dict[Generating, list[Prompt]] = {
    "chat": [
        parsed("chat", logprobs=True),
        parsed("chat", n=2, stream=True, stream_options={"include_usage": True}),
        parsed("chat", functions=[{"name": "f"}]),
    ],
    "completions": [parsed("completions", echo=True, logprobs=1), parsed("completions", prompt=["a", "b"])],
    "images": [parsed("images"), parsed("images", response_format="url")],
}


def check_reply(modality: Generating, prompt: Prompt, raw: bytes) -> None:
    dialect, model = DIALECTS[modality], MODELS["talker"]
    state = StreamState("req_1", 1)
    try:
        reply = dialect.whole(prompt, model, raw, "req_1", 1)
        assert len(json.loads(reply.data)["data" if modality == "images" else "choices"]) == prompt.choices
        assert b"secret" not in reply.data
    except (WrongAnswer, NodeBroke) as failure:
        assert len(failure.message) < 100
    for _ in range(2):
        try:
            piece = dialect.piece(prompt, model, raw, state)
            assert piece.data is None or json.loads(piece.data)["id"].endswith("req_1")
        except (WrongAnswer, NodeBroke) as failure:
            assert len(failure.message) < 100


@pytest.mark.parametrize("modality", DIALECTS)
@settings(max_examples=quick_or(300, quick=50), deadline=None)
@given(data=st.data())
def test_any_reply_is_ours_or_the_node_s_failure(modality: Generating, data: st.DataObject) -> None:
    prompt = data.draw(st.sampled_from(PROMPTS[modality]))
    choice = st.dictionaries(inner_names, values, max_size=5)
    reply = data.draw(
        values
        | st.fixed_dictionaries({"choices": st.lists(choice, max_size=3)}, optional={"usage": values, "error": values})
        | st.fixed_dictionaries({"data": st.lists(choice, max_size=3)})
    )
    check_reply(modality, prompt, dumped(reply))


@pytest.mark.parametrize("modality", DIALECTS)
@settings(max_examples=quick_or(300, quick=50), deadline=None)
@given(data=st.data())
def test_a_damaged_reply_is_ours_or_the_node_s_failure(modality: Generating, data: st.DataObject) -> None:
    prompt = data.draw(st.sampled_from(PROMPTS[modality]))
    raw = dumped(data.draw(st.sampled_from(REPLIES[modality])))
    check_reply(modality, prompt, data.draw(damaged(raw)) if data.draw(st.booleans()) else raw)
