"""Requests to generate, member by member: what is accepted and reaches the node, what is refused with which code."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from embedmesh.dialects.openai.members import CHAT, COMPLETIONS, IMAGES, request_schemas
from embedmesh.dialects.openai.messages import MESSAGES_MAX
from embedmesh.dialects.openai.shapes import NEVER_PASSED
from embedmesh.dialects.openai.tools import TOOLS_MAX
from embedmesh.rules.errors import CallerFailure
from embedmesh.rules.generation import Generating
from embedmesh.rules.limits import CONTEXT_TOKENS_MAX, GENERATED_CHOICES_MAX, IMAGES_MAX
from tests.dialects.generation import DIALECTS, GIF, JPEG, PNG, RIGHT, SAID, WEBP, body, find, function_tool, parsed

TOOL = function_tool()
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"a":1}'}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def deep(levels: int) -> dict[str, Any]:
    """An object of so many levels; a body that holds it under one name has one more."""
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def part(url: str, **members: object) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url} | members}]}


def seen(*messages: object) -> dict[str, Any]:
    return {"model": "seer", "messages": list(messages)}


PICTURE = f"data:image/png;base64,{PNG}"

REFUSED_CHAT: list[tuple[dict[str, Any], str, str | None]] = [
    # members, code, param
    ({"model": None}, "missing_parameter", "model"),
    ({"model": 5}, "invalid_type", "model"),
    ({"messages": None}, "missing_parameter", "messages"),
    ({"messages": []}, "empty_input", "messages"),
    ({"messages": "hi"}, "invalid_type", "messages"),
    ({"messages": {}}, "invalid_type", "messages"),
    ({"messages": [SAID] * (MESSAGES_MAX + 1)}, "invalid_value", "messages"),
    ({"messages": ["hi"]}, "invalid_type", "messages.0"),
    ({"messages": [SAID, None]}, "invalid_type", "messages.1"),
    ({"messages": [{"content": "hi"}]}, "missing_parameter", "messages.0.role"),
    ({"messages": [{"role": "alien", "content": "hi"}]}, "invalid_value", "messages.0.role"),
    ({"messages": [{"role": 5, "content": "hi"}]}, "invalid_type", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "missing_parameter", "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "missing_parameter", "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "empty_input", "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "invalid_type", "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing_parameter", "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "missing_parameter", "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "invalid_value", "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "odd"}]}]}, "invalid_value", "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "invalid_type", "messages.0.name"),
    ({"messages": [{"role": "user", "content": "a", "x": 5}]}, "unknown_parameter", "messages.0.x"),
    ({"messages": [ASKED | {"tool_calls": [{"type": "function"}]}]}, "missing_parameter", "messages.0.tool_calls.0.id"),
    ({"messages": [ASKED | {"tool_calls": [CALL | {"id": 5}]}]}, "invalid_type", "messages.0.tool_calls.0.id"),
    ({"messages": [ASKED | {"tool_calls": [CALL | {"type": "custom"}]}]}, "invalid_value", "messages.0.tool_calls.0"),
    (
        {"messages": [ASKED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": {}}}]}]},
        "invalid_type",
        "messages.0.tool_calls.0.function.arguments",
    ),
    ({"messages": [{"role": "tool", "content": "a"}]}, "missing_parameter", "messages.0.tool_call_id"),
    ({"messages": [{"role": "function", "content": "a"}]}, "missing_parameter", "messages.0.name"),
    (seen(part("https://example.com/a.png")), "invalid_value", "messages.0.content.0.image_url.url"),
    (seen(part("http://169.254.169.254/latest")), "invalid_value", "messages.0.content.0.image_url.url"),
    (seen(part("file:///etc/passwd")), "invalid_value", "messages.0.content.0.image_url.url"),
    (seen(part("data:text/html;base64,AAAA")), "invalid_value", "messages.0.content.0.image_url.url"),
    (seen(part(PICTURE, detail="huge")), "invalid_value", "messages.0.content.0.image_url.detail"),
    (seen({"role": "system", "content": part(PICTURE)["content"]}), "invalid_value", "messages.0.content.0.type"),
    *[
        ({name: value}, code, name)
        for name in ("max_tokens", "max_completion_tokens", "n")
        for value, code in [
            (0, "invalid_value"),
            (-1, "invalid_value"),
            (2**63, "invalid_value"),
            (10**30, "invalid_type"),
            (1.5, "invalid_type"),
            (True, "invalid_type"),
            ("1", "invalid_type"),
        ]
    ],
    ({"max_tokens": CONTEXT_TOKENS_MAX + 1}, "invalid_value", "max_tokens"),
    ({"n": GENERATED_CHOICES_MAX + 1}, "invalid_value", "n"),
    ({"stream": "true"}, "invalid_type", "stream"),
    ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "invalid_value",
        "stream_options.include_obfuscation",
    ),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"temperature": -0.1}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"temperature": True}, "invalid_type", "temperature"),
    ({"top_p": 1.1}, "invalid_value", "top_p"),
    ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": []}, "invalid_value", "stop"),
    ({"stop": 5}, "invalid_type", "stop"),
    ({"stop": {}}, "invalid_type", "stop"),
    ({"stop": ["a", 5]}, "invalid_type", "stop.1"),
    ({"stop": ["a"] * 17}, "invalid_value", "stop"),
    ({"stop": "a" * 1_025}, "invalid_value", "stop"),
    ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
    ({"logit_bias": {"5": None}}, "invalid_type", "logit_bias.5"),
    ({"logit_bias": []}, "invalid_type", "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1_025)}}, "invalid_value", "logit_bias"),
    ({"logprobs": 1}, "invalid_type", "logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "invalid_value", "top_logprobs"),
    ({"tools": {}}, "invalid_type", "tools"),
    ({"tools": [TOOL] * (TOOLS_MAX + 1)}, "invalid_value", "tools"),
    ({"tools": [{"function": {}}]}, "missing_parameter", "tools.0.type"),
    ({"tools": [{"type": "custom"}]}, "invalid_value", "tools.0"),
    ({"tools": [{"type": "web"}]}, "invalid_value", "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "missing_parameter", "tools.0.function"),
    ({"tools": [{"type": "function", "function": {}}]}, "missing_parameter", "tools.0.function.name"),
    ({"tools": [function_tool("two words")]}, "invalid_value", "tools.0.function.name"),
    ({"tools": [function_tool("a" * 65)]}, "invalid_value", "tools.0.function.name"),
    ({"tools": [function_tool(parameters=[])]}, "invalid_type", "tools.0.function.parameters"),
    ({"tools": [function_tool(strict="yes")]}, "invalid_type", "tools.0.function.strict"),
    ({"tools": [function_tool(url="http://x")]}, "unknown_parameter", "tools.0.function.url"),
    ({"tools": [TOOL], "tool_choice": "some"}, "invalid_value", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": 1}, "invalid_type", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "invalid_value", "tool_choice"),
    ({"parallel_tool_calls": "no"}, "invalid_type", "parallel_tool_calls"),
    ({"functions": []}, "invalid_value", "functions"),
    ({"response_format": "json"}, "invalid_type", "response_format"),
    ({"response_format": {}}, "missing_parameter", "response_format.type"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "missing_parameter", "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "missing_parameter",
        "response_format.json_schema.name",
    ),
    ({"reasoning_effort": "huge"}, "invalid_value", "reasoning_effort"),
    ({"verbosity": "mute"}, "invalid_value", "verbosity"),
    ({"modalities": ["text", "audio"]}, "invalid_value", "modalities"),
    ({"modalities": ["audio"]}, "invalid_value", "modalities.0"),
    ({"audio": {"voice": "x"}}, "invalid_value", "audio"),
    ({"store": True}, "invalid_value", "store"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
    ({"service_tier": "priority"}, "invalid_value", "service_tier"),
    ({"user": "u" * 513}, "invalid_value", "user"),
    ({"prediction": {}}, "invalid_value", "prediction"),
    ({"web_search_options": {}}, "invalid_value", "web_search_options"),
    ({"top_k": 5}, "unknown_parameter", "top_k"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"x" * 500: 1}, "unknown_parameter", "x" * 64),
]  # fmt: skip

ACCEPTED_CHAT: list[dict[str, Any]] = [
    {},
    {name: None for name in CHAT if name not in ("model", "messages")},
    {"messages": [SAID] * MESSAGES_MAX},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "developer", "content": ""}, SAID]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"}]},
    {"messages": [SAID, ASKED, TOLD]},
    {"messages": [SAID, {"role": "assistant", "tool_calls": [CALL]}, TOLD]},
    {"messages": [SAID, ASKED, TOLD | {"content": [{"type": "text", "text": "sunny"}]}]},
    {"messages": [SAID, {"role": "assistant", "content": "ok", "refusal": None, "annotations": [], "audio": None}]},
    {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
    {"messages": [{"role": "assistant", "refusal": "no"}]},
    {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "hm", "name": "bot"}]},
    seen(part(PICTURE)),
    seen(part(f"data:image/jpeg;base64,{JPEG}", detail="low")),
    seen(part(f"data:image/webp;base64,{WEBP}")),
    {"max_tokens": 5},
    {"max_completion_tokens": 5, "max_tokens": 5},
    {"max_completion_tokens": CONTEXT_TOKENS_MAX},
    {"n": GENERATED_CHOICES_MAX},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"stream": True, "stream_options": {}},
    {"temperature": 0, "top_p": 0.5, "presence_penalty": -2, "frequency_penalty": 2.0, "seed": -(2**63)},
    {"stop": "\n"},
    {"stop": ["a", "b"]},
    {"logit_bias": {"50256": -100, "7": 0.5}},
    {"logprobs": True, "top_logprobs": 20},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [TOOL] * TOOLS_MAX},
    {"tools": [function_tool(parameters=deep(28))]},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    {"tools": [{"type": "function", "function": {"name": "f", "description": None, "strict": None}}]},
    {"functions": [TOOL["function"]], "function_call": {"name": "get_weather"}},
    {"functions": [TOOL["function"]], "function_call": "auto"},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}},
    {"reasoning_effort": "none", "verbosity": "low", "modalities": ["text"]},
    {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u" * 512},
    {"safety_identifier": "a", "prompt_cache_key": "b"},
]  # fmt: skip

REFUSED_COMPLETIONS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": None}, "missing_parameter", "prompt"),
    ({"prompt": ""}, "empty_input", "prompt"),
    ({"prompt": []}, "empty_input", "prompt"),
    ({"prompt": ["a", ""]}, "empty_input", "prompt.1"),
    ({"prompt": ["a", 1]}, "invalid_type", "prompt.1"),
    ({"prompt": [True]}, "invalid_type", "prompt.0"),
    ({"prompt": 5}, "invalid_type", "prompt"),
    ({"model": "native", "prompt": [1, "a"]}, "invalid_type", "prompt.1"),
    ({"model": "native", "prompt": [1, -1]}, "invalid_value", "prompt.1"),
    ({"model": "native", "prompt": [2**31]}, "invalid_value", "prompt.0"),
    ({"model": "native", "prompt": [[1], []]}, "empty_input", "prompt.1"),
    ({"model": "native", "prompt": [[1], "a"]}, "invalid_type", "prompt.1"),
    ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
    ({"best_of": 0}, "invalid_value", "best_of"),
    ({"n": 129}, "invalid_value", "n"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": -1}, "invalid_value", "max_tokens"),
    ({"max_tokens": 2**63}, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": 5}, "unknown_parameter", "max_completion_tokens"),
    ({"echo": "yes"}, "invalid_type", "echo"),
    ({"suffix": 5}, "invalid_type", "suffix"),
    ({"logprobs": 6}, "invalid_value", "logprobs"),
    ({"logprobs": True}, "invalid_type", "logprobs"),
    ({"messages": []}, "unknown_parameter", "messages"),
]
ACCEPTED_COMPLETIONS: list[dict[str, Any]] = [
    {},
    {name: None for name in COMPLETIONS if name not in ("model", "prompt")},
    {"prompt": ["a", "b"], "n": 2, "best_of": 3, "echo": True, "suffix": "end", "logprobs": 5, "max_tokens": 7},
    {"model": "native", "prompt": [1, 2, 3]},
    {"model": "native", "prompt": [[1, 2], [3]]},
    {"prompt": ["a"] * 128},
    {"stream": True, "stream_options": {"include_usage": False}, "best_of": 1},
    {"stop": ["a"] * 16, "seed": 1, "user": "u", "temperature": 2, "logit_bias": {"1": 1}},
]

REFUSED_IMAGES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": None}, "missing_parameter", "model"),
    ({"prompt": None}, "missing_parameter", "prompt"),
    ({"prompt": ""}, "empty_input", "prompt"),
    ({"prompt": ["a"]}, "invalid_type", "prompt"),
    ({"prompt": "a" * 32_001}, "invalid_value", "prompt"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": IMAGES_MAX + 1}, "invalid_value", "n"),
    ({"n": "2"}, "invalid_type", "n"),
    ({"size": 5}, "invalid_type", "size"),
    ({"quality": "best"}, "invalid_value", "quality"),
    ({"style": "odd"}, "invalid_value", "style"),
    ({"response_format": "png"}, "invalid_value", "response_format"),
    ({"stream": True}, "invalid_value", "stream"),
    ({"user": 5}, "invalid_type", "user"),
    ({"background": "auto"}, "unknown_parameter", "background"),
]
ACCEPTED_IMAGES: list[dict[str, Any]] = [
    {},
    {name: None for name in IMAGES if name not in ("model", "prompt")},
    {"n": IMAGES_MAX, "size": "512x512", "quality": "hd", "style": "vivid", "response_format": "b64_json"},
    {"size": "auto", "response_format": "url", "user": "u", "stream": False},
]

REFUSED_BEYOND_SCHEMA: list[tuple[Generating, dict[str, Any], str, str | None]] = [
    # what members say together, what a model takes, what is in an image
    ("chat", {"n": 1.0}, "invalid_type", "n"),  # to a schema, an integer
    ("chat", {"model": "gpt-4"}, "model_not_found", "model"),
    ("chat", {"model": "embedder"}, "unsupported_modality", "model"),
    ("chat", {"model": "painter"}, "unsupported_modality", "model"),
    ("chat", {"messages": [part(PICTURE)]}, "invalid_value", "messages.0.content.0"),  # this model takes no images
    ("chat", {"messages": [{"role": "assistant", "content": None}]}, "missing_parameter", "messages.0.content"),
    ("chat", {"messages": [{"role": "assistant"}]}, "missing_parameter", "messages.0.content"),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": []}]}, "missing_parameter", "messages.0.content"),
    ("chat", seen(part("data:image/png;base64,AAAA")), "invalid_value", "messages.0.content.0.image_url.url"),
    ("chat", seen(part(PICTURE + "\n")), "invalid_value", "messages.0.content.0.image_url.url"),
    ("chat", seen(part(PICTURE[:-1])), "invalid_value", "messages.0.content.0.image_url.url"),
    ("chat", seen(part(f"data:image/gif;base64,{GIF}")), "invalid_value", "messages.0.content.0.image_url.url"),
    ("chat", seen(*[part(PICTURE)] * 65), "invalid_value", "messages.64.content.0"),
    ("chat", {"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
    ("chat", {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ("chat", {"stream": False, "stream_options": {}}, "invalid_value", "stream_options"),
    ("chat", {"top_logprobs": 1}, "invalid_value", "top_logprobs"),
    ("chat", {"top_logprobs": 1, "logprobs": False}, "invalid_value", "top_logprobs"),
    ("chat", {"tools": [function_tool(parameters=deep(29))]}, "invalid_json", None),
    ("chat", {"model": "loose", "extra": deep(32)}, "invalid_json", None),
    ("chat", {"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ("chat", {"tools": [], "tool_choice": "required"}, "invalid_value", "tool_choice"),
    (
        "chat",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "invalid_value",
        "tool_choice.function.name",
    ),
    ("chat", {"functions": [TOOL["function"]], "tools": [TOOL]}, "invalid_value", "functions"),
    (
        "chat",
        {"functions": [TOOL["function"]], "function_call": {"name": "other"}},
        "invalid_value",
        "function_call.name",
    ),
    ("chat", {"function_call": {"name": "f"}}, "invalid_value", "function_call"),
    ("completions", {"model": "painter"}, "unsupported_modality", "model"),
    ("completions", {"model": "seer"}, "unsupported_modality", "model"),
    ("completions", {"prompt": [1, 2]}, "invalid_value", "prompt"),  # nobody has said of which vocabulary
    ("completions", {"prompt": ["a"] * 65, "n": 2}, "invalid_value", "n"),
    ("completions", {"prompt": ["a"] * 65, "best_of": 2}, "invalid_value", "best_of"),
    ("completions", {"n": 2, "best_of": 1}, "invalid_value", "best_of"),
    ("completions", {"best_of": 2, "stream": True}, "invalid_value", "best_of"),
    ("completions", {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ("images", {"model": "talker"}, "unsupported_modality", "model"),
    ("images", {"size": "1x1"}, "invalid_value", "size"),
]  # fmt: skip
REFUSED: list[tuple[Generating, dict[str, Any], str, str | None]] = [
    *[("chat", *row) for row in REFUSED_CHAT],
    *[("completions", *row) for row in REFUSED_COMPLETIONS],
    *[("images", *row) for row in REFUSED_IMAGES],
]
ACCEPTED: list[tuple[Generating, dict[str, Any]]] = [
    *[("chat", row) for row in ACCEPTED_CHAT],
    *[("completions", row) for row in ACCEPTED_COMPLETIONS],
    *[("images", row) for row in ACCEPTED_IMAGES],
]
SCHEMAS = dict(zip(("chat", "completions", "images"), request_schemas().values(), strict=True))


def name_of(value: object) -> str | None:
    return json.dumps(value)[:50] if isinstance(value, dict) else None


@pytest.mark.parametrize(("modality", "members", "code", "param"), REFUSED + REFUSED_BEYOND_SCHEMA, ids=name_of)
def test_what_is_refused_names_the_member(
    modality: Generating, members: dict[str, Any], code: str, param: str | None
) -> None:
    with pytest.raises(CallerFailure) as refused:
        parsed(modality, **members)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert 10 < len(refused.value.message) <= 400


@pytest.mark.parametrize(("modality", "members"), ACCEPTED, ids=name_of)
def test_what_is_accepted_reaches_the_node_anew(modality: Generating, members: dict[str, Any]) -> None:
    """All that is not ours to understand, under its own name; never the members that the flow writes."""
    prompt = parsed(modality, **members)
    ours = {"model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "user", "metadata"}
    assert not prompt.body.keys() & ours
    assert all(value is not None for value in prompt.body.values())
    json.dumps(prompt.body, allow_nan=False)


@pytest.mark.parametrize(("modality", "members"), ACCEPTED, ids=name_of)
def test_the_schema_accepts_what_is_accepted(modality: Generating, members: dict[str, Any]) -> None:
    Draft202012Validator(SCHEMAS[modality]).validate(RIGHT[modality] | members)


@pytest.mark.parametrize(("modality", "members", "code", "param"), REFUSED, ids=name_of)
def test_the_schema_refuses_what_a_member_alone_must_not_say(
    modality: Generating, members: dict[str, Any], code: str, param: str | None
) -> None:
    assert not Draft202012Validator(SCHEMAS[modality]).is_valid(RIGHT[modality] | members)


def test_every_schema_is_one_and_documents_every_member() -> None:
    for schema, members in zip(request_schemas().values(), (CHAT, COMPLETIONS, IMAGES), strict=True):
        Draft202012Validator.check_schema(schema)
        assert list(schema["properties"]) == list(members)
        assert all(member["description"] for member in schema["properties"].values())


@pytest.mark.parametrize("modality", DIALECTS)
@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"\xff", "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b"null", "invalid_type", None),
        (b"{}", "missing_parameter", "model"),
        (b'{"model":"talker","temperature":NaN}', "invalid_json", None),
        (b'{"model":"\\ud800"}', "invalid_json", "model"),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json", None),
        (b'{"model":"talker","x":[' + b"{}," * 200_000 + b"{}]}", "invalid_value", None),
        (b'{"model":"talker","x":[' + b'"",' * 200_000 + b'""]}', "invalid_value", None),
        (b'{"model":"talker","x":[' + b"1," * 400_000 + b"1]}", "invalid_value", None),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_body_that_is_no_request(modality: Generating, raw: bytes, code: str, param: str | None) -> None:
    with pytest.raises(CallerFailure) as refused:
        DIALECTS[modality].parse(raw, find)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_broken_text_deep_in_a_message_is_placed() -> None:
    raw = b'{"model":"talker","messages":[{"role":"user","content":[{"type":"text","text":"] } \\\\ \\" \\ud800"}]}]}'
    with pytest.raises(CallerFailure) as refused:
        DIALECTS["chat"].parse(raw, find)
    assert refused.value.param == "messages.0.content.0.text"


# -- what a prompt says ------------------------------------------------------------------------------------------------


def test_all_that_reaches_the_template_is_in_the_texts() -> None:
    """Contents, names, ids, calls and their arguments, tools, the schema of the answer, and members passed on."""
    tools = [function_tool("tool-name", description="tool-words", parameters={"parameter": {"enum": ["schema-word"]}})]
    form = {"type": "json_schema", "json_schema": {"name": "form-name", "schema": {"title": "form-word"}}}
    called = {"id": "call-id", "type": "function", "function": {"name": "called-name", "arguments": '{"argument": 1}'}}
    messages = [
        {"role": "system", "content": "system-words", "name": "system-name"},
        {"role": "user", "content": [{"type": "text", "text": "part-words"}], "cache": "message-extra"},
        {"role": "assistant", "content": None, "tool_calls": [called], "reasoning": "reasoned"},
        {"role": "tool", "content": "tool-answer", "tool_call_id": "answered-id"},
        {"role": "assistant", "content": "x", "refusal": "refused-words"},
    ]
    prompt = parsed("chat", model="loose", messages=messages, tools=tools, response_format=form, extra={"a": "passed"})
    text = "\n".join(prompt.texts)
    written = "tool-name tool-words parameter schema-word form-name form-word call-id called-name argument system-words"
    more = "system-name part-words message-extra reasoned tool-answer answered-id refused-words passed"
    assert [words for words in f"{written} {more}".split() if words not in text] == []
    assert prompt.messages == 5


def test_the_length_of_texts_bounds_what_the_node_gets() -> None:
    """No string of the request is missing: the texts are as long as all the strings of the messages."""
    prompt = parsed("chat", messages=[{"role": "user", "content": "ab" * 500}, SAID])
    assert sum(map(len, prompt.texts)) == 1_002


def test_images_are_counted_and_sent_as_they_came() -> None:
    prompt = parsed("chat", **seen(part(PICTURE), part(PICTURE)))
    assert prompt.images == 2
    assert prompt.body["messages"][0]["content"][0]["image_url"]["url"] == PICTURE
    assert prompt.texts == ()


@pytest.mark.parametrize(
    ("members", "limit"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
    ],
)
def test_the_output_limit_is_written_in_the_word_that_all_nodes_read(
    members: dict[str, Any], limit: int | None
) -> None:
    prompt = parsed("chat", **members)
    assert (prompt.output_max, prompt.limits) == (limit, ("max_tokens",))


@pytest.mark.parametrize(
    ("members", "choices", "generated", "ids"),
    [
        ({}, 1, 1, 0),
        ({"prompt": ["a", "b", "c"]}, 3, 3, 0),
        ({"prompt": ["a", "b"], "n": 2}, 4, 4, 0),
        ({"prompt": ["a", "b"], "n": 2, "best_of": 5}, 4, 10, 0),
        ({"best_of": 5}, 1, 5, 0),
        ({"model": "native", "prompt": [1, 2, 3], "n": 2}, 2, 2, 3),
        ({"model": "native", "prompt": [[1, 2], [3]]}, 2, 2, 3),
    ],
)
def test_answers_of_completions(members: dict[str, Any], choices: int, generated: int, ids: int) -> None:
    prompt = parsed("completions", **members)
    assert (prompt.choices, prompt.generated, prompt.ids) == (choices, generated, ids)


@pytest.mark.parametrize("include", [True, False])
def test_a_stream_says_whether_its_usage_is_wanted(include: bool) -> None:
    prompt = parsed("chat", stream=True, stream_options={"include_usage": include})
    assert (prompt.stream, prompt.wants_usage) == (True, include)


def test_images_are_asked_of_the_node_as_base64_in_the_model_s_own_size() -> None:
    prompt = parsed("images", response_format="url")
    assert prompt.body == {"prompt": "a cat", "n": 1, "size": "1024x1024", "response_format": "b64_json"}
    assert (prompt.size, prompt.images, prompt.choices, prompt.limits) == ("1024x1024", 1, 1, ())
    assert parsed("images", size="512x512", n=3).images == 3


def test_members_that_change_nothing_are_named() -> None:
    prompt = parsed("chat", metadata={"a": "b"}, store=False, service_tier="auto", user="ann")
    assert prompt.ignored == ("metadata", "store", "service_tier")
    assert prompt.user == "ann"


def test_members_that_are_not_known_reach_only_the_nodes_of_a_model_that_passes_them() -> None:
    assert parsed("chat", model="loose", top_k=5, chat_template_kwargs={"a": [1]}).body["top_k"] == 5
    assert parsed("images", model="loose-painter", steps=4).body["steps"] == 4


@pytest.mark.parametrize("name", sorted(NEVER_PASSED - {"best_of"} - CHAT.keys()))
def test_what_no_model_passes(name: str) -> None:
    """Nobody gets more output than is held for, a place before others, or a call of an address through a node."""
    with pytest.raises(CallerFailure) as refused:
        parsed("chat", model="loose", **{name: 1})
    assert refused.value.code == "unknown_parameter"


def test_reserved_names_cannot_be_passed_around_the_tables() -> None:
    """A name that is known is checked by its own shape, whatever the model passes."""
    with pytest.raises(CallerFailure):
        parsed("chat", model="loose", max_tokens=-1)
    with pytest.raises(CallerFailure):
        parsed("chat", model="loose", audio={"voice": "x"})


def test_a_near_miss_is_named() -> None:
    with pytest.raises(CallerFailure, match="`temperature`"):
        parsed("chat", temprature=1)


def test_what_a_model_does_is_said() -> None:
    with pytest.raises(CallerFailure, match="/v1/images/generations"):
        parsed("chat", model="painter")
    with pytest.raises(CallerFailure, match="/v1/embeddings"):
        parsed("images", model="embedder")


# -- functions, the older form of tools --------------------------------------------------------------------------------


def test_functions_are_tools_to_the_node() -> None:
    function = TOOL["function"]
    messages = [
        SAID,
        {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    sent = parsed("chat", messages=messages, functions=[function], function_call={"name": "get_weather"}).body
    assert sent["tools"] == [TOOL]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    assert sent["parallel_tool_calls"] is False
    assert not sent.keys() & {"functions", "function_call"}
    assert sent["messages"][1]["tool_calls"][0]["id"] == sent["messages"][2]["tool_call_id"]
    assert sent["messages"][2]["role"] == "tool"
    assert "function_call" not in sent["messages"][1]


def test_a_raw_body_is_never_sent_on() -> None:
    """Of a member that is there twice the node gets what was checked."""
    raw = body("chat")[:-1] + b',"temperature":99,"temperature":1}'
    prompt, _ = DIALECTS["chat"].parse(raw, find)
    assert prompt.body["temperature"] == 1
