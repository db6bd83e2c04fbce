"""Replies of other makes by the allow-list: whole and streamed, what is kept, what is dropped, what is refused."""

import json
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from embedmesh.dialects.openai.chat_replies import ChatCompletionChunkReply, ChatCompletionReply
from embedmesh.dialects.openai.completions import TextCompletionReply
from embedmesh.dialects.openai.images import ImageList
from embedmesh.dialects.openai.replies import BREAKS, FINISH_REASONS, usage_of
from embedmesh.rules.errors import NodeBroke, WrongAnswer
from embedmesh.rules.generation import Generating, Piece, Prompt, StreamState, TokenCounts, Whole
from tests.dialects.generation import DIALECTS, MODELS, PNG, function_tool, parsed
from tests.dialects.makes import (
    CALLS,
    CHAT_REPLIES,
    CHAT_STREAMS,
    SAYS,
    TEXT,
    TEXT_REPLIES,
    TEXT_STREAMS,
    TOOL_REPLIES,
    TOOL_STREAMS,
    USAGE,
    answer,
    chunk,
    text_event,
    tool,
    whole_call,
)

USED = TokenCounts(9, 4)
TALKER = MODELS["talker"]
CHAT = parsed("chat")
STREAM = parsed("chat", stream=True)
TOLD = parsed("chat", stream=True, stream_options={"include_usage": True})
SECRETS = ("secret", "timings", "fp_", "system_fingerprint", "service_tier", "obfuscation", "prompt_token_ids", "fp1")


def whole(reply: object, prompt: Prompt = CHAT) -> Whole:
    raw = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return DIALECTS[prompt.modality].whole(prompt, TALKER, raw, "req_1", 1_700_000_000)


def state() -> StreamState:
    return StreamState("req_1", 1_700_000_000)


def pieces(events: Iterable[object], prompt: Prompt = STREAM, shared: StreamState | None = None) -> list[Piece]:
    shared = shared or state()
    dialect = DIALECTS[prompt.modality]
    return [dialect.piece(prompt, TALKER, json.dumps(event).encode(), shared) for event in events]


def sent(found: Iterable[Piece]) -> list[dict[str, Any]]:
    return [json.loads(piece.data) for piece in found if piece.data is not None]


def choice_of(reply: Whole) -> dict[str, Any]:
    [choice] = json.loads(reply.data)["choices"]
    found: dict[str, Any] = choice
    return found


def deltas(found: Iterable[Piece]) -> list[dict[str, Any]]:
    return [choice["delta"] for event in sent(found) for choice in event["choices"]]


# -- chats, whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CHAT_REPLIES)
def test_every_make_s_reply_is_in_one_form(make: str) -> None:
    reply = whole(CHAT_REPLIES[make])
    assert json.loads(reply.data) == {
        "object": "chat.completion",
        "id": "chatcmpl-req_1",
        "created": 1_700_000_000,
        "model": "talker",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    assert (reply.text, reply.usage) == (TEXT, USED)


@pytest.mark.parametrize("make", TOOL_REPLIES)
def test_calls_of_tools_are_kept_byte_for_byte(make: str) -> None:
    reply = whole(TOOL_REPLIES[make])
    message = choice_of(reply)["message"]
    assert [(each["function"]["name"], each["function"]["arguments"]) for each in message["tool_calls"]] == list(CALLS)
    assert all(each["type"] == "function" and each["id"] for each in message["tool_calls"])
    assert len({each["id"] for each in message["tool_calls"]}) == 2
    assert message["content"] in (None, "")
    assert all(name in reply.text and arguments in reply.text for name, arguments in CALLS)


def test_ids_of_calls_are_the_node_s_own_and_made_where_it_has_none() -> None:
    def ids(make: str) -> list[str]:
        return [each["id"] for each in choice_of(whole(TOOL_REPLIES[make]))["message"]["tool_calls"]]

    assert ids("OpenAI") == ["a", "b"]
    assert len(set(ids("llama.cpp"))) == 2


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"reasoning_content": "hm"}, "hm"),
        ({"reasoning": "hm"}, "hm"),
        ({"reasoning_content": "a", "reasoning": "b"}, "a"),
    ],
)
def test_reasoning_has_one_name(said: dict[str, str], told: str) -> None:
    reply = whole(answer(SAYS | said))
    assert choice_of(reply)["message"]["reasoning_content"] == told
    assert reply.text == told + TEXT


