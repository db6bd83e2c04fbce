"""Answers of chats by an allow-list, whole and in events of a stream: what a node has sent in, what a caller gets out.

An event that only brings text is made ten thousand times a second: it is decoded into structs and encoded of others.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from embedmesh.dialects.openai.functions import FORM, delta_of, function_of, reason_for
from embedmesh.dialects.openai.logprobs import ChatLogprobsReply, chat_logprobs
from embedmesh.dialects.openai.replies import (
    ENCODE,
    Created,
    FinishReason,
    GenerationUsageReply,
    Index,
    NamedModel,
    check_no_error,
    decoded,
    finish_reason_of,
    place_of,
    places_of,
    text_of,
    usage_of,
    usage_reply,
)
from embedmesh.dialects.openai.tool_calls import (
    FunctionDeltaReply,
    FunctionReply,
    ToolCallDeltaReply,
    ToolCallReply,
    called,
    delta_called,
    delta_calls,
    whole_calls,
)
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.generation import Piece, Prompt, StreamState, TokenCounts, Whole

PREFIX = "chatcmpl-"

# -- what callers get --------------------------------------------------------------------------------------------------


class ChatMessageReply(msgspec.Struct, tag_field="role", tag="assistant"):
    """What the model answers. `content` is null where it calls tools instead."""

    content: str | None
    refusal: str | UnsetType = UNSET
    reasoning_content: Annotated[str, Meta(description="What it thought before.")] | UnsetType = UNSET
    tool_calls: list[ToolCallReply] | UnsetType = UNSET
    function_call: FunctionReply | UnsetType = UNSET


class ChatChoiceReply(msgspec.Struct):
    """One of the answers."""

    index: Index
    message: ChatMessageReply
    logprobs: ChatLogprobsReply | None
    finish_reason: FinishReason


class ChatCompletionReply(msgspec.Struct, tag_field="object", tag="chat.completion"):
    """As many answers as `n` asks for."""

    id: str
    created: Created
    model: NamedModel
    choices: list[ChatChoiceReply]
    usage: GenerationUsageReply | UnsetType = UNSET


class ChatDeltaReply(msgspec.Struct):
    """What is new of an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDeltaReply] | UnsetType = UNSET
    function_call: FunctionDeltaReply | UnsetType = UNSET


class ChatChunkChoiceReply(msgspec.Struct):
    """A piece of one of the answers."""

    index: Index
    delta: ChatDeltaReply
    logprobs: ChatLogprobsReply | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunkReply(msgspec.Struct, tag_field="object", tag="chat.completion.chunk"):
    """An event of a stream. The last has no choices and tells the usage, if the request asks for that."""

    id: str
    created: Created
    model: NamedModel
    choices: list[ChatChunkChoiceReply]
    usage: GenerationUsageReply | UnsetType | None = UNSET


# -- what nodes send ---------------------------------------------------------------------------------------------------


class _Spoken(msgspec.Struct):
    content: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None
    function_call: Any = None


class _SpokenChoice(msgspec.Struct):
    index: Any = None
    message: _Spoken | None = None
    delta: _Spoken | None = None
    finish_reason: Any = None
    logprobs: Any = None


class _SpokenReply(msgspec.Struct):
    choices: list[_SpokenChoice] | None = None
    usage: Any = None
    error: Any = None
    object: Any = None


_decode = msgspec.json.Decoder(_SpokenReply).decode


def whole(prompt: Prompt, reply: bytes, request_id: str, created: int) -> Whole:
    """A whole reply. Raises NodeBroke, WrongAnswer."""
    said = decoded(_decode, reply)
    check_no_error(said.error, said.object)
    spoken = said.choices or []
    places = places_of([choice.index for choice in spoken], prompt)
    choices, texts = [], []
    for place, choice in sorted(zip(places, spoken, strict=True), key=lambda pair: pair[0]):
        if choice.message is None:
            raise WrongAnswer("An answer has no message.")
        message = _message(choice.message, prompt, request_id, place)
        texts += _texts(message)
        logprobs = chat_logprobs(choice.logprobs) if prompt.body.get("logprobs") else None
        reason = finish_reason_of(choice.finish_reason) or ("tool_calls" if message.tool_calls else "stop")
        choices.append(ChatChoiceReply(place, message, logprobs, reason_for(reason, prompt) or reason))
    usage = usage_of(said.usage)
    told = UNSET if usage is None else usage_reply(usage)
    body = ChatCompletionReply(PREFIX + request_id, created, prompt.model, choices, told)
    return Whole(ENCODE(body), "".join(texts), usage)


