"""Reference pages that are made from the code: the API, commands, errors, headers. `make docs ARGS=write` writes them.

tests/test_site.py finds one that is not up to date. docs/reference/ has those that people write, too.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from bench.site.build import ROOT
from embedmesh import __version__
from embedmesh.commands.group import COMMANDS, cli
from embedmesh.gateway.api.openapi import document
from embedmesh.gateway.api.openapi.responses import HEADERS
from embedmesh.http.failures import TABLE, hint_headers
from embedmesh.rules import errors
from embedmesh.rules.errors import Failure, Fault, Retry

Json = dict[str, Any]

FOLDER = ROOT / "docs" / "reference"
MADE = "<!-- Made from the code by `make docs ARGS=write`. Do not change it here. -->"
HELP_CHARS = 100  # of a line of help
SCOPE_WORDS = {"nodeSignature": "a node's signature"}
FAULTS = {Fault.CALLER: "the request's", Fault.NODE: "a node's", Fault.US: "the gateway's"}
RETRIES = {Retry.USELESS: "no", Retry.OTHER_NODE: "yes", Retry.LATER: "yes, later"}

OF_REQUESTS = {
    "Authorization": "`Bearer KEY`: the API key. Of every route that needs one.",
    "api-key": "The API key, as Azure's clients send it, instead of `Authorization`.",
    "Content-Type": "`application/json`; for files `multipart/form-data`.",
    "x-request-id": "An id of yours, 1 to 128 characters of `A-Z a-z 0-9 . _ -`; the reply repeats it.",
    "x-stainless-retry-count": "Sent by OpenAI's SDKs: how often this request was sent before. With 1 or more, a reply "
    "that was paid and not read within the last minute is given again.",
    "x-embedmesh-next-lock": "Of a sealed request: the units of the lock that its caller wants for the next one, and "
    "behind them, if only some nodes will do, their ids ([confidential requests](contract.md#callers)).",
    "X-Forwarded-For": "Believed of `--trusted-proxies` only: its last entry is the client's address.",
    "Origin": "Of a page in a browser: answered where `--cors-origin` has it.",
    "Upgrade": "`embedmesh-node`: a node that dials out ([node protocol](node-protocol.md)).",
}


def pages() -> dict[Path, str]:
    """Each page that is made from the code, and its text."""
    made = {"api.md": api_page, "cli.md": cli_page, "errors.md": errors_page, "headers.md": headers_page}
    return {FOLDER / name: "\n".join(page()).rstrip() + "\n" for name, page in made.items()}


def write() -> list[Path]:
    """Writes the pages that differ; which those were."""
    changed = [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in changed:
        path.write_text(pages()[path], "utf-8")
    return changed


# -- the API -----------------------------------------------------------------------------------------------------------


def api_page() -> Iterator[str]:
    """Every route of the OpenAPI document by subject, and every object."""
    api = document(__version__)
    yield from ("# The API", "", MADE, "")
    yield (
        "Every route of a gateway. A gateway serves the same as OpenAPI 3.1 at `/openapi.json`, "
        "and at `/docs` with a form to try it. [What you may rely on](contract.md) says what is promised; "
        "[errors](errors.md) and [headers](headers.md) have pages of their own."
    )
    for tag in api["tags"]:
        yield from ("", f"## {tag['name']}", "", tag["description"])
        for path, methods in api["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    yield from _operation(method.upper(), path, operation)
    yield from ("", "## Objects")
    for name, schema in sorted(api["components"]["schemas"].items()):
        yield from _object(name, schema)


def _operation(method: str, path: str, operation: Json) -> Iterator[str]:
    yield from ("", f"### `{method} {path}`", "", f"**{operation['summary']}.** {_line(operation['description'])}", "")
    yield f"Key: {_keys(operation['security'])}."
    if parameters := operation.get("parameters"):
        yield from ("", "| parameter | in | what it is |", "|---|---|---|")
        for one in parameters:
            what = _cell(one["description"]) + ("" if one["required"] else f" Optional; {_type(one['schema'])}.")
            yield f"| `{one['name']}` | {one['in']} | {what} |"
    if body := operation.get("requestBody"):
        kinds = [f"{_type(content['schema'])} (`{kind}`)" for kind, content in body["content"].items()]
        yield from ("", f"Body: {' or '.join(kinds)}{'' if body.get('required') else ', which may be left out'}.")
    yield from ("", "| status | reply |", "|---|---|")
    for status, reply in operation["responses"].items():
        yield f"| {status} | {_reply(reply)} |"


def _keys(security: list[Json]) -> str:
    """Whose key, in words."""
    if not security:
        return "none"
    if "nodeSignature" in security[0]:
        return SCOPE_WORDS["nodeSignature"]
    scopes = [scope for one in security for scope in one["bearerAuth"]]
    return "scope " + " or ".join(f"`{scope}`" for scope in scopes) if scopes else "any"


def _reply(reply: Json) -> str:
    content = reply.get("content", {})
    codes = [
        code
        for one in content.values()
        for part in one["schema"].get("allOf", ())
        for code in part.get("properties", {}).get("error", {}).get("properties", {}).get("code", {}).get("enum", ())
    ]
    if codes:
        return f"{_cell(reply['description'])} {', '.join(f'`{code}`' for code in codes)}"
    kinds = [f"{_type(one['schema'])} (`{kind}`)" for kind, one in content.items()]
    return " ".join([_cell(reply["description"]), *([f"{' or '.join(kinds)}."] if kinds else [])])


def _object(name: str, schema: Json) -> Iterator[str]:
    yield from ("", f"### {name}", "")
    if schema.get("description"):
        yield from (_line(schema["description"]), "")
    if not (members := schema.get("properties")):
        yield _type(schema)
        return
    required = set(schema.get("required", ()))
    yield from ("| member | type | what it is |", "|---|---|---|")
    for member, kind in members.items():
        what = _cell(kind.get("description", ""))
        default = f" Default: `{kind['default']}`." if kind.get("default") not in (None, "", [], {}) else ""
        yield f"| `{member}`{'' if member in required else ' (optional)'} | {_type(kind)} | {what}{default} |"


def _type(schema: Json) -> str:
    """A schema in words, for a cell of a table."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_slug(name)})"
    for many in ("anyOf", "oneOf", "allOf"):
        if many in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[many]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kinds = schema.get("type", "any")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    words = [_array(schema) if kind == "array" else kind for kind in kinds]
    return " or ".join(words) + _bounds(schema)