def test_a_refusal_and_null_content_are_kept() -> None:
    message = choice_of(whole(answer({"content": None, "refusal": "no"})))["message"]
    assert message == {"role": "assistant", "content": None, "refusal": "no"}


def test_answers_come_in_the_order_of_their_indices() -> None:
    choices = [{"index": at, "message": {"content": str(at)}, "finish_reason": "length"} for at in (1, 0)]
    reply = json.loads(whole({"choices": choices}, parsed("chat", n=2)).data)
    assert [(each["index"], each["message"]["content"]) for each in reply["choices"]] == [(0, "0"), (1, "1")]
    assert "usage" not in reply


LOGPROB = {
    "token": "a",
    "logprob": -0.5,
    "bytes": [97],
    "id": 7,
    "top_logprobs": [{"token": "b", "logprob": -1, "x": 1}],
}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"content": [LOGPROB]}, "a"),
        ({"content": [{"token": 5}]}, None),
        ({"content": "a"}, None),
        ([1], None),
        (None, None),
    ],
)
def test_log_probabilities_are_rewritten_and_never_spoil_an_answer(said: object, told: str | None) -> None:
    reply = {"choices": [{"index": 0, "message": SAYS, "finish_reason": "stop", "logprobs": said}]}
    logprobs = choice_of(whole(reply, parsed("chat", logprobs=True)))["logprobs"]
    if told is None:
        assert logprobs is None
    else:
        top = {"token": "b", "logprob": -1.0, "bytes": None}
        kept = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [top]}
        assert logprobs == {"content": [kept], "refusal": None}
    assert choice_of(whole(reply))["logprobs"] is None  # not asked for


WRONG: dict[str, object] = {
    "HTML": b"<html>busy</html>",
    "nothing": b"",
    "an array": [],
    "no choices": {"usage": USAGE},
    "null choices": {"choices": None},
    "choices of another type": {"choices": "a"},
    "fewer answers": {"choices": []},
    "more answers": {"choices": [{"message": SAYS}, {"message": SAYS}]},
    "another index": {"choices": [{"index": 1, "message": SAYS}]},
    "an index of another type": {"choices": [{"index": "0", "message": SAYS}]},
    "no message": {"choices": [{"index": 0}]},
    "a message of another type": {"choices": [{"index": 0, "message": "a"}]},
    "content of another type": answer({"content": 5}),
    "a refusal of another type": answer({"content": None, "refusal": {}}),
    "reasoning of another type": answer(SAYS | {"reasoning": 1}),
    "calls of another type": answer({"content": None, "tool_calls": "a"}),
    "a call of another type": answer({"content": None, "tool_calls": [1]}),
    "a call with an id of another type": answer({"content": None, "tool_calls": [whole_call("", "f", "") | {"id": 5}]}),
    "a call without a name": answer({"content": None, "tool_calls": [{"id": "a", "function": {"arguments": "{}"}}]}),
    "arguments of another type": answer({"content": None, "tool_calls": [whole_call("a", "f", [1])]}),
    "an end of another type": answer(SAYS) | {"choices": [{"message": SAYS, "finish_reason": 5}]},
    "deep": b'{"choices":' + b"[" * 100_000,
    "half a surrogate": b'{"choices":[{"message":{"content":"\\ud800"}}]}',
    "no UTF-8": b'{"choices":[{"message":{"content":"\xff"}}]}',
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_reply_is_refused(what: str) -> None:
    with pytest.raises(WrongAnswer):
        whole(WRONG[what])


def test_indices_are_each_there_once() -> None:
    two = [{"index": 0, "message": SAYS}, {"index": 0, "message": SAYS}]
    with pytest.raises(WrongAnswer):
        whole({"choices": two}, parsed("chat", n=2))


ERRORS: dict[str, object] = {
    "OpenAI": {"error": {"message": "secret words", "type": "server_error", "param": None, "code": None}},
    "llama.cpp": {"error": {"code": 500, "message": "secret words", "type": "server_error"}},
    "older vLLM": {"object": "error", "message": "secret words", "type": "BadRequestError", "code": 400},
    "TGI": {"error": "secret words", "error_type": "generation"},
    "OpenRouter": {"error": {"code": 502, "message": "secret words"}, "choices": [{"delta": {"content": ""}}]},
}


@pytest.mark.parametrize("make", ERRORS)
@pytest.mark.parametrize("modality", DIALECTS)
def test_an_error_is_no_answer_and_its_words_are_not_told(make: str, modality: Generating) -> None:
    prompt = parsed(modality)
    with pytest.raises(NodeBroke) as broke:
        whole(ERRORS[make], prompt)
    assert "secret" not in str(broke.value)
    if modality != "images":
        with pytest.raises(NodeBroke):
            pieces([ERRORS[make]], prompt)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        *FINISH_REASONS.items(),
        ("eos_token", "stop"),
        ("stop_sequence", "stop"),
        ("end_turn", "stop"),
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("repetition", "stop"),
        ("", "stop"),
        (None, "stop"),
    ],
)
def test_the_reasons_for_an_end_are_openai_s(said: str | None, told: str) -> None:
    assert choice_of(whole(answer(SAYS, said)))["finish_reason"] == told


