"""What the SDKs really send is parsed, and what is replied is what they read: openai and atoma-sdk, over no socket."""

import json
from collections.abc import Iterable
from typing import Any

import atoma_sdk
import httpx
import pytest
from openai import OpenAI
from openai.types import Completion, ImagesResponse
from openai.types import completion_create_params as completion_params
from openai.types import image_generate_params as image_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from embedmesh.dialects.openai.members import CHAT, COMPLETIONS, IMAGES
from embedmesh.rules.generation import Generating, Prompt, StreamState, TokenCounts
from tests.dialects.generation import DIALECTS, JPEG, PNG, find, function_tool
from tests.dialects.makes import (
    CALLS,
    CHAT_REPLIES,
    CHAT_STREAMS,
    TEXT,
    TEXT_REPLIES,
    TEXT_STREAMS,
    TOOL_REPLIES,
    TOOL_STREAMS,
    answer,
)

MEMBERS = {"chat": CHAT, "completions": COMPLETIONS, "images": IMAGES}
PATHS: dict[str, Generating] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/images/generations": "images",
}


class Server:
    """Parses requests with the dialects, and answers with what a node has sent, written by them anew."""

    def __init__(self, reply: object) -> None:
        self.reply = reply
        self.prompts: list[Prompt] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        dialect = DIALECTS[PATHS[request.url.path]]
        prompt, model = dialect.parse(request.content, find)
        self.prompts.append(prompt)
        if not prompt.stream:
            whole = dialect.whole(prompt, model, json.dumps(self.reply).encode(), "req_1", 1_700_000_000)
            return httpx.Response(200, content=whole.data, headers={"content-type": "application/json"})
        assert isinstance(self.reply, list)
        state = StreamState("req_1", 1_700_000_000)
        pieces = [dialect.piece(prompt, model, json.dumps(event).encode(), state) for event in self.reply]
        events = [piece.data for piece in pieces if piece.data is not None]
        if prompt.wants_usage:
            events.append(dialect.usage_event(prompt, model, TokenCounts(9, 4), state))
        events.append(b"[DONE]")
        content = b"".join(b"data: " + event + b"\n\n" for event in events)
        return httpx.Response(200, content=content, headers={"content-type": "text/event-stream"})


def client_of(reply: object) -> tuple[OpenAI, Server]:
    server = Server(reply)
    http = httpx.Client(transport=httpx.MockTransport(server))
    return OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http, max_retries=0), server  # type: ignore[arg-type]


def strict(kind: type[BaseModel], found: BaseModel) -> None:
    """The SDK builds its models without a check; here they are checked."""
    kind.model_validate(found.model_dump(exclude_unset=True), strict=True)


HI: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = function_tool()


@pytest.mark.parametrize("make", CHAT_REPLIES)
def test_openai_chats(make: str) -> None:
    client, server = client_of(CHAT_REPLIES[make])
    found = client.chat.completions.create(model="talker", messages=HI, temperature=0.5, max_completion_tokens=9)
    strict(ChatCompletion, found)
    assert (found.choices[0].message.content, found.model) == (TEXT, "talker")
    assert found.usage is not None and found.usage.total_tokens == 13
    assert server.prompts[0].output_max == 9


@pytest.mark.parametrize("make", CHAT_STREAMS)
def test_openai_streams(make: str) -> None:
    client, _ = client_of(CHAT_STREAMS[make])
    usage: Any = {"include_usage": True}
    text = ""
    last = None
    for last in client.chat.completions.create(model="talker", messages=HI, stream=True, stream_options=usage):
        strict(ChatCompletionChunk, last)
        text += last.choices[0].delta.content or "" if last.choices else ""
    assert text == TEXT
    assert last is not None and last.choices == [] and last.usage is not None and last.usage.total_tokens == 13


@pytest.mark.parametrize("make", TOOL_REPLIES)
def test_openai_reads_calls_of_tools_and_sends_them_back(make: str) -> None:
    client, server = client_of(TOOL_REPLIES[make])
    found = client.chat.completions.create(model="talker", messages=HI, tools=[TOOL], tool_choice="auto")
    strict(ChatCompletion, found)
    message = found.choices[0].message
    assert message.tool_calls is not None
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    history: Any = [*HI, message, *results]
    client.chat.completions.create(model="talker", messages=history, tools=[TOOL])
    sent = server.prompts[1].body["messages"][1]["tool_calls"]
    assert [(each["function"]["name"], each["function"]["arguments"]) for each in sent] == list(CALLS)


@pytest.mark.parametrize("make", TOOL_STREAMS)
def test_openai_puts_streamed_calls_together(make: str) -> None:
    """Its own helper does, which is strict about indices, ids and types."""
    client, _ = client_of([*TOOL_STREAMS[make]])
    tools: Any = [TOOL, function_tool("get_time")]
    with client.chat.completions.stream(model="talker", messages=HI, tools=tools) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    called = [(call.function.name, call.function.arguments) for call in message.tool_calls]
    assert called == list(CALLS)


