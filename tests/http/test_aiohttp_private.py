"""What `embedmesh/http/aiohttp_connection.py` uses of aiohttp without its documentation is there, and is the same.

If a test here fails after an update of aiohttp, read the named part of its `web_protocol.py` before you move the pin.
"""

import ast
import asyncio
import inspect
import re
import tomllib
from collections import deque
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import http_exceptions, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_writer import StreamWriter

from embedmesh.http import aiohttp_connection
from embedmesh.http.server import HttpServer
from tests.http.raw import read_reply, request, serving

PACKAGE = Path(aiohttp_connection.__file__).parents[1]

ATTRIBUTES = {"_messages": deque, "_request_count": int, "_waiter": type(None), "_task_handler": type(None)}
"""Private attributes of a new `RequestHandler`: the heads that wait, how many came, what it waits on, its task."""

OVERRIDDEN = {
    "close": [],
    "connection_lost": ["exc"],
    "connection_made": ["transport"],
    "data_received": ["data"],
    "finish_response": ["request", "resp", "start_time"],
    "force_close": [],
    "handle_error": ["request", "status", "exc", "message"],
    "resume_writing": [],
    "shutdown": ["timeout"],
}
"""Methods of `RequestHandler` that we call or replace, and their parameters."""

OPTIONS = {
    "loop",
    "keepalive_timeout",
    "lingering_time",
    "max_line_size",
    "max_field_size",
    "max_headers",
    "read_bufsize",
    "auto_decompress",
    "access_log",
}


def test_aiohttps_minor_version_is_pinned() -> None:
    """And the one that is installed is the one that these tests have looked at."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    [pin] = [each for each in project["dependencies"] if each.startswith("aiohttp")]
    low, high = re.fullmatch(r"aiohttp>=(\d+\.\d+),<(\d+\.\d+)", pin).groups()  # type: ignore[union-attr]
    major, minor = map(int, low.split("."))
    assert high == f"{major}.{minor + 1}"
    assert aiohttp.__version__.startswith(f"{low}.")


async def test_private_attributes_are_of_the_known_kind() -> None:
    nothing: Any = lambda _: None  # noqa: E731 - never called
    handler = web.RequestHandler(web.Server(nothing), loop=asyncio.get_running_loop())
    for name, kind in ATTRIBUTES.items():
        assert hasattr(handler, name), f"aiohttp's RequestHandler has no {name} any more"
        assert type(getattr(handler, name)) is kind, f"{name} is another thing now"
        assert name in inspect.getsource(aiohttp_connection), f"{name} is no longer used: take it from this list"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_methods_have_the_known_parameters(name: str) -> None:
    method = getattr(web.RequestHandler, name, None)
    assert method is not None, f"aiohttp's RequestHandler has no {name} any more"
    assert list(inspect.signature(method).parameters)[1:] == OVERRIDDEN[name]
    assert inspect.iscoroutinefunction(method) is (name in ("finish_response", "shutdown"))


def test_options_and_helpers_are_there() -> None:
    assert set(inspect.signature(web.RequestHandler).parameters) >= OPTIONS
    assert callable(web.Server.pre_shutdown)
    assert issubclass(StreamWriter, AbstractStreamWriter)
    for name in ("send_headers", "drain", "write_eof"):
        assert callable(getattr(StreamWriter, name, None)), f"aiohttp's StreamWriter has no {name} any more"
    assert "output_size" in dir(StreamWriter)


def test_the_parsers_exceptions_say_what_they_said() -> None:
    """`refused_by_parser` knows them by kind, by the bound, and by these words of theirs, which other tests provoke."""
    assert http_exceptions.LineTooLong(b"x", 8_000).args[1] == 8_000
    assert http_exceptions.BadHttpMessage("words").message == "words"
    assert issubclass(http_exceptions.BadHttpMethod, http_exceptions.BadHttpMessage)


async def test_the_states_of_a_connection_show_in_them() -> None:
    """Idle: it waits and no head is there. In a request: it does not wait. Afterwards: idle again, one more counted."""
    gate, entered = asyncio.Event(), asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        entered.set()
        await gate.wait()
        return web.Response(body=b"{}")

    server = HttpServer({"/": {"GET": handler}})
    async with serving(server) as port, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not server._aiohttp.connections:
            await asyncio.sleep(0.001)
        connection: Any
        [connection] = server._aiohttp.connections
        await asyncio.sleep(0.001)
        assert (len(connection._messages), connection._request_count) == (0, 0)
        assert connection._waiter is not None
        writer.write(request("GET", "/") * 2)
        await entered.wait()
        assert (len(connection._messages), connection._request_count, connection._waiter) == (1, 2, None)
        assert isinstance(connection._task_handler, asyncio.Task)
        gate.set()
        for _ in range(2):
            assert (await read_reply(reader)).status == 200
        while connection._waiter is None:
            await asyncio.sleep(0.001)
        assert (len(connection._messages), connection._request_count) == (0, 2)
        writer.close()


def test_only_one_module_uses_them() -> None:
    """Elsewhere no module of aiohttp but its documented ones is imported, and no private name of a request is read."""
    documented = {"aiohttp", "aiohttp.web"}
    for file in PACKAGE.rglob("*.py"):
        if file == Path(aiohttp_connection.__file__):
            continue
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("aiohttp"):
                assert node.module in documented, f"{file} imports {node.module}"
        if "aiohttp" in text:
            for name in (*ATTRIBUTES, "output_size", "send_headers", "finish_response", "handle_error"):
                assert not re.search(rf"\brequest\b[\w.]*\.{name}\b|self\.{name}\b", text), f"{file} uses {name}"