@pytest.mark.parametrize("said", sorted(BREAKS))
def test_an_answer_that_was_broken_off_never_looks_whole(said: str) -> None:
    with pytest.raises(NodeBroke):
        whole(answer(SAYS, said))
    with pytest.raises(NodeBroke):
        pieces([chunk({"content": "a"}), chunk({}, said)])


def test_a_reply_gets_another_usage() -> None:
    reply = whole(CHAT_REPLIES["OpenAI"])
    other = json.loads(DIALECTS["chat"].with_usage(reply, TokenCounts(7, 3, 2, 1)))
    assert other.pop("usage") == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    assert other == {name: value for name, value in json.loads(reply.data).items() if name != "usage"}


REPLY_SCHEMAS: dict[type[msgspec.Struct], dict[str, Any]] = {
    kind: schema | {"$defs": components}
    for kind in (ChatCompletionReply, ChatCompletionChunkReply, TextCompletionReply, ImageList)
    for [schema], components in [msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")]
}


def check_documented(kind: type[msgspec.Struct], *replies: bytes | None) -> None:
    for reply in replies:
        Draft202012Validator(REPLY_SCHEMAS[kind]).validate(json.loads(reply or b"null"))


def test_replies_are_as_their_schemas_say() -> None:
    """Those of which the OpenAPI document is made."""
    log = {"choices": [{"message": SAYS, "logprobs": {"content": [LOGPROB]}}]}
    chats = [*CHAT_REPLIES.values(), *TOOL_REPLIES.values()]
    check_documented(ChatCompletionReply, *(whole(reply).data for reply in chats))
    check_documented(ChatCompletionReply, whole(log, parsed("chat", logprobs=True)).data)
    check_documented(ChatCompletionReply, *(whole(reply, OLDER).data for reply in TOOL_REPLIES.values()))
    for events in [*CHAT_STREAMS.values(), *TOOL_STREAMS.values()]:
        for prompt in (STREAM, TOLD, OLDER):
            check_documented(ChatCompletionChunkReply, *(piece.data for piece in pieces(events, prompt) if piece.data))
    check_documented(
        ChatCompletionChunkReply, DIALECTS["chat"].usage_event(TOLD, TALKER, TokenCounts(9, 4, 3, 2), state())
    )
    check_documented(TextCompletionReply, *(whole(reply, TEXT_PROMPT).data for reply in TEXT_REPLIES.values()))
    for events in TEXT_STREAMS.values():
        check_documented(TextCompletionReply, *(piece.data for piece in pieces(events, TEXT_PROMPT) if piece.data))
    check_documented(ImageList, whole({"data": [{"b64_json": PNG, "revised_prompt": "a"}]}, parsed("images")).data)


# -- usage -------------------------------------------------------------------------------------------------------------


def used(**members: object) -> dict[str, object]:
    return USAGE | members


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (USAGE, USED),
        ({"prompt_tokens": 0, "completion_tokens": 0}, TokenCounts(0, 0)),
        (used(total_tokens=None), USED),
        (used(prompt_tokens_details={"cached_tokens": 8, "audio_tokens": 0}), TokenCounts(9, 4, 8)),
        (used(prompt_tokens_details={"cached_tokens": None}), USED),
        (used(prompt_tokens_details=None, completion_tokens_details={"reasoning_tokens": 3}), TokenCounts(9, 4, 0, 3)),
        (used(completion_tokens_details={"reasoning_tokens": 5}), USED),
        (used(prompt_tokens_details={"cached_tokens": 10}), None),
        (used(total_tokens=14), None),
        (used(total_tokens="13"), None),
        (used(prompt_tokens=-9), None),
        (used(prompt_tokens=9.0), None),
        (used(prompt_tokens=True), None),
        (used(completion_tokens=None), None),
        ({"prompt_tokens": 2**60, "completion_tokens": 0}, None),
        ({"prompt_tokens": 10**30, "completion_tokens": 0}, None),
        ({}, None),
        ([], None),
        ("9", None),
        (None, None),
    ],
)
def test_a_usage_that_cannot_be_is_none(said: object, read: TokenCounts | None) -> None:
    assert usage_of(said) == read
    assert whole(answer(SAYS, usage=said)).usage == read


