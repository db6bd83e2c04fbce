"""Calls of tools in answers, whole and in pieces of streams, as nodes of all makes write them.

In OpenAI's streams `index` says to which call a piece belongs; the id, the type and the name come once, with the first
piece. Other makes leave `index` out, give all calls the same one, repeat id and name in each piece, send a new id with
each, or send one call outside of an array. Pieces of two calls are never put together.
"""

from typing import Any, Literal

import msgspec
import orjson
from msgspec import UNSET, UnsetType

from embedmesh.dialects.openai.replies import text_of
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.generation import StreamState, ToolCall

CALLS_MAX = 1_024  # of one answer: each takes tokens, and what a stream remembers of it has 200 bytes


class FunctionReply(msgspec.Struct):
    """Which function is called, and with what."""

    name: str
    arguments: str


class ToolCallReply(msgspec.Struct, tag_field="type", tag="function"):
    """A call of a tool."""

    id: str
    function: FunctionReply


class FunctionDeltaReply(msgspec.Struct):
    """More of a call: its name first, then its arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDeltaReply(msgspec.Struct):
    """A piece of a call. `id` and `type` come with the first."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDeltaReply | UnsetType = UNSET


class _Said(msgspec.Struct):
    """What a node says of a call."""

    index: int | None
    id: str | None
    name: str | None
    arguments: str | None


def whole_calls(said: object, request_id: str, choice: int) -> list[ToolCallReply]:
    """The calls of a whole answer. Raises WrongAnswer."""
    calls: list[ToolCallReply] = []
    for index, call in enumerate(_calls(said)):
        if not call.name:
            raise WrongAnswer("A call of a tool has no name.")
        twice = any(other.id == call.id for other in calls)
        own_id = call.id if call.id and not twice else made_id(request_id, choice, index)
        calls.append(
            ToolCallReply(own_id, FunctionReply(call.name, "{}" if call.arguments is None else call.arguments))
        )
    return calls


def called(said: object) -> FunctionReply | None:
    """The older `function_call` of a whole answer. Raises WrongAnswer."""
    if said is None:
        return None
    call = _call({"function": said})
    if not call.name:
        raise WrongAnswer("A call of a function has no name.")
    return FunctionReply(call.name, "{}" if call.arguments is None else call.arguments)


def delta_called(said: object) -> FunctionDeltaReply:
    """A piece of the older `function_call`. Raises WrongAnswer."""
    call = _call({"function": said})
    return _function(call.name, call.arguments)


def delta_calls(said: object, choice: int, state: StreamState) -> list[ToolCallDeltaReply]:
    """The pieces of calls in one event, each with its call's place. Raises WrongAnswer."""
    begun = state.tools.setdefault(choice, [])
    return [_delta(call, begun, choice, state) for call in _calls(said)]


def made_id(request_id: str, choice: int, index: int) -> str:
    """The id of a call whose node gives it none, or that of another call."""
    return f"call_{request_id}_{choice}_{index}"


def _delta(said: _Said, begun: list[ToolCall], choice: int, state: StreamState) -> ToolCallDeltaReply:
    call = _begun(said, begun)
    if call is None:
        call = _begin(said, begun)
        twice = any(other.id == said.id for other in begun if other is not call)
        own_id = said.id if said.id and not twice else made_id(state.request_id, choice, call.index)
        function = FunctionDeltaReply(said.name or UNSET, said.arguments or "")
        return ToolCallDeltaReply(call.index, own_id, "function", function)
    name = said.name if said.name != call.name else None  # some nodes repeat it
    call.name += name or ""
    return ToolCallDeltaReply(call.index, function=_function(name, said.arguments))


def _begun(said: _Said, begun: list[ToolCall]) -> ToolCall | None:
    """The call that a piece goes on with; None where it begins one."""
    same = _newest(call for call in begun if call.id == said.id) if said.id is not None else None
    if same is not None and (said.index is None or said.index == same.node_index):
        return same
    if said.index is not None:
        at = _newest(call for call in begun if call.node_index == said.index)
        other = said.id is not None and said.name and at is not None and at.id is not None
        return None if other else at  # another id and a name: another call, whatever its index
    return None if said.name or said.id is not None or not begun else begun[-1]


def _newest(calls: Any) -> ToolCall | None:
    last = None
    for last in calls:  # noqa: B007
        pass
    return last


def _begin(said: _Said, begun: list[ToolCall]) -> ToolCall:
    if not said.name and said.id is None and said.index is None:
        raise WrongAnswer("A piece of a call of a tool belongs to none.")
    if len(begun) >= CALLS_MAX:
        raise WrongAnswer("The answer calls more tools than any.")
    taken = {call.index for call in begun}
    free = said.index is not None and said.index not in taken
    index = said.index if free else max(taken, default=-1) + 1
    call = ToolCall(index or 0, said.index, said.id, said.name or "")
    begun.append(call)
    return call


def _function(name: str | None, arguments: str | None) -> FunctionDeltaReply:
    return FunctionDeltaReply(name or UNSET, UNSET if arguments is None else arguments)


def _calls(said: object) -> list[_Said]:
    if said is None:
        return []
    entries = [said] if isinstance(said, dict) else said
    if not isinstance(entries, list) or len(entries) > CALLS_MAX:
        raise WrongAnswer("The calls of tools are no array of the size of any.")
    return [_call(entry) for entry in entries]


def _call(entry: object) -> _Said:
    function = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(function, dict | None):
        raise WrongAnswer("A call of a tool is no object.")
    function = function or {}
    index = entry.get("index")
    if type(index) is not int or index < 0:
        index = None
    elif index >= CALLS_MAX:
        raise WrongAnswer("A call of a tool has an index that is none.")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = orjson.dumps(arguments).decode()
    return _Said(
        index,
        text_of(entry.get("id"), "An id") or None,
        text_of(function.get("name"), "A name"),
        text_of(arguments, "The arguments"),
    )
