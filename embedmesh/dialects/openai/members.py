"""The members of requests to generate: for each its shape, where it goes, and its documentation, in one table a path.

The OpenAPI document is generated from these tables, so it says what is checked. Members that only make sense together
are looked at in `chat`, `completions` and `images`.
"""

from typing import Any

import msgspec

from embedmesh.dialects.openai.messages import MESSAGES
from embedmesh.dialects.openai.requests import Member, request_schema
from embedmesh.dialects.openai.shapes import (
    Reading,
    Schema,
    Shape,
    any_object,
    array_of,
    flag,
    never,
    number,
    object_of,
    one_of,
    only,
    string,
    string_or,
    whole,
)
from embedmesh.dialects.openai.tools import FUNCTION_CALL, FUNCTIONS, RESPONSE_FORMAT, TOOL_CHOICE, TOOLS
from embedmesh.rules.errors import EmptyInput
from embedmesh.rules.limits import CONTEXT_TOKENS_MAX, GENERATED_CHOICES_MAX, IMAGES_MAX, USER_CHARS_MAX

STOPS_MAX = 16  # OpenAI takes four, vLLM more
STOP_CHARS_MAX = 1_024  # of a stop sequence; each is looked for after every token
TOP_LOGPROBS_MAX = 20  # of a chat, as OpenAI has it
LOGPROBS_MAX = 5  # of a completion, as OpenAI has it
LOGIT_BIASES_MAX = 1_024  # as vLLM has it; each is added at every token
METADATA_MAX = 16  # as OpenAI has it
SEED_MAX = 2**63 - 1  # nodes keep it in 64 bits
TOKEN_ID_MAX = 2**31 - 1  # nodes keep them in 32 bits
IMAGE_PROMPT_CHARS_MAX = 32_000  # as OpenAI has it for its largest models
SUFFIX_CHARS_MAX = 1_000_000  # of what comes after the completion; the context of the model bounds it, too
KEY_CHARS_MAX = 512  # of keys and names that change nothing here

_LIMIT = whole(1, CONTEXT_TOKENS_MAX)
_STOP = string(chars_min=1, chars_max=STOP_CHARS_MAX)
_IGNORED = " Changes nothing: it is named in `x-embedmesh-ignored`."
_PENALTY = number(-2, 2)
_NOTHING_STORED = "nothing of requests and replies is stored here."

MODEL = Member(string(), "here", "A served model, or an alias of it.")
USER = Member(
    string(chars_max=USER_CHARS_MAX),
    "here",
    "Your own id of the person behind the call; only a keyed hash of it is kept, and no node sees it.",
)
_SAMPLING = {
    "frequency_penalty": Member(_PENALTY, "node", "Above 0, tokens become less likely the more often they occurred."),
    "presence_penalty": Member(_PENALTY, "node", "Above 0, tokens become less likely once they have occurred."),
    "temperature": Member(number(0, 2), "node", "How random tokens are chosen; 0 takes the likeliest."),
    "top_p": Member(number(0, 1), "node", "Tokens are chosen of the likeliest that have this much probability."),
    "seed": Member(whole(-SEED_MAX - 1, SEED_MAX), "node", "The same seed gives the same answer, as far as nodes can."),
    "stop": Member(
        string_or(_STOP, array_of(_STOP, STOPS_MAX), "a string or an array of strings"),
        "node",
        "Where the answer ends; the stop sequence is no part of it.",
    ),
    "logit_bias": Member(
        any_object(LOGIT_BIASES_MAX, number(-100, 100), "[0-9]{1,10}"),
        "node",
        "By token id of the model's own vocabulary: what is added to its logit.",
    ),
}
_STREAM = {
    "stream": Member(flag(), "here", "Whether the answer comes in server-sent events, as it is made."),
    "stream_options": Member(
        object_of(
            {
                "include_usage": flag(),
                "include_obfuscation": only(False, "events are not padded here."),
            }
        ),
        "here",
        "`include_usage`: whether the last event of a stream tells its usage.",
    ),
}

CHAT_REQUIRED = ("model", "messages")
CHAT: dict[str, Member] = {
    "model": MODEL,
    "messages": Member(MESSAGES, "node", "The talk until now."),
    "max_completion_tokens": Member(_LIMIT, "here", "The most tokens of one answer, those of its reasoning included."),
    "max_tokens": Member(
        _LIMIT, "here", "An older word for `max_completion_tokens`. If both are given, they are equal."
    ),
    "n": Member(whole(1, GENERATED_CHOICES_MAX), "node", "How many answers are made. Each is paid."),
    **_STREAM,
    **_SAMPLING,
    "logprobs": Member(flag(), "node", "Whether the answer has the log probabilities of its tokens."),
    "top_logprobs": Member(
        whole(0, TOP_LOGPROBS_MAX), "node", "How many likely tokens are told at each place; needs `logprobs`."
    ),
    "tools": Member(TOOLS, "node", "Functions that the model may call."),
    "tool_choice": Member(TOOL_CHOICE, "node", "Whether a tool is called, or which."),
    "parallel_tool_calls": Member(flag(), "node", "Whether one answer may call several tools."),
    "functions": Member(FUNCTIONS, "node", "An older form of `tools`."),
    "function_call": Member(FUNCTION_CALL, "node", "An older form of `tool_choice`."),
    "response_format": Member(RESPONSE_FORMAT, "node", "The form of the answer: text, or JSON, by a schema if given."),
    "reasoning_effort": Member(
        one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"), "node", "How long the model reasons."
    ),
    "verbosity": Member(one_of("low", "medium", "high"), "node", "How long the answer is."),
    "modalities": Member(array_of(one_of("text"), 1), "here", "Answers are text."),
    "user": USER,
    "service_tier": Member(one_of("auto", "default"), "nowhere", "There is one tier." + _IGNORED),
    "store": Member(only(False, _NOTHING_STORED), "nowhere", "Nothing is stored." + _IGNORED),
    "metadata": Member(any_object(METADATA_MAX, string(chars_max=KEY_CHARS_MAX)), "nowhere", "Tags." + _IGNORED),
    "safety_identifier": Member(string(chars_max=KEY_CHARS_MAX), "nowhere", "Another `user`." + _IGNORED),
    "prompt_cache_key": Member(string(chars_max=KEY_CHARS_MAX), "nowhere", "A hint for OpenAI's caches." + _IGNORED),
    "prompt_cache_retention": Member(one_of("in_memory"), "nowhere", "Nodes cache in memory, if they do." + _IGNORED),
    "prompt_cache_options": Member(never("nodes cache as they are set up."), "nowhere", "Not taken."),
    "audio": Member(never("there is no audio here."), "nowhere", "Not taken."),
    "moderation": Member(never("nothing is moderated here."), "nowhere", "Not taken."),
    "prediction": Member(never("nodes of most makes know no predictions."), "nowhere", "Not taken."),
    "web_search_options": Member(never("nothing is searched here."), "nowhere", "Not taken."),
}