# -- chats, streamed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CHAT_STREAMS)
def test_every_make_s_stream_is_in_one_form(make: str) -> None:
    found = pieces(CHAT_STREAMS[make])
    events = sent(found)
    for event in events:
        assert {name: event[name] for name in ("id", "object", "created", "model")} == {
            "id": "chatcmpl-req_1",
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": "talker",
        }
        assert not set(event) - {"id", "object", "created", "model", "choices"}
        assert len(event["choices"]) == 1
    assert "".join(delta.get("content", "") for delta in deltas(found)) == TEXT
    assert [delta.get("role") for delta in deltas(found)] == ["assistant"] + [None] * (len(events) - 1)
    assert all("content" not in delta or delta["content"] is not None for delta in deltas(found))
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert "".join(piece.text for piece in found) == TEXT
    assert [piece.finished for piece in found if piece.data] == [False] * (len(events) - 1) + [True]
    assert [piece.usage for piece in found if piece.usage][-1] == USED
    assert not any(secret in json.dumps(events) for secret in SECRETS)


@pytest.mark.parametrize("make", CHAT_STREAMS)
def test_usage_is_null_in_all_events_but_the_last_where_it_is_wanted(make: str) -> None:
    """As OpenAI does it; the last is the flow's, so that it tells what is charged, and once."""
    shared = state()
    events = sent(pieces(CHAT_STREAMS[make], TOLD, shared))
    assert [event["usage"] for event in events] == [None] * len(events)
    last = json.loads(DIALECTS["chat"].usage_event(TOLD, TALKER, USED, shared))
    assert (last["choices"], last["usage"], last["id"]) == ([], USAGE, events[0]["id"])


def test_usage_of_every_event_is_all_of_it_until_then() -> None:
    found = pieces(CHAT_STREAMS["vLLM, with its usage in every event"])
    assert [piece.usage.output for piece in found if piece.usage] == [0, 1, 2, 3, 4, 4]


def test_the_answers_of_one_stream_have_each_their_own_begin_and_end() -> None:
    prompt, shared = parsed("chat", stream=True, n=2), state()
    found = pieces(
        [
            chunk({"role": "assistant", "content": ""}, index=1),
            chunk({"content": "b"}, index=1),
            chunk({"role": "assistant", "content": "a"}),
            chunk({}, "stop", index=1),
            {"choices": [{"index": at, "delta": {"content": "x"}, "finish_reason": None} for at in (0, 1)]},
            chunk({}, "length"),
            chunk({}, "stop"),
        ],
        prompt,
        shared,
    )
    assert [delta.get("role") for delta in deltas(found)] == ["assistant", None, "assistant", *[None] * 5]
    assert [piece.finished for piece in found] == [False, False, False, True, False, True, False]
    reasons = [(each["index"], each["finish_reason"]) for event in sent(found) for each in event["choices"]]
    assert [reason for reason in reasons if reason[1]] == [(1, "stop"), (0, "length")]
    assert shared.ended == {0, 1}


