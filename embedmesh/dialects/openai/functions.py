"""The older form of tools, `functions` and `function_call`, in terms of the newer one, which is what nodes know.

A request is rewritten on its way to a node, an answer on its way back. Such a caller gets one call an answer.
"""

from typing import Any

from msgspec import UNSET, UnsetType

from embedmesh.dialects.openai.replies import FinishReason
from embedmesh.dialects.openai.tool_calls import (
    FunctionDeltaReply,
    FunctionReply,
    ToolCallDeltaReply,
    ToolCallReply,
)
from embedmesh.rules.generation import Prompt

FORM = "function_call"
"""The `reply_form` of a prompt whose caller knows the older form only."""


def to_tools(sent: dict[str, Any]) -> str | None:
    """Rewrite a valid request; FORM if its answers have to be rewritten, too."""
    sent["messages"] = _messages(sent["messages"])
    if "functions" not in sent:
        return None
    sent["tools"] = [{"type": "function", "function": function} for function in sent.pop("functions")]
    choice = sent.pop("function_call", None)
    if choice is not None:
        sent["tool_choice"] = choice if isinstance(choice, str) else {"type": "function", "function": choice}
    sent["parallel_tool_calls"] = False
    return FORM


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call gets an id by its place; what a function has returned belongs to the newest call before it."""
    newest = "call_0"
    rewritten = []
    for index, message in enumerate(messages):
        if "function_call" in message:
            newest = f"call_{index}"
            call = {"id": newest, "type": "function", "function": message.pop("function_call")}
            message.setdefault("tool_calls", [call])
        if message["role"] == "function":
            message |= {"role": "tool", "tool_call_id": newest}
        rewritten.append(message)
    return rewritten


def function_of(calls: list[ToolCallReply]) -> FunctionReply | UnsetType:
    """The first call, in the older form."""
    return calls[0].function if calls else UNSET


def delta_of(calls: list[ToolCallDeltaReply]) -> FunctionDeltaReply | UnsetType:
    """What is new of the first call, in the older form."""
    return next((call.function for call in calls if call.index == 0), UNSET)


def reason_for(reason: FinishReason | None, prompt: Prompt) -> FinishReason | None:
    """Why an answer ended, in the caller's form."""
    return "function_call" if reason == "tool_calls" and prompt.reply_form == FORM else reason
