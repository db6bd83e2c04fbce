"""What servers of other makes send for chats and completions, whole and as events: written by us in their forms.

All say the same: `TEXT`, and the calls `CALLS`, so that a test need not know which make it is. What differs is what
each adds, leaves out or writes in its own way.
"""

import json
from collections.abc import Sequence
from typing import Any

PIECES = ("Grü", "ß", " Gott 👋")
TEXT = "".join(PIECES)
CALLS = (("get_weather", '{"city": "Zürich"}'), ("get_time", '{"zone":"CET"}'))
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}

Json = dict[str, Any]


def chunk(delta: Json | None, finish: str | None = None, *, index: int = 0, **members: Any) -> Json:
    choices = [] if delta is None else [{"index": index, "delta": delta, "finish_reason": finish}]
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices} | members


def tool(index: int | None, call_id: str | None, name: str | None, arguments: str | None, **members: Any) -> Json:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    made: Json = {"function": function} | members
    if index is not None:
        made["index"] = index
    return made if call_id is None else made | {"id": call_id, "type": "function"}


def nulled(index: int, call_id: str | None, name: str | None, arguments: str) -> Json:
    """A piece of a call whose members are all there, null where they say nothing."""
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _text(first: Json, *, each: Json | None = None, finish: str = "stop", after: Sequence[Json] = ()) -> list[Json]:
    deltas = [chunk((each or {}) | {"content": piece}) for piece in PIECES]
    return [chunk(first), *deltas, chunk({}, finish), *after]


USAGE_LAST = chunk(None, usage=USAGE)
TIMINGS: Json = {"timings": {"prompt_n": 9, "predicted_ms": 12.5}, "model": "/srv/secret/model.gguf"}

CHAT_STREAMS: dict[str, list[Json]] = {
    "OpenAI": [
        event | {"system_fingerprint": "fp_1", "service_tier": "default", "obfuscation": "a8Fj"}
        for event in _text({"role": "assistant", "content": "", "refusal": None}, after=[USAGE_LAST])
    ],
    "vLLM, with its usage in every event": [
        event | {"usage": USAGE | {"completion_tokens": at, "total_tokens": 9 + at}}
        for at, event in enumerate(_text({"role": "assistant", "content": "", "reasoning_content": None}))
    ]
    + [USAGE_LAST],
    "SGLang": [
        {key: value for key, value in event.items() if key != "object"}
        for event in _text({"role": "assistant", "content": "", "tool_calls": None}, after=[USAGE_LAST])
    ],
    "llama.cpp": [event | TIMINGS for event in _text({"role": "assistant", "content": None}, after=[USAGE_LAST])],
    "Ollama": _text(
        {"role": "assistant", "content": ""}, each={"role": "assistant"}, after=[USAGE_LAST | {"created": 2}]
    ),
    "TGI": [chunk({"role": "assistant", "content": piece, "tool_calls": None}, logprobs=None) for piece in PIECES]
    + [chunk({"role": "assistant", "content": ""}, "eos_token"), USAGE_LAST],
}

