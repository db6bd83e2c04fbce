"""Chat, completions and images by the clients that people have, unmodified: openai and atoma-sdk, Python and Node."""

import asyncio
import base64
import json
import os
import pty
import select
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from atoma_sdk import AtomaSDK
from atoma_sdk.models import APIError, ChatCompletionMessageTypedDict, CompletionUsage
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from bench.faultnode import speech
from bench.faultnode.speech import CALLS, PROMPT_TOKENS, TOKENS
from tests.story.endpoint import COMMAND, MODEL, run, wait_until
from tests.story.generating import (
    CHARGED,
    CHAT,
    FRAIL,
    LARGE,
    OLD,
    PAINTER,
    PAIR,
    SAID,
    SMALL,
    Generating,
    asking,
)
from tests.story.npm import script

NPM_PACE_S = 0.03  # atoma-sdk for npm loses events that come close together: 20 ms and more is safe
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": each.name, "parameters": {"type": "object", "properties": {}}}}
    for each in CALLS
]


def words(order: str = "") -> list[ChatCompletionMessageParam]:
    messages: list[ChatCompletionMessageParam] = asking(order)["messages"]
    return messages


@pytest.fixture(scope="module")
def client(speaking: Generating) -> Iterator[OpenAI]:
    with OpenAI(base_url=speaking.endpoint.base_url, api_key=speaking.endpoint.api_key, max_retries=0) as made:
        yield made


# -- openai, Python ----------------------------------------------------------------------------------------------------


def test_chat(client: OpenAI, speaking: Generating) -> None:
    raw = client.chat.completions.with_raw_response.create(model=CHAT, messages=words())
    reply = raw.parse()
    (choice,) = reply.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (SAID, "assistant", "stop")
    assert reply.usage is not None and reply.model == CHAT
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (PROMPT_TOKENS, TOKENS)
    assert int(raw.headers["x-embedmesh-cost-nanousd"]) == CHARGED
    charge = speaking.charge(reply.id)
    assert charge is not None and charge.cost == CHARGED


@pytest.mark.parametrize("order", ["", "comments", "crlf", "no-done", "at-once"])
def test_chat_in_a_stream(client: OpenAI, speaking: Generating, order: str) -> None:
    events = list(
        client.chat.completions.create(
            model=CHAT, messages=words(order), stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(each.choices[0].delta.content or "" for each in events if each.choices) == SAID
    assert [each.usage for each in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].choices == [] and events[-1].usage is not None
    assert events[-1].usage.completion_tokens == TOKENS
    charge = speaking.charge(events[0].id)
    assert charge is not None and charge.cost == CHARGED


async def test_async(speaking: Generating) -> None:
    """Twenty streams and whole answers at one time."""
    endpoint = speaking.endpoint
    async with AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:

        async def one(number: int) -> tuple[str, str | None]:
            if number % 2:
                reply = await client.chat.completions.create(model=CHAT, messages=words())
                return reply.id, reply.choices[0].message.content
            stream = await client.chat.completions.create(model=CHAT, messages=words(), stream=True)
            events = [each async for each in stream]
            return events[0].id, "".join([each.choices[0].delta.content or "" for each in events])

        answers = await asyncio.gather(*map(one, range(20)))
    assert [said for _, said in answers] == [SAID] * 20
    charges = [speaking.charge(answer_id) for answer_id, _ in answers]
    assert [each and each.cost for each in charges] == [CHARGED] * 20


def test_tools(client: OpenAI) -> None:
    """A call and its result travel there and back; several calls in a stream are put together by the client itself."""
    reply = client.chat.completions.create(model=CHAT, messages=words("tools"), tools=TOOLS, tool_choice="auto")
    message = reply.choices[0].message
    assert message.content is None and reply.choices[0].finish_reason == "tool_calls"
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls or ()
    ]
    history: list[Any] = [*words(), message.model_dump(exclude_unset=True), *results]
    assert client.chat.completions.create(model=CHAT, messages=history, tools=TOOLS).choices[0].message.content == SAID
    for mode in ("tools-interleaved", "tools-no-index", "tools-at-once"):
        with client.chat.completions.stream(model=CHAT, messages=words(mode), tools=TOOLS) as stream:
            made = stream.get_final_completion().choices[0].message.tool_calls or []
        assert [(each.id, each.function.name, each.function.arguments) for each in made] == [
            (each.id, each.name, each.arguments) for each in CALLS
        ]


def test_what_is_asked_reaches_the_node(client: OpenAI, speaking: Generating) -> None:
    schema = {"name": "answer", "strict": True, "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    given: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": schema},
        "parallel_tool_calls": False,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": CALLS[0].name}},
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["\n\n"],
        "logit_bias": {"50256": -100},
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "reasoning_effort": "low",
    }
    client.chat.completions.create(model=CHAT, messages=words(), max_completion_tokens=9, user="somebody", **given)
    sent = speaking.sole.last
    assert {name: sent.get(name) for name in given} == given
    assert sent["max_tokens"] == 9 and "user" not in sent and sent["model"] == "scripted"


