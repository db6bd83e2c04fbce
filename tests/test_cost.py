"""An ordinary request costs a gateway no more than this: bytecodes and Python calls on its event loop, counted.

A change that makes it cheaper lowers its bound, to 3 % above what `python -m bench.gateway.bytecodes` counts. One that
makes it dearer finds out which function grew by `--by function`, before and after, and says in its commit why it must.
"""

import asyncio
import dis
import sys
import threading
from contextlib import suppress
from socket import create_server

import openai
import pytest
import uvloop

from bench.gateway.bytecodes import IDLE, Tracer, cost_of
from bench.gateway.inprocess import VARIANTS, Variant
from bench.rig.heads import SDK_HEADERS
from bench.rig.postgres import PostgresServer
from tests.data import model_folder

BOUNDS: dict[Variant, tuple[int, int]] = {  # bytecodes, calls
    "text": (2_400, 54),  # the gate of issue 15, and no more
    "inputs": (3_710, 69),
    "floats": (2_530, 57),
    "limits": (3_090, 71),
    "accounts": (2_780, 59),
    "nodes": (3_280, 72),  # with a canary now and then, which goes the hard way
    "signed": (3_170, 78),
    "postgres": (2_400, 53),
}

pytestmark = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bounds are for the bytecodes of 3.11")


@pytest.mark.model
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_request_costs_no_more(variant: Variant, request: pytest.FixtureRequest) -> None:
    model_folder()
    server: PostgresServer | None = request.getfixturevalue("postgres") if variant == "postgres" else None
    cost = cost_of(variant, server.new() if server is not None else None)
    bytecodes_max, calls_max = BOUNDS[variant]
    dearest = ", ".join(f"{row.name} {row.bytecodes:.0f}" for row in cost.rows[:8])
    assert cost.bytecodes <= bytecodes_max, dearest
    assert cost.calls <= calls_max, dearest


ENTERED: list[str] = []


def inner() -> None:
    ENTERED.append("inner")


def outer() -> None:
    inner()
    inner()


async def upkeep() -> None:
    inner()


async def waits() -> None:
    await asyncio.sleep(0)


def test_what_is_counted() -> None:
    """What the loop enters, and what that calls; a coroutine that goes on, again; not what runs by the clock."""

    async def main() -> Tracer:
        tracer, loop = Tracer(), asyncio.get_running_loop()
        with tracer.counting():
            loop.call_soon(outer)
            await asyncio.gather(upkeep(), waits())
        inner()
        return tracer

    assert {"upkeep"} <= IDLE
    tracer = uvloop.run(main())
    assert len(ENTERED) == 4
    calls = {code.co_name: count for code, count in tracer.calls.items() if code.co_filename == __file__}
    assert calls == {"outer": 1, "inner": 2, "waits": 2}
    each = len([one for one in dis.get_instructions(inner) if one.opname != "RESUME"])
    bytecodes = {code.co_name: count for code, count in tracer.bytecodes.items()}
    assert bytecodes["inner"] == 2 * each


def test_the_callers_of_a_bench_are_like_the_sdk() -> None:
    """The head of its requests is openai-python's own, but for versions and the machine."""
    heads: list[str] = []
    with create_server(("127.0.0.1", 0)) as server:

        def hear() -> None:
            connection, _ = server.accept()
            with connection:
                heads.append(connection.recv(65_536).decode())

        thread = threading.Thread(target=hear)
        thread.start()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.getsockname()[1]}", api_key="k", max_retries=0)
        with client, suppress(openai.APIConnectionError):
            client.embeddings.create(model="m", input="text")
        thread.join()
    sent = dict(line.split(": ", 1) for line in heads[0].partition("\r\n\r\n")[0].split("\r\n")[1:])
    ours = {name.lower() for name in SDK_HEADERS} | {"host", "content-length", "content-type", "authorization"}
    assert {name.lower() for name in sent} == ours
    assert sent["x-stainless-retry-count"] == SDK_HEADERS["x-stainless-retry-count"]