(NAME_A, ARGS_A), (NAME_B, ARGS_B) = CALLS
TOOL_STREAMS: dict[str, list[Json]] = {
    "OpenAI": [
        chunk({"role": "assistant", "content": None, "tool_calls": [tool(0, "a", NAME_A, "")]}),
        chunk({"tool_calls": [tool(0, None, None, ARGS_A[:5])]}),
        chunk({"tool_calls": [tool(0, None, None, ARGS_A[5:])]}),
        chunk({"tool_calls": [tool(1, "b", NAME_B, "")]}),
        chunk({"tool_calls": [tool(1, None, None, ARGS_B)]}),
        chunk({}, "tool_calls"),
    ],
    "two calls interleaved": [
        chunk({"tool_calls": [tool(0, "a", NAME_A, ""), tool(1, "b", NAME_B, "")]}),
        chunk({"tool_calls": [tool(1, None, None, ARGS_B[:3]), tool(0, None, None, ARGS_A[:3])]}),
        chunk({"tool_calls": [tool(0, None, None, ARGS_A[3:]), tool(1, None, None, ARGS_B[3:])]}),
        chunk({}, "tool_calls"),
    ],
    "name in pieces": [
        chunk({"tool_calls": [tool(0, "a", NAME_A[:4], None)]}),
        chunk({"tool_calls": [tool(0, None, NAME_A[4:], None)]}),
        chunk({"tool_calls": [tool(0, None, None, ARGS_A)]}),
        chunk({"tool_calls": [tool(1, "b", NAME_B, ARGS_B)]}),
        chunk({}, "tool_calls"),
    ],
    "vLLM, which once gave each piece a new id": [
        chunk({"tool_calls": [tool(0, "chatcmpl-tool-1", NAME_A, "")]}),
        chunk({"tool_calls": [tool(0, "chatcmpl-tool-2", None, ARGS_A[:7])]}),
        chunk({"tool_calls": [tool(0, "chatcmpl-tool-3", None, ARGS_A[7:])]}),
        chunk({"tool_calls": [tool(1, "chatcmpl-tool-4", NAME_B, ARGS_B)]}),
        chunk({"content": ""}, "tool_calls"),
    ],
    "SGLang, with id and name null after the first": [
        chunk({"tool_calls": [nulled(0, "a", NAME_A, "")]}),
        chunk({"tool_calls": [nulled(0, None, None, ARGS_A)]}),
        chunk({"tool_calls": [nulled(1, "b", NAME_B, "")]}),
        chunk({"tool_calls": [nulled(1, None, None, ARGS_B)]}),
        chunk({}, "tool_calls"),
    ],
    "llama.cpp, which repeats id and name": [
        chunk({"role": "assistant", "content": None}),
        chunk({"tool_calls": [tool(0, "a", NAME_A, ARGS_A[:4])]}),
        chunk({"tool_calls": [tool(0, "a", NAME_A, ARGS_A[4:])]}),
        chunk({"tool_calls": [tool(1, "b", NAME_B, ARGS_B)]}),
        chunk({}, "tool_calls"),
    ],
    "Ollama, without an index": [
        chunk({"role": "assistant", "content": "", "tool_calls": [tool(None, "a", NAME_A, ARGS_A)]}),
        chunk({"role": "assistant", "content": "", "tool_calls": [tool(None, "b", NAME_B, ARGS_B)]}),
        chunk({"role": "assistant", "content": ""}, "tool_calls"),
    ],
    "Ollama, with one index for all": [
        chunk({"role": "assistant", "content": "", "tool_calls": [tool(0, "a", NAME_A, ARGS_A)]}),
        chunk({"role": "assistant", "content": "", "tool_calls": [tool(0, "b", NAME_B, ARGS_B)]}),
        chunk({"role": "assistant", "content": ""}, "tool_calls"),
    ],
    "both in one event, without index and id": [
        chunk({"tool_calls": [tool(None, None, NAME_A, ARGS_A), tool(None, None, NAME_B, ARGS_B)]}),
        chunk({}, "stop"),
    ],
    "pieces without index and id": [
        chunk({"tool_calls": [tool(None, "a", NAME_A, "")]}),
        chunk({"tool_calls": [tool(None, None, None, ARGS_A)]}),
        chunk({"tool_calls": [tool(None, "b", NAME_B, "")]}),
        chunk({"tool_calls": [tool(None, None, None, ARGS_B)]}),
        chunk({}, "tool_calls"),
    ],
    "pieces by id, without an index": [
        chunk({"tool_calls": [tool(None, "a", NAME_A, ""), tool(None, "b", NAME_B, "")]}),
        chunk({"tool_calls": [tool(None, "b", None, ARGS_B)]}),
        chunk({"tool_calls": [tool(None, "a", None, ARGS_A)]}),
        chunk({}, "tool_calls"),
    ],
    "TGI, one call outside of an array": [
        chunk({"role": "assistant", "tool_calls": tool(0, "", NAME_A, "")}),
        chunk({"role": "assistant", "tool_calls": tool(0, "", None, ARGS_A)}),
        chunk({"role": "assistant", "tool_calls": tool(1, "", NAME_B, "")}),
        chunk({"role": "assistant", "tool_calls": tool(1, "", None, ARGS_B)}),
        chunk({}, "eos_token"),
    ],
    "TGI, one id for all": [
        chunk({"role": "assistant", "tool_calls": [tool(0, "0", NAME_A, ARGS_A)]}),
        chunk({"role": "assistant", "tool_calls": [tool(1, "0", NAME_B, ARGS_B[:4])]}),
        chunk({"role": "assistant", "tool_calls": [tool(1, "0", None, ARGS_B[4:])]}, "eos_token"),
    ],
    "Gemini, whole calls with an empty id": [
        chunk({"role": "assistant", "tool_calls": [tool(0, "", NAME_A, ARGS_A)]}),
        chunk({"role": "assistant", "tool_calls": [tool(1, "", NAME_B, ARGS_B)]}, "stop"),
    ],
    "id after the name": [
        chunk({"tool_calls": [tool(0, None, NAME_A, None)]}),
        chunk({"tool_calls": [tool(0, "a", None, ARGS_A)]}),
        chunk({"tool_calls": [tool(1, None, NAME_B, ARGS_B)]}),
        chunk({}, "tool_calls"),
    ],
    "arguments as an object": [
        chunk({"tool_calls": [tool(0, "a", NAME_A, ARGS_A)]}),
        chunk({"tool_calls": [{"index": 1, "id": "b", "function": {"name": NAME_B, "arguments": json.loads(ARGS_B)}}]}),
        chunk({}, "tool_calls"),
    ],
}  # fmt: skip