def test_images_in_a_message(client: OpenAI, speaking: Generating) -> None:
    picture = "data:image/png;base64," + base64.b64encode(speech.png(4, 4, 1)).decode()
    parts: list[Any] = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": picture, "detail": "low"}},
    ]
    reply = client.chat.completions.create(model=CHAT, messages=[{"role": "user", "content": parts}])
    assert reply.choices[0].message.content == SAID
    assert speaking.sole.last["messages"][0]["content"] == parts


def test_several_answers_and_log_probabilities(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=CHAT, messages=words("logprobs"), n=2, logprobs=True, top_logprobs=1, max_tokens=4
    )
    assert [choice.message.content for choice in reply.choices] == [speech.text(4)] * 2
    found = reply.choices[1].logprobs
    assert found is not None and found.content is not None
    assert [each.token for each in found.content] == speech.tokens(4)
    assert [each.top_logprobs[0].token for each in found.content] == ["other"] * 4
    assert {choice.finish_reason for choice in reply.choices} == {"length"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_completions_of_several_prompts(client: OpenAI, speaking: Generating, stream: bool) -> None:
    prompts = ["Once", "Twice <<logprobs>>"]
    said = {0: "", 1: "", 2: "", 3: ""}
    if stream:
        events = list(client.completions.create(model=CHAT, prompt=prompts, n=2, max_tokens=5, logprobs=1, stream=True))
        choices = [choice for each in events for choice in each.choices]
        answer_id = events[0].id
    else:
        reply = client.completions.create(model=CHAT, prompt=prompts, n=2, max_tokens=5, logprobs=1)
        choices, answer_id = reply.choices, reply.id
        assert reply.choices[3].logprobs is not None and reply.choices[3].logprobs.tokens == speech.tokens(5)
    for choice in choices:
        said[choice.index] += choice.text
    assert set(said.values()) == {speech.text(5)}
    charge = speaking.charge(answer_id)
    assert charge is not None and charge.meters["output"] == 20


def test_completions_of_token_ids(client: OpenAI) -> None:
    reply = client.completions.create(model=CHAT, prompt=[[1, 2, 3], [4]])
    assert [choice.text for choice in reply.choices] == [SAID] * 2


def test_images(client: OpenAI) -> None:
    first = client.images.generate(model=PAINTER, prompt="A cat", n=2, size=SMALL, response_format="b64_json")
    assert [base64.b64decode(each.b64_json or "") for each in first.data or ()] == [
        speech.png(32, 16, 0),
        speech.png(32, 16, 1),
    ]
    (second,) = client.images.generate(model=PAINTER, prompt="A cat", response_format="url").data or []
    width, height = map(int, LARGE.split("x"))
    head, _, data = (second.url or "").partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == speech.png(width, height, 0)


@pytest.mark.parametrize(
    ("members", "kind", "code", "param"),
    [
        ({"model": PAINTER}, openai.BadRequestError, "unsupported_modality", "model"),
        ({"model": MODEL}, openai.BadRequestError, "unsupported_modality", "model"),
        ({"model": "nobody/nothing"}, openai.NotFoundError, "model_not_found", "model"),
        ({"messages": []}, openai.BadRequestError, "empty_input", "messages"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": 500_000}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"messages": words("too-long")}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": words("html"), "model": FRAIL}, openai.InternalServerError, "bad_node_response", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refusals(
    client: OpenAI, speaking: Generating, members: dict[str, Any], kind: Any, code: str, param: str | None, stream: bool
) -> None:
    """The client's own exceptions, with code and param, also where a stream was asked for."""
    asked: dict[str, Any] = {"model": CHAT, "messages": words(), "stream": stream, **members}
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**asked)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert refused.value.request_id
    if asked["model"] == FRAIL:
        speaking.mend(speaking.frail, FRAIL)


@pytest.mark.parametrize("order", ["dies", "resets", "errs", "no-end", "cut at=1500", "no-json"])
def test_a_cut_stream_raises(client: OpenAI, speaking: Generating, order: str) -> None:
    """It never ends as a whole one would."""
    with pytest.raises(openai.APIError) as broken:
        for _ in client.chat.completions.create(model=FRAIL, messages=words(order), stream=True):
            pass
    assert broken.value.code == "bad_node_response"
    speaking.mend(speaking.frail, FRAIL)


def test_without_money(speaking: Generating) -> None:
    key = speaking.account("penniless", 1)
    with (
        OpenAI(base_url=speaking.endpoint.base_url, api_key=key, max_retries=3) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.chat.completions.create(model=CHAT, messages=words(), stream=True)
    assert refused.value.code == "insufficient_quota"


# -- atoma-sdk, Python -------------------------------------------------------------------------------------------------

MESSAGES: list[ChatCompletionMessageTypedDict] = [{"role": "user", "content": "Tell me something."}]


@pytest.fixture(scope="module")
def sdk(speaking: Generating) -> Iterator[AtomaSDK]:
    with AtomaSDK(bearer_auth=speaking.endpoint.api_key, server_url=speaking.endpoint.root) as made:
        yield made


def test_atoma_chat(sdk: AtomaSDK) -> None:
    """With every member that it knows, explicit nulls included. Its messages are cut to role, content and name."""
    givens: list[dict[str, Any]] = [
        {},
        dict.fromkeys(("frequency_penalty", "logit_bias", "max_tokens", "n", "seed", "stop", "user", "tools")),
        {"max_tokens": 40, "n": 1, "seed": 3, "stop": ["\n\n"], "temperature": 0.2, "top_p": 1.0, "user": "somebody"},
    ]
    for given in givens:
        reply = sdk.chat.create(model=CHAT, messages=MESSAGES, **given)
        assert reply.choices[0].message.content == SAID
        assert isinstance(reply.usage, CompletionUsage) and reply.usage.total_tokens == PROMPT_TOKENS + TOKENS


@pytest.mark.parametrize("order", ["", "comments", "bytewise"])
def test_atoma_chat_in_a_stream(sdk: AtomaSDK, order: str) -> None:
    messages: Any = words(order)
    with sdk.chat.create_stream(model=CHAT, messages=messages) as events:
        said = [each.data.choices[0].delta.content or "" for each in events]
    assert "".join(said) == SAID


async def test_atoma_async(speaking: Generating) -> None:
    async with AtomaSDK(bearer_auth=speaking.endpoint.api_key, server_url=speaking.endpoint.root) as own:
        reply = await own.chat.create_async(model=CHAT, messages=MESSAGES)
        assert reply.choices[0].message.content == SAID
        stream = await own.chat.create_stream_async(model=CHAT, messages=MESSAGES)
        said = [each.data.choices[0].delta.content or "" async for each in stream]
        assert "".join(said) == SAID
        assert len((await own.images.generate_async(model=PAINTER, prompt="A cat")).data) == 1


def test_atoma_images(sdk: AtomaSDK) -> None:
    """It insists on `url`, whatever was asked for."""
    givens: list[dict[str, Any]] = [
        {},
        {"n": 2, "size": SMALL},
        {"response_format": "url", "quality": "standard", "style": "vivid"},
    ]
    for given in givens:
        reply = sdk.images.generate(model=PAINTER, prompt="A cat", **given)
        assert [each.url[:22] for each in reply.data] == ["data:image/png;base64,"] * int(given.get("n", 1))


def test_atoma_models_and_health(sdk: AtomaSDK) -> None:
    assert {each.id for each in sdk.models_.models_list().data} == {MODEL, CHAT, FRAIL, PAIR, OLD, PAINTER}
    assert sdk.health.health().message == "ok"


def test_atoma_refusals(sdk: AtomaSDK) -> None:
    for model, code in ((PAINTER, "unsupported_modality"), ("nobody/nothing", "model_not_found")):
        for create in (sdk.chat.create, sdk.chat.create_stream):
            with pytest.raises(APIError) as refused:
                create(model=model, messages=MESSAGES)
            assert json.loads(refused.value.body)["error"]["code"] == code


# -- openai and atoma-sdk, Node ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("packages")
def test_openai_for_node(speaking: Generating) -> None:
    endpoint = speaking.endpoint
    got = script("openai_generation.mjs", endpoint.base_url, CHAT, PAINTER, OPENAI_API_KEY=endpoint.api_key)
    for name in ("whole", "streamed", "comments", "completed"):
        assert got[name] == SAID, name
    assert got["completion"] == [SAID] * 2
    assert got["usage"]["total_tokens"] == got["streamedUsage"]["total_tokens"] == PROMPT_TOKENS + TOKENS
    assert int(got["cost"]) == CHARGED
    assert got["calls"] == [[each.id, each.name, each.arguments] for each in CALLS]
    assert got["images"] == [base64.b64encode(speech.png(32, 16, 0)).decode()[:8]] * 2
    assert set(got["models"]) >= {CHAT, PAIR}
    assert got["refusals"] == [
        {"kind": "BadRequestError", "status": 400, "code": "unsupported_modality"},
        {"kind": "BadRequestError", "status": 400, "code": "empty_input"},
        {"kind": "APIError", "status": None, "code": "bad_node_response"},
        {"kind": "APIError", "status": None, "code": "bad_node_response"},
    ]


@pytest.mark.usefixtures("native")
def test_atoma_for_node(speaking: Generating) -> None:
    """Its streams are paced: it loses events that arrive close together, whatever the server does."""
    endpoint = speaking.endpoint
    got = script(
        "atoma_generation.mjs", endpoint.root, CHAT, PAINTER, str(NPM_PACE_S), ATOMASDK_BEARER_AUTH=endpoint.api_key
    )
    assert got["whole"] == got["streamed"] == SAID
    assert got["usage"]["totalTokens"] == PROMPT_TOKENS + TOKENS
    assert got["images"] == ["data:image/png;base64,"]
    assert set(got["models"]) >= {MODEL, CHAT, PAINTER}
    assert got["health"] == {"message": "ok"}
    assert got["refusals"] == [
        {"kind": "APIError", "status": 400, "code": "unsupported_modality"},
        {"kind": "APIError", "status": 404, "code": "model_not_found"},
    ]


# -- embedmesh chat ----------------------------------------------------------------------------------------------------


def chat(speaking: Generating, *arguments: str, stdin: bytes | None = None, model: str = CHAT) -> tuple[int, str, str]:
    """Its exit status, what it printed, and what it said on standard error."""
    done = run("chat", *arguments, "--model", model, "--data-dir", speaking.endpoint.data_dir, stdin=stdin)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_chat_answers_a_question_from_the_command_line_or_a_pipe(speaking: Generating) -> None:
    assert chat(speaking, "Tell me something.") == (0, SAID + "\n", "")
    assert chat(speaking, "-", "--system", "Be brief.", stdin=b"Tell me.\n") == (0, SAID + "\n", "")
    assert [each["role"] for each in speaking.sole.last["messages"]] == ["system", "user"]
    code, said, _ = chat(speaking, "Tell me.", "--json", "--max-tokens", "3")
    assert code == 0 and json.loads(said)["choices"][0]["finish_reason"] == "length"


def test_chat_says_in_a_line_what_went_wrong(speaking: Generating) -> None:
    code, said, why = chat(speaking, "<<dies at=4>>", model=FRAIL)
    assert (code, said) == (1, speech.text(3) + "\n") and "broke off" in why and why.count("\n") == 1
    speaking.mend(speaking.frail, FRAIL)
    code, said, why = chat(speaking, "Tell me.", model="nobody/nothing")
    assert (code, said) == (1, "") and "There is no model of that name" in why
    assert chat(speaking, "-", stdin=b" \n")[0] == 2
    assert run("chat", "Tell me.", "--data-dir", speaking.endpoint.data_dir).returncode == 78, "several models chat"


def test_chat_on_a_terminal_is_a_conversation(speaking: Generating) -> None:
    """What was said is sent along. Ctrl-C stops an answer, which is kept; at the prompt it ends the program."""
    child, terminal = pty.fork()
    if not child:
        arguments = ["chat", "--model", CHAT, "--data-dir", str(speaking.endpoint.data_dir)]
        os.execv(COMMAND[0], [*COMMAND, *arguments])
    shown = b""

    def until(words: str) -> None:
        nonlocal shown
        shown = b""

        def look() -> bool:
            nonlocal shown
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 4_096)
            return words in shown.decode(errors="replace")

        wait_until(f"{words!r} on the terminal", look, 30)

    try:
        until("> ")
        os.write(terminal, b"Tell me <<stalls at=3>>\n")
        until(speech.text(2))
        os.write(terminal, b"\x03")
        until("(stopped)\r\n> ")
        os.write(terminal, b"<<refuse-400>> is no order: the first one counts\n")
        until(speech.text(2))
        assert [each["content"] for each in speaking.sole.last["messages"]][1] == speech.text(2)
        os.write(terminal, b"\x03")
        until("> ")
        os.write(terminal, b"\x03")
    finally:
        _, status = os.waitpid(child, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