_TEXT_PROMPT = string(chars_min=1, text=True, empty=EmptyInput)
_TOKEN_ID = whole(0, TOKEN_ID_MAX)
_EACH_ID = array_of(_TOKEN_ID, CONTEXT_TOKENS_MAX, empty=EmptyInput)


def _ids(value: Any, path: str, reading: Reading) -> list[int]:
    """All at once, since there may be 300,000; one by one only to say which is wrong."""
    if isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= TOKEN_ID_MAX:
        return value
    ids: list[int] = _EACH_ID.check(value, path, reading)
    return ids


_IDS = Shape(_ids, _EACH_ID.schema)


def _prompt() -> Shape:
    """A text, texts, ids, or arrays of ids; the first entry says of which kind all are."""
    texts = array_of(_TEXT_PROMPT, GENERATED_CHOICES_MAX, empty=EmptyInput)
    arrays = array_of(_IDS, GENERATED_CHOICES_MAX, empty=EmptyInput)

    def check(value: object, path: str, reading: Reading) -> object:
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(value, str):
            shape = _TEXT_PROMPT
        elif isinstance(first, list):
            shape = arrays
        else:
            shape = _IDS if type(first) is int else texts
        return shape.check(value, path, reading)

    return Shape(check, {"anyOf": [_TEXT_PROMPT.schema, texts.schema, _IDS.schema, arrays.schema]})


COMPLETIONS_REQUIRED = ("model", "prompt")
COMPLETIONS: dict[str, Member] = {
    "model": MODEL,
    "prompt": Member(_prompt(), "node", "A text, or several; or token ids of the model's own vocabulary."),
    "max_tokens": Member(_LIMIT, "here", "The most tokens of one answer."),
    "n": Member(whole(1, GENERATED_CHOICES_MAX), "node", "How many answers each prompt gets."),
    "best_of": Member(
        whole(1, GENERATED_CHOICES_MAX),
        "node",
        "How many answers are made for each prompt; the best `n` are kept. All are paid.",
    ),
    "echo": Member(flag(), "node", "Whether the answer begins with the prompt."),
    "suffix": Member(string(chars_max=SUFFIX_CHARS_MAX, text=True), "node", "What comes after the completion."),
    "logprobs": Member(whole(0, LOGPROBS_MAX), "node", "How many likely tokens are told at each place."),
    **_STREAM,
    **_SAMPLING,
    "user": USER,
}

IMAGES_REQUIRED = ("model", "prompt")
IMAGES: dict[str, Member] = {
    "model": MODEL,
    "prompt": Member(
        string(chars_min=1, chars_max=IMAGE_PROMPT_CHARS_MAX, text=True, empty=EmptyInput), "node", "What to show."
    ),
    "n": Member(whole(1, IMAGES_MAX), "node", "How many images are made. Each is paid."),
    "size": Member(
        string(chars_max=KEY_CHARS_MAX), "here", "One of the model's sizes, like `1024x1024`; by default its own."
    ),
    "quality": Member(
        one_of("auto", "standard", "hd", "low", "medium", "high"), "node", "As the model understands it."
    ),
    "style": Member(one_of("vivid", "natural"), "node", "As the model understands it."),
    "response_format": Member(
        one_of("url", "b64_json"),
        "here",
        "`url` is a `data:` URL, which holds the image. By default each image comes as both.",
    ),
    "stream": Member(only(False, "images are not streamed here."), "here", "Images are not streamed."),
    "user": USER,
}


class ChatRequest(msgspec.Struct):
    """Stands for the schema of the request, which is made from `CHAT`."""


class CompletionRequest(msgspec.Struct):
    """Stands for the schema of the request, which is made from `COMPLETIONS`."""


class ImageRequest(msgspec.Struct):
    """Stands for the schema of the request, which is made from `IMAGES`."""


def request_schemas() -> dict[str, Schema]:
    """The three requests for the OpenAPI document, by the names of their schemas."""
    return {
        ChatRequest.__name__: request_schema(CHAT, CHAT_REQUIRED),
        CompletionRequest.__name__: request_schema(COMPLETIONS, COMPLETIONS_REQUIRED),
        ImageRequest.__name__: request_schema(IMAGES, IMAGES_REQUIRED),
    }