class Weather(BaseModel):
    city: str


def test_openai_parses_an_answer_by_a_schema() -> None:
    client, server = client_of(answer({"role": "assistant", "content": '{"city":"Bern"}'}))
    found = client.chat.completions.parse(model="talker", messages=HI, response_format=Weather)
    assert found.choices[0].message.parsed == Weather(city="Bern")
    assert server.prompts[0].body["response_format"]["json_schema"]["strict"] is True


def test_openai_sends_images_and_a_message_with_reasoning_back() -> None:
    client, server = client_of(answer({"content": "a cat", "reasoning": "hm"}))
    parts: Any = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{JPEG}"}}]
    asked: Any = [{"role": "user", "content": [{"type": "text", "text": "what?"}, *parts]}]
    message = client.chat.completions.create(model="seer", messages=asked).choices[0].message
    again: Any = [*asked, message.to_dict()]
    client.chat.completions.create(model="seer", messages=again)
    assert server.prompts[1].images == 1
    assert server.prompts[1].body["messages"][1]["reasoning_content"] == "hm"


@pytest.mark.parametrize("make", TEXT_REPLIES)
def test_openai_completes(make: str) -> None:
    client, _ = client_of(TEXT_REPLIES[make])
    found = client.completions.create(model="talker", prompt="hi", max_tokens=9)
    strict(Completion, found)
    assert found.choices[0].text == TEXT


@pytest.mark.parametrize("make", TEXT_STREAMS)
def test_openai_streams_completions(make: str) -> None:
    client, _ = client_of(TEXT_STREAMS[make])
    text = ""
    for event in client.completions.create(model="talker", prompt="hi", stream=True):
        text += event.choices[0].text
    assert text == TEXT


def test_openai_makes_images() -> None:
    client, _ = client_of({"data": [{"b64_json": PNG}]})
    found = client.images.generate(model="painter", prompt="a cat")
    strict(ImagesResponse, found)
    assert found.data is not None
    assert (found.data[0].b64_json, found.data[0].url) == (PNG, f"data:image/png;base64,{PNG}")


@pytest.mark.parametrize("make", ["OpenAI", "llama.cpp, which repeats id and name"])
def test_openai_reads_the_older_functions(make: str) -> None:
    client, _ = client_of(TOOL_STREAMS[make])
    name = arguments = ""
    functions: Any = [TOOL["function"]]
    for event in client.chat.completions.create(model="talker", messages=HI, functions=functions, stream=True):
        function = event.choices[0].delta.function_call
        name += (function and function.name) or ""
        arguments += (function and function.arguments) or ""
    assert (name, arguments) == CALLS[0]


# -- atoma-sdk ---------------------------------------------------------------------------------------------------------


def atoma(reply: object) -> atoma_sdk.AtomaSDK:
    http = httpx.Client(transport=httpx.MockTransport(Server(reply)))
    return atoma_sdk.AtomaSDK(bearer_auth="k", server_url="http://gateway", client=http)


@pytest.mark.parametrize("make", CHAT_REPLIES)
def test_atoma_chats(make: str) -> None:
    found = atoma(CHAT_REPLIES[make]).chat.create(model="talker", messages=HI)
    assert found.choices[0].message.content == TEXT
    assert found.usage and found.usage.completion_tokens == 4


@pytest.mark.parametrize("make", CHAT_STREAMS)
def test_atoma_streams(make: str) -> None:
    found: Iterable[Any] = atoma(CHAT_STREAMS[make]).chat.create_stream(model="talker", messages=HI)
    assert "".join(event.data.choices[0].delta.content or "" for event in found) == TEXT


def test_atoma_makes_images() -> None:
    found = atoma({"data": [{"b64_json": PNG}]}).images.generate(model="painter", prompt="a cat")
    assert found.data[0].url == f"data:image/png;base64,{PNG}"


NOT_OURS = {  # of images of OpenAI's own models, and of animations; refused as unknown
    *("background", "complexity", "frame_count", "frame_duration_ms", "moderation", "output_compression"),
    *("output_format", "partial_images", "safety_identifier", "svg"),
}


@pytest.mark.parametrize(
    ("modality", "declared"),
    [
        ("chat", chat_params.CompletionCreateParamsBase),
        ("completions", completion_params.CompletionCreateParamsBase),
        ("images", image_params.ImageGenerateParamsBase),
    ],
)
def test_every_member_that_the_sdk_declares_is_known(modality: Generating, declared: type) -> None:
    """It is taken, or refused in words of its own."""
    unknown = set(declared.__annotations__) - set(MEMBERS[modality])
    assert unknown == (NOT_OURS if modality == "images" else set())