WRONG_EVENTS: dict[str, object] = {
    "another index": chunk({"content": "a"}, index=1),
    "a negative index": chunk({"content": "a"}, index=-1),
    "an index of another type": {"choices": [{"index": True, "delta": {}}]},
    "two pieces of one answer": {"choices": [{"index": 0, "delta": {}}, {"index": 0, "delta": {}}]},
    "content of another type": chunk({"content": {}}),
    "a delta of another type": {"choices": [{"index": 0, "delta": "a"}]},
    "choices of another type": {"choices": {}},
    "a piece of no call": chunk({"tool_calls": [{"function": {"arguments": "{}"}}]}),
    "an index that is none": chunk({"tool_calls": [tool(10**6, "a", "f", "")]}),
    "an id of another type": chunk({"tool_calls": [{"index": 0, "id": 5, "function": {"name": "f"}}]}),
    "no JSON": "[DONE",
    "a number": 5,
}


@pytest.mark.parametrize("what", WRONG_EVENTS)
def test_a_wrong_event_is_refused(what: str) -> None:
    with pytest.raises(WrongAnswer):
        pieces([WRONG_EVENTS[what]])


def test_of_several_answers_an_event_says_of_which_it_is() -> None:
    with pytest.raises(WrongAnswer):
        pieces([{"choices": [{"delta": {"content": "a"}}]}], parsed("chat", stream=True, n=2))
    assert pieces([{"choices": [{"delta": {"content": "a"}}]}])[0].text == "a"


# -- calls of tools, streamed ------------------------------------------------------------------------------------------