def answer(message: Json, finish: str | None = "stop", **members: Any) -> Json:
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    made = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
    return made | members


def whole_call(call_id: str, name: str, arguments: Any, **members: Any) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}} | members


SAYS = {"role": "assistant", "content": TEXT}
CHAT_REPLIES: dict[str, Json] = {
    "OpenAI": answer(SAYS | {"refusal": None, "annotations": []}, system_fingerprint="fp_1", service_tier="default"),
    "vLLM": answer(
        SAYS | {"reasoning_content": None, "tool_calls": [], "audio": None, "function_call": None},
        prompt_logprobs=None,
        prompt_token_ids=[1, 2, 3],
        kv_transfer_params=None,
    ),
    "SGLang": answer(SAYS | {"tool_calls": None}, metadata={"weight_version": "default"}),
    "llama.cpp": answer(SAYS, system_fingerprint="b4000", **TIMINGS),
    "Ollama": answer(SAYS, system_fingerprint="fp_ollama"),
    "TGI": answer(SAYS, "eos_token", system_fingerprint="3.0.0-native"),
    "one that leaves much out": {"choices": [{"message": SAYS}], "usage": USAGE},
}
TOOL_REPLIES: dict[str, Json] = {
    "OpenAI": answer(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [whole_call("a", NAME_A, ARGS_A), whole_call("b", NAME_B, ARGS_B)],
        },
        "tool_calls",
    ),
    "llama.cpp": answer(
        {"content": None, "tool_calls": [whole_call("", NAME_A, ARGS_A), whole_call("", NAME_B, ARGS_B)]},
        "tool_calls",
    ),
    "Ollama": answer(
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [whole_call("a", NAME_A, ARGS_A, index=0), whole_call("b", NAME_B, ARGS_B, index=0)],
        },
        "tool_calls",
    ),
    "TGI": answer(
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "0", "type": "function", "function": {"name": NAME_A, "arguments": ARGS_A, "description": None}},
                {"id": "0", "type": "function", "function": {"name": NAME_B, "arguments": json.loads(ARGS_B)}},
            ],
        },
        "stop",
    ),
}


def text_event(text: str, finish: str | None = None, **members: Any) -> Json:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]} | members


TEXT_STREAMS: dict[str, list[Json]] = {
    "OpenAI": [*map(text_event, PIECES), text_event("", "stop"), text_event("", usage=USAGE) | {"choices": []}],
    "vLLM": [
        *(text_event(piece, usage=None) for piece in PIECES),
        text_event("", "stop", usage=None),
        text_event("", usage=USAGE) | {"choices": []},
    ],
    "llama.cpp, with its usage on the last event": [
        *(text_event(piece, **TIMINGS) for piece in PIECES),
        text_event("", "stop", usage=USAGE, **TIMINGS),
    ],
    "Ollama": [*map(text_event, PIECES), text_event("", "stop", usage=USAGE)],
    "TGI": [*map(text_event, PIECES), text_event("", "eos_token", usage=USAGE)],
    "SGLang": [
        *(text_event(piece) for piece in PIECES),
        {"choices": [{"index": 0, "text": "", "finish_reason": "stop", "matched_stop": 2}]},
        {"choices": [], "usage": USAGE},
    ],
}
TEXT_REPLIES: dict[str, Json] = {
    "OpenAI": text_event(TEXT, "stop", usage=USAGE),
    "vLLM": text_event(TEXT, "stop", usage=USAGE, kv_transfer_params=None),
    "llama.cpp": text_event(TEXT, "stop", usage=USAGE, **TIMINGS),
    "one that leaves much out": {"choices": [{"text": TEXT}], "usage": USAGE},
}
