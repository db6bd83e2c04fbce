"""What a chat request says of tools and of the form of its answer: shapes of JSON, as OpenAI documents them."""

from typing import Any

from embedmesh.dialects.openai.shapes import (
    any_object,
    array_of,
    by_member,
    flag,
    never,
    object_of,
    one_of,
    string,
    string_or,
)
from embedmesh.rules.errors import InvalidValue

TOOLS_MAX = 128  # of one request, as OpenAI has it
SCHEMA_MEMBERS_MAX = 1_024  # of the outer object of a schema; how deep it is, and how large in all, the body bounds
DESCRIPTION_CHARS_MAX = 65_536  # of a tool; a page of its manual takes 4,000
FUNCTION_NAME = "[A-Za-z0-9_-]{1,64}"

_CUSTOM = never("only tools of the type `function` are, because few nodes know others.")
_NAME = string(pattern=FUNCTION_NAME)
_SCHEMA = any_object(SCHEMA_MEMBERS_MAX)
_DESCRIPTION = string(chars_max=DESCRIPTION_CHARS_MAX)
FUNCTION = object_of(
    {"name": _NAME, "description": _DESCRIPTION, "parameters": _SCHEMA, "strict": flag()}, ("name",), text=True
)
TOOLS = array_of(
    by_member(
        "type",
        {
            "function": object_of({"type": one_of("function"), "function": FUNCTION}, ("type", "function")),
            "custom": _CUSTOM,
        },
    ),
    TOOLS_MAX,
    least=0,
)
FUNCTIONS = array_of(FUNCTION, TOOLS_MAX)

_NAMED = object_of({"name": _NAME}, ("name",))
TOOL_CHOICE = string_or(
    one_of("none", "auto", "required"),
    by_member(
        "type",
        {
            "function": object_of({"type": one_of("function"), "function": _NAMED}, ("type", "function")),
            "allowed_tools": never("give only those tools that are allowed."),
            "custom": _CUSTOM,
        },
    ),
    "a string or an object",
)
FUNCTION_CALL = string_or(one_of("none", "auto"), _NAMED, "a string or an object")

_JSON_SCHEMA = object_of(
    {"name": _NAME, "description": _DESCRIPTION, "schema": _SCHEMA, "strict": flag()}, ("name",), text=True
)
RESPONSE_FORMAT = by_member(
    "type",
    {
        "text": object_of({"type": one_of("text")}, ("type",)),
        "json_object": object_of({"type": one_of("json_object")}, ("type",)),
        "json_schema": object_of({"type": one_of("json_schema"), "json_schema": _JSON_SCHEMA}, ("type", "json_schema")),
    },
)


def check_tools(body: dict[str, Any]) -> None:
    """Raise InvalidValue where members about tools do not fit each other; take out those that then say nothing."""
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if not body.get(tools):
            body.pop(tools, None)
            if body.get(choice) not in (None, "none", "auto"):
                raise InvalidValue(f"`{choice}` names a tool or wants one: give `{tools}`, too.", param=choice)
            body.pop(choice, None)
    if "tools" in body and "functions" in body:
        raise InvalidValue("`functions` is an older word for `tools`: send one of them.", param="functions")
    if "tools" not in body:
        body.pop("parallel_tool_calls", None)
    named = body.get("tool_choice")
    names = {tool["function"]["name"] for tool in body.get("tools", ())}
    if isinstance(named, dict) and named["function"]["name"] not in names:
        raise InvalidValue("`tool_choice` names none of `tools`.", param="tool_choice.function.name")
    named = body.get("function_call")
    if isinstance(named, dict) and named["name"] not in {function["name"] for function in body["functions"]}:
        raise InvalidValue("`function_call` names none of `functions`.", param="function_call.name")