def _array(schema: Json) -> str:
    return f"array of {_type(schema['items'])}" if schema.get("items") else "array"


def _bounds(schema: Json) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    found = [f"≥ {low}"] if low is not None else []
    found += [f"≤ {high}"] if high is not None else []
    found += [f"{schema['maxLength']} characters at most"] if "maxLength" in schema else []
    found += [f"{schema['maxItems']} at most"] if "maxItems" in schema else []
    return f" ({', '.join(found)})" if found else ""


def _slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _line(text: str) -> str:
    """In one line, and nothing in it is taken for a tag."""
    return re.sub(r"<(?=[a-zA-Z/])", "&lt;", " ".join(text.split()))


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


# -- commands ----------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command and group by its name, as in `keys create`."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield name, command
        for sub, each in command.commands.items() if isinstance(command, click.Group) else ():
            yield f"{name} {sub}", each


def cli_page() -> Iterator[str]:
    """What `--help` says, of each command."""
    yield from ("# Commands", "", MADE, "")
    yield (
        "What `embedmesh COMMAND --help` says. Every command that prints a result takes `--json`. Commands end "
        "with 0 if all went well, 1 if not, 2 where an option is wrong, 78 where the machine or the set-up must be "
        "mended first, 130 after Ctrl-C. [Settings](settings.md) says which options are variables of the environment, "
        "too."
    )
    for name, command in commands():
        yield from ("", f"## embedmesh {name}", "", "```text", *help_of(f"embedmesh {name}", command), "```")


def help_of(name: str, command: click.Command) -> Iterable[str]:
    """The lines of its help, as wide everywhere."""
    context = click.Context(command, info_name=name, terminal_width=HELP_CHARS, max_content_width=HELP_CHARS)
    context.help_option_names = ["-h", "--help"]
    return [line.rstrip() for line in command.get_help(context).splitlines()]


# -- errors and headers ------------------------------------------------------------------------------------------------


def errors_page() -> Iterator[str]:
    """The table of failures."""
    yield from ("# Errors", "", MADE, "")
    yield (
        'Every failure has the body `{"error": {"message", "type", "param", "code"}}` and an `x-request-id`. '
        "The message says what is wrong, where, and what to do; `param` names the member at fault, such as `input.3`. "
        "SDKs try again by themselves what may be tried again. In a stream that has begun, a failure is an event, "
        '`data: {"error": …}`, and no `[DONE]` follows.'
    )
    yield from (
        "",
        "| status | `code`, `type` | what it means | whose fault | try again? | headers |",
        "|---|---|---|---|---|---|",
    )
    for failure, (status, kind) in sorted(TABLE.items(), key=lambda row: (row[1][0], row[0].code)):
        headers = "<br>".join(f"`{name}`" for name in _hints(failure))
        meaning = _cell(re.split(r"(?<=[.])\s", (failure.__doc__ or "").strip(), maxsplit=1)[0])  # the rest is for us
        fault, again = FAULTS[failure.fault], RETRIES[failure.retry]
        yield f"| {status} | `{failure.code}`<br>`{kind}` | {meaning} | {fault} | {again} | {headers} |"


def _hints(failure: type[Failure]) -> list[str]:
    sample = errors.MethodNotAllowed("", allowed=()) if failure is errors.MethodNotAllowed else failure("")
    return list(hint_headers(sample))


def headers_page() -> Iterator[str]:
    """What requests may have, and what replies have."""
    api = document(__version__)
    operations = [(method.upper(), path, op) for path, ops in api["paths"].items() for method, op in ops.items()]
    given: dict[str, str] = dict(OF_REQUESTS)
    for _, _, operation in operations:
        for one in operation.get("parameters", ()):
            if one["in"] == "header":
                given.setdefault(one["name"], one["description"])
    yield from ("# Headers", "", MADE, "", "Names are shown as the OpenAPI document has them; case does not count.", "")
    yield from ("## Of requests", "", "| header | what it is |", "|---|---|")
    for name, what in sorted(given.items(), key=lambda row: row[0].lower()):
        yield f"| `{name}` | {_cell(what)} |"
    yield from ("", "## Of replies", "", "| header | what it says | where |", "|---|---|---|")
    for name, what in sorted(HEADERS.items(), key=lambda row: row[0].lower()):
        places = {(method, path) for method, path, operation in operations if name in _headers_of(operation)}
        yield f"| `{name}` | {_cell(what)} | {_where(places, len(operations))} |"


def _headers_of(operation: Json) -> set[str]:
    return {name for reply in operation["responses"].values() for name in reply.get("headers", ())}


def _where(places: set[tuple[str, str]], of: int) -> str:
    """Routes in words: all, some by name, or how many."""
    if len(places) == of:
        return "every reply"
    named = [f"`{method} {path}`" for method, path in sorted(places, key=lambda one: one[1])]
    return ", ".join(named) if len(named) <= 4 else f"{len(named)} routes"