def assembled(found: Iterable[Piece]) -> dict[int, dict[str, Any]]:
    """As clients do it: by index; id and type once, name and arguments in pieces."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas(found):
        for each in delta.get("tool_calls", ()):
            call = calls.setdefault(each["index"], {"id": "", "type": "", "name": "", "arguments": ""})
            call["id"] += each.get("id", "")
            call["type"] += each.get("type", "")
            for name, piece in each.get("function", {}).items():
                call[name] += piece
    return calls


@pytest.mark.parametrize("make", TOOL_STREAMS)
def test_calls_of_every_shape_are_put_together_right(make: str) -> None:
    found = pieces(TOOL_STREAMS[make])
    calls = assembled(found)
    assert [(call["name"], call["arguments"]) for _, call in sorted(calls.items())] == list(CALLS)
    assert sorted(calls) == [0, 1]
    assert all(call["type"] == "function" for call in calls.values())
    assert len({call["id"] for call in calls.values()}) == 2
    text = "".join(piece.text for piece in found)
    assert sorted(text) == sorted("".join(name + arguments for name, arguments in CALLS))
    assert found[-1].finished


@pytest.mark.parametrize("make", ["OpenAI", "Ollama, without an index", "Ollama, with one index for all"])
def test_ids_of_streamed_calls_are_the_node_s(make: str) -> None:
    assert [call["id"] for _, call in sorted(assembled(pieces(TOOL_STREAMS[make])).items())] == ["a", "b"]


def test_every_split_of_two_calls_gives_the_same_calls() -> None:
    """Arguments cut at every place, the calls interleaved, with an index or by id."""
    (name_a, arguments_a), (name_b, arguments_b) = CALLS
    for cut in range(len(arguments_b) + 1):
        for indexed in (True, False):

            def a_piece(at: int, arguments: str, name: str | None = None, indexed: bool = indexed) -> dict[str, Any]:
                return tool(at if indexed else None, "ab"[at], name, arguments)

            events = [
                chunk({"tool_calls": [a_piece(0, arguments_a[:cut], name_a), a_piece(1, arguments_b[:cut], name_b)]}),
                chunk({"tool_calls": [a_piece(1, arguments_b[cut:]), a_piece(0, arguments_a[cut:])]}),
            ]
            calls = assembled(pieces(events))
            assert [(call["name"], call["arguments"]) for _, call in sorted(calls.items())] == list(CALLS)


def test_more_calls_than_any_answer_has_are_refused() -> None:
    shared = state()
    with pytest.raises(WrongAnswer):
        pieces((chunk({"tool_calls": [tool(None, f"c{n}", "f", "")]}) for n in range(2_000)), STREAM, shared)
    assert len(shared.tools[0]) <= 1_024


# -- functions, the older form of tools --------------------------------------------------------------------------------

OLDER = parsed("chat", functions=[function_tool()["function"]])


@pytest.mark.parametrize("make", TOOL_REPLIES)
def test_a_caller_of_functions_gets_a_function_call(make: str) -> None:
    choice = choice_of(whole(TOOL_REPLIES[make], OLDER))
    assert choice["message"]["function_call"] == dict(zip(("name", "arguments"), CALLS[0], strict=True))
    assert "tool_calls" not in choice["message"]
    if make != "TGI":
        assert choice["finish_reason"] == "function_call"


@pytest.mark.parametrize("make", TOOL_STREAMS)
def test_a_caller_of_functions_gets_a_stream_of_one(make: str) -> None:
    found = pieces(TOOL_STREAMS[make], OLDER)
    functions = [delta["function_call"] for delta in deltas(found) if "function_call" in delta]
    name, arguments = CALLS[0]
    assert "".join(each.get("name", "") for each in functions) == name
    assert "".join(each.get("arguments", "") for each in functions) == arguments
    assert "".join(piece.text for piece in found) == name + arguments


# -- completions -------------------------------------------------------------------------------------------------------

TEXT_PROMPT = parsed("completions")


@pytest.mark.parametrize("make", TEXT_REPLIES)
def test_completions_of_every_make_are_in_one_form(make: str) -> None:
    reply = whole(TEXT_REPLIES[make], TEXT_PROMPT)
    assert json.loads(reply.data) == {
        "object": "text_completion",
        "id": "cmpl-req_1",
        "created": 1_700_000_000,
        "model": "talker",
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    assert (reply.text, reply.usage) == (TEXT, USED)


@pytest.mark.parametrize("make", TEXT_STREAMS)
def test_streams_of_completions_are_in_one_form(make: str) -> None:
    found = pieces(TEXT_STREAMS[make], TEXT_PROMPT)
    events = sent(found)
    assert "".join(event["choices"][0]["text"] for event in events) == TEXT
    assert all("usage" not in event and event["id"] == "cmpl-req_1" for event in events)
    assert "".join(piece.text for piece in found) == TEXT
    assert [piece.usage for piece in found if piece.usage] == [USED]
    assert [piece.finished for piece in found if piece.data][-1]
    assert not any(secret in json.dumps(events) for secret in SECRETS)


def test_every_prompt_has_its_answers() -> None:
    prompt = parsed("completions", prompt=["a", "b"], n=2)
    reply = {"choices": [{"index": at, "text": str(at)} for at in (3, 1, 0, 2)]}
    assert [each["text"] for each in json.loads(whole(reply, prompt).data)["choices"]] == ["0", "1", "2", "3"]
    with pytest.raises(WrongAnswer):
        whole({"choices": reply["choices"][:3]}, prompt)


def test_an_echo_is_not_counted_as_made() -> None:
    """The caller gets it; what counts as made by the model is what comes after."""
    prompt = parsed("completions", prompt="Once", echo=True)
    reply = whole(text_event("Once upon", "stop"), prompt)
    assert (choice_of(reply)["text"], reply.text) == ("Once upon", " upon")
    found = pieces([text_event("Once"), text_event(" upon"), text_event("Once", "stop")], prompt)
    assert "".join(piece.text for piece in found) == " uponOnce"
    prompt = parsed("completions", prompt=["Once", "Then"], n=2, echo=True)
    texts = ["Once a", "Once b", "Then c", "Once d"]
    assert whole({"choices": [{"text": text} for text in texts]}, prompt).text == " a b cOnce d"


def test_log_probabilities_of_completions() -> None:
    ours = {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": None, "text_offset": [0]}
    prompt = parsed("completions", logprobs=1)
    reply = whole({"choices": [{"text": "a", "logprobs": ours | {"x": 1}}]}, prompt)
    assert choice_of(reply)["logprobs"] == ours
    chat_form = {"content": [LOGPROB, LOGPROB]}
    assert choice_of(whole({"choices": [{"text": "aa", "logprobs": chat_form}]}, prompt))["logprobs"] == {
        "tokens": ["a", "a"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"b": -1.0}, {"b": -1.0}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize(
    "reply", [{"choices": [{"text": 5}]}, {"choices": []}, {"choices": [{"index": 4, "text": "a"}]}]
)
def test_a_wrong_completion_is_refused(reply: object) -> None:
    with pytest.raises(WrongAnswer):
        whole(reply, TEXT_PROMPT)
