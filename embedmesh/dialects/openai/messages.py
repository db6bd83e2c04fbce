"""The messages of a chat request: a shape for each role, as OpenAI documents them."""

from typing import Any

from embedmesh.dialects.openai.pictures import base64_of, data_url, kind_of_base64
from embedmesh.dialects.openai.shapes import (
    Reading,
    Shape,
    array_of,
    by_member,
    dropped,
    never,
    object_of,
    one_of,
    string,
    string_or,
    whole,
    wrong_type,
)
from embedmesh.dialects.openai.tools import TOOLS_MAX
from embedmesh.rules.errors import EmptyInput, InvalidValue, MissingParameter

MESSAGES_MAX = 2_048  # of one request: as many as inputs of one for embeddings; a day's talk has some hundred
PARTS_MAX = 1_024  # of one message: an interleaved document has a part for each picture, and one for what is between
INPUT_IMAGES_MAX = 64  # of one request: nodes decode them at once, and most take fewer
NAME_CHARS_MAX = 256  # of an author
CALL_ID_CHARS_MAX = 256  # of a call of a tool; ours have 64 at most

_TEXT = string(text=True)
_NAME = string(chars_max=NAME_CHARS_MAX, text=True)
_CALL_ID = string(chars_max=CALL_ID_CHARS_MAX, text=True)


def _image_url(value: Any, path: str, reading: Reading) -> str:
    if type(value) is not str:
        raise wrong_type(path, "a string", value)
    encoded = base64_of(value)
    if encoded is None:
        raise InvalidValue(
            f"`{path}` must be a `data:image/…;base64,` URL: nodes fetch nothing from addresses that callers name.",
            param=path,
        )
    kind = kind_of_base64(encoded)
    if kind is None:
        raise InvalidValue(f"`{path}` must hold a PNG, JPEG or WebP image in padded base64.", param=path)
    return data_url(kind, encoded)


_IMAGE_URL = object_of(
    {
        "url": Shape(_image_url, {"type": "string", "pattern": "^data:image/", "description": "A `data:` URL."}),
        "detail": one_of("auto", "low", "high"),
    },
    ("url",),
)
_IMAGE = object_of({"type": one_of("image_url"), "image_url": _IMAGE_URL}, ("type", "image_url"))


def _image_part(value: Any, path: str, reading: Reading) -> Any:
    if reading.model.image_tokens is None:
        raise InvalidValue(f"{reading.model.id} takes no images: leave `{path}` out.", param=path)
    reading.images += 1
    if reading.images > INPUT_IMAGES_MAX:
        raise InvalidValue(f"One request takes at most {INPUT_IMAGES_MAX} images.", param=path)
    return _IMAGE.check(value, path, reading)


_OTHER = never("a part is text or an image here.")
_TEXT_PART = object_of({"type": one_of("text"), "text": _TEXT}, ("type", "text"))
_REFUSAL_PART = object_of({"type": one_of("refusal"), "refusal": _TEXT}, ("type", "refusal"))
_NOT_OURS = {"input_audio": _OTHER, "file": _OTHER, "video_url": _OTHER}


def _content(**parts: Shape) -> Shape:
    known = by_member("type", parts | _NOT_OURS)
    return string_or(_TEXT, array_of(known, PARTS_MAX, empty=EmptyInput), "a string or an array of parts")


TEXT_CONTENT = _content(text=_TEXT_PART)
USER_CONTENT = _content(text=_TEXT_PART, image_url=Shape(_image_part, _IMAGE.schema))
ASSISTANT_CONTENT = _content(text=_TEXT_PART, refusal=_REFUSAL_PART)

_CALLED = object_of(
    {"name": string(chars_min=1, chars_max=NAME_CHARS_MAX), "arguments": string()}, ("name",), text=True
)
_TOOL_CALL = by_member(
    "type",
    {
        "function": object_of(
            {
                "id": _CALL_ID,
                "type": one_of("function"),
                "function": _CALLED,
                "index": dropped(whole(0, TOOLS_MAX)),  # left by who has put a stream together
            },
            ("id", "type", "function"),
        ),
        "custom": never("only calls of the type `function` are."),
    },
)
_ASSISTANT: dict[str, Shape] = {
    "role": one_of("assistant"),
    "content": ASSISTANT_CONTENT,
    "name": _NAME,
    "refusal": _TEXT,
    "tool_calls": array_of(_TOOL_CALL, TOOLS_MAX, least=0),
    "function_call": _CALLED,
    "reasoning_content": _TEXT,
    "reasoning": _TEXT,
    "annotations": dropped(array_of(Shape(lambda value, path, reading: value, {}), PARTS_MAX, least=0)),
    "audio": never("there is no audio here."),
}
_ASSISTANT_SHAPE = object_of(_ASSISTANT, ("role",))


def _assistant(value: Any, path: str, reading: Reading) -> dict[str, Any]:
    sent: dict[str, Any] = _ASSISTANT_SHAPE.check(value, path, reading)
    if "reasoning" in sent:
        sent.setdefault("reasoning_content", sent.pop("reasoning"))
    if not sent.get("tool_calls"):
        sent.pop("tool_calls", None)
    if "content" not in sent:
        if not sent.keys() & {"tool_calls", "function_call", "refusal"}:
            raise MissingParameter(
                f"`{path}.content` may be null only beside `tool_calls`, `function_call` or `refusal`.",
                param=f"{path}.content",
            )
        sent["content"] = None  # some nodes want the member itself
    return sent


def _spoken(role: str, content: Shape) -> Shape:
    return object_of({"role": one_of(role), "content": content, "name": _NAME}, ("role", "content"))


_TOOL = object_of(
    {"role": one_of("tool"), "content": TEXT_CONTENT, "tool_call_id": _CALL_ID, "name": _NAME},
    ("role", "content", "tool_call_id"),
)
_FUNCTION = object_of({"role": one_of("function"), "content": _TEXT, "name": _NAME}, ("role", "content", "name"))

MESSAGES = array_of(
    by_member(
        "role",
        {
            "system": _spoken("system", TEXT_CONTENT),
            "developer": _spoken("developer", TEXT_CONTENT),
            "user": _spoken("user", USER_CONTENT),
            "assistant": Shape(_assistant, _ASSISTANT_SHAPE.schema),
            "tool": _TOOL,
            "function": _FUNCTION,
        },
    ),
    MESSAGES_MAX,
    empty=EmptyInput,
)