def _message(said: _Spoken, prompt: Prompt, request_id: str, place: int) -> ChatMessageReply:
    calls = whole_calls(said.tool_calls, request_id, place)
    function = called(said.function_call) or UNSET
    if prompt.reply_form == FORM:
        function, calls = function or function_of(calls), []
    return ChatMessageReply(
        text_of(said.content, "The content"),
        text_of(said.refusal, "The refusal") or UNSET,
        _reasoning(said) or UNSET,
        calls or UNSET,
        function,
    )


def _texts(message: ChatMessageReply) -> list[str]:
    texts = [message.reasoning_content or "", message.content or "", message.refusal or ""]
    functions = [call.function for call in message.tool_calls or ()]
    functions += [message.function_call] if message.function_call else []
    for function in functions:
        texts += (function.name, function.arguments)
    return texts


def _reasoning(said: _Spoken) -> str | None:
    given = said.reasoning_content if said.reasoning_content is not None else said.reasoning
    return text_of(given, "The reasoning") if given is not None else None


def piece(prompt: Prompt, data: bytes, state: StreamState) -> Piece:
    """One event of a stream. Raises NodeBroke, WrongAnswer."""
    said = decoded(_decode, data)
    check_no_error(said.error, said.object)
    state.events += 1
    usage = usage_of(said.usage) if said.usage is not None else None
    if not said.choices:
        return Piece(None, usage=usage)
    choices = []
    texts: list[str] = []
    finished = False
    for choice in said.choices:
        place = place_of(choice.index, prompt)
        delta = _delta(choice.delta, prompt, place, state, texts)
        reason = None
        if choice.finish_reason is not None and place not in state.ended:
            reason = reason_for(finish_reason_of(choice.finish_reason), prompt)
            if reason is not None:
                state.ended.add(place)
                finished = True
        logprobs = None
        if choice.logprobs is not None and prompt.body.get("logprobs"):
            logprobs = chat_logprobs(choice.logprobs)
        choices.append(ChatChunkChoiceReply(place, delta, logprobs, reason))
    if len(choices) > 1 and len({choice.index for choice in choices}) < len(choices):
        raise WrongAnswer("An event has two pieces of one answer.")
    told = None if prompt.wants_usage else UNSET
    chunk = ChatCompletionChunkReply(PREFIX + state.request_id, state.created, prompt.model, choices, told)
    return Piece(ENCODE(chunk), "".join(texts), usage, finished)


def _delta(said: _Spoken | None, prompt: Prompt, place: int, state: StreamState, texts: list[str]) -> ChatDeltaReply:
    delta = ChatDeltaReply()
    if said is None:
        said = _Spoken()
    if said.content is not None:
        delta.content = text_of(said.content, "The content") or ""
        texts.append(delta.content)
    if said.reasoning_content is not None or said.reasoning is not None:
        delta.reasoning_content = _reasoning(said) or ""
        texts.append(delta.reasoning_content)
    if said.refusal is not None:
        delta.refusal = text_of(said.refusal, "The refusal") or ""
        texts.append(delta.refusal)
    if said.tool_calls:
        calls = delta_calls(said.tool_calls, place, state)
        if prompt.reply_form == FORM:
            delta.function_call, calls = delta_of(calls), []
        delta.tool_calls = calls or UNSET
        for call in calls:
            _add(call.function, texts)
    if said.function_call is not None:
        delta.function_call = delta_called(said.function_call)
    _add(delta.function_call, texts)
    if place not in state.begun:  # OpenAI says the role once, and some nodes with every event
        state.begun.add(place)
        delta.role = "assistant"
        if not msgspec.structs.asdict(delta).keys() - {"role"}:
            delta.content = ""
    return delta


def _add(function: FunctionDeltaReply | UnsetType, texts: list[str]) -> None:
    if function:
        texts += (function.name or "", function.arguments or "")


def usage_event(prompt: Prompt, usage: TokenCounts, state: StreamState) -> bytes:
    """The last data event of a stream."""
    told = usage_reply(usage)
    return ENCODE(ChatCompletionChunkReply(PREFIX + state.request_id, state.created, prompt.model, [], told))
