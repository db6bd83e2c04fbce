"""Servers of other makes as nodes of a gateway: what its operator is told of them, by API, command, log and metrics."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from embedmesh.commands.nodes import nodes
from embedmesh.fleet.load import Load
from embedmesh.fleet.registry import Node
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeTooSlow, NodeUnreachable
from embedmesh.rules.nodes import Check, NodeState
from tests.gateway.mesh import Gateway, says, until
from tests.gateway.test_foreign import Asked, Reply, ok, server
from tests.gateway.test_upstream_replies import http, saying

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "acme/tiny"
COLUMNS = 80
RIGHT = http(json.dumps({"data": [{"embedding": [1.0, 2.0, 3.0, 4.0]}]}).encode())
MANY = http(json.dumps({"data": [{"embedding": [1.0, 2.0, 3.0, 4.0]}] * 16}).encode())


async def add(gw: Gateway, port: int, name: str, **more: Any) -> dict[str, Any]:
    """What the admin API says of a server that was just added."""
    asked = {"address": f"http://127.0.0.1:{port}", "models": [{"id": MODEL}], "name": name} | more
    reply = await gw.admin("POST", "/nodes", asked)
    assert reply.status == 200, reply.body
    return dict(json.loads(reply.body))


async def command(gw: Gateway, tmp_path: Path, *words: object) -> Result:
    """`embedmesh nodes ...`, as an operator says it."""
    key = tmp_path / "admin.key"
    key.write_text(gw.key("admin"))
    given = [*map(str, words), "--url", f"{gw.url}/v1", "--admin-key-file", str(key)]
    return await asyncio.to_thread(CliRunner().invoke, nodes, given)


@asynccontextmanager
async def added(gw: Gateway, name: str) -> AsyncIterator[Node]:
    """A server that answers rightly, ready; and removed in the end."""
    async with saying(RIGHT, MANY) as (port, _):
        try:
            assert (await add(gw, port, name))["state"] == "ready"
            node = gw.node(name)
            assert node is not None
            yield node
        finally:
            await gw.act(name, "remove")


async def shown(gw: Gateway, name: str) -> dict[str, Any]:
    return dict(json.loads((await gw.admin("GET", f"/nodes/{name}")).body))


def lines_of(result: Result, name: str) -> list[str]:
    return [line for line in result.output.splitlines() if name in line]


# -- when it is added --------------------------------------------------------------------------------------------------

REFUSED = [
    # what it answers, the check that failed, what operators read
    ("400 Bad Request", Check.STATUS_4XX, "it refuses: HTTP 400"),
    ("401 Unauthorized", Check.ACCESS, "it refuses: HTTP 401; is its token right?"),
    ("403 Forbidden", Check.ACCESS, "it refuses: HTTP 403; is its token right?"),
    ("404 Not Found", Check.STATUS_4XX, "it refuses: HTTP 404; are its address and its name for the model right?"),
    ("422 Unprocessable Content", Check.STATUS_4XX, "it refuses: HTTP 422"),
]


@pytest.mark.parametrize(("status", "check", "words"), REFUSED)
async def test_a_server_that_refuses_is_told_at_once_and_hardly_asked_again(
    gw: Gateway, tmp_path: Path, status: str, check: Check, words: str
) -> None:
    """With the status and the check, by API and by command; never with what the server wrote."""
    name = f"refuses-{status[:3]}"
    async with saying(http(b'{"error": "the password is sesame"}', status=status)) as (port, asked):
        found = await add(gw, port, name)
        assert (found["state"], found["last_check"], found["last_failure"]) == ("unproven", check.value, words)
        assert found["failures"] == {check.value: 1}
        assert found["last_failed_s_ago"] >= 0
        assert len(asked) <= 2, "once with `encoding_format`, and once without"
        said = await command(gw, tmp_path, "add", f"http://127.0.0.1:{port}", "--model", MODEL, "--name", name)
        assert said.exit_code == 1
        assert f"What it failed: {check.value}: {words}\n" in said.output
        assert f"{name} failed {check.value}: {words}" in " ".join((await command(gw, tmp_path, "list")).output.split())
        assert "sesame" not in said.output
        page = (await gw.ask("GET", "/metrics", key=gw.key("metrics"))).body.decode()
        assert f'embedmesh_node_failures_total{{check="{check.value}",node="{name}"}} 1.0' in page
        assert f'embedmesh_node_tokens_per_second{{node="{name}"}}' not in page, "nothing was measured"
    await gw.act(name, "remove")


async def test_a_server_that_refuses_is_left_alone_for_seconds(gw: Gateway) -> None:
    """Seen: 5.8 requests a second, for ever."""
    async with saying(http(b"{}", status="401 Unauthorized")) as (port, asked):
        await add(gw, port, "closed")
        await asyncio.sleep(1.5)  # six looks of its prober
        assert len(asked) == 1
    await gw.act("closed", "remove")


async def test_one_that_sends_us_elsewhere_is_not_followed(gw: Gateway) -> None:
    async with saying(http(b"", "Location: http://127.0.0.1:1/\r\n", "308 Permanent Redirect")) as (port, _):
        found = await add(gw, port, "moved")
        assert (found["state"], found["last_check"]) == ("unproven", "status_other")
        assert found["last_failure"] == "it answered HTTP 308; it redirects us: is its address right?"
    await gw.act("moved", "remove")


async def test_a_server_that_is_not_there_is_told_as_that(gw: Gateway) -> None:
    async with saying(b"") as (port, _):
        pass
    found = await add(gw, port, "nobody")
    assert (found["state"], found["last_check"]) == ("unproven", "connect")
    assert (found["failures"], found["busy"]) == ({}, 0) and found["unreached"] >= 1
    await gw.act("nobody", "remove")


async def test_what_says_nothing_against_a_node_is_counted_apart(gw: Gateway, tmp_path: Path) -> None:
    """That it was busy, or could not be reached before its first right answer; the list counts failures alone."""
    async with added(gw, "counted") as node:
        await until("it has answered", lambda: node.last_right_answer is not None)
        answered_at, node.last_right_answer = node.last_right_answer, None
        gw.registry.failed(node, NodeUnreachable("no connection"), by_probe=True)
        node.last_right_answer = answered_at
        for failure in (NodeBusy("HTTP 429"), NodeBusy("HTTP 503"), NodeUnreachable("gone"), NodeTooSlow("late")):
            gw.registry.failed(node, failure, by_probe=True)
        found = await shown(gw, "counted")
        assert found["failures"] == {"connect": 1, "timeout": 1}
        assert (found["busy"], found["unreached"]) == (2, 1)
        line, *_ = lines_of(await command(gw, tmp_path, "list"), "counted")
        assert line.split()[-5] == "2", line  # before how long ago it was right, and its models
        page = (await gw.ask("GET", "/metrics", key=gw.key("metrics"))).body.decode()
        assert 'embedmesh_node_failures_total{check="connect",node="counted"} 2.0' in page, "all, by check"


async def test_the_speed_of_a_server_is_shown_once_it_was_measured(gw: Gateway, tmp_path: Path) -> None:
    """Its probe alone says nothing of it; one larger question does, and is asked once."""
    async with added(gw, "speedy") as node:
        assert node.probe_every_s == 60.0
        await until("its speed is known", lambda: node.load.measured)
        (line,) = lines_of(await command(gw, tmp_path, "list"), "speedy")
        assert line.split()[2:4] == ["ready", str(round(node.load.tokens_per_s))]
        node.load = Load()
        (line,) = lines_of(await command(gw, tmp_path, "list"), "speedy")
        assert line.split()[2:4] == ["ready", "-"], "what is thought of any node is not shown as measured"
        found = await shown(gw, "speedy")
        assert (found["last_check"], found["tokens_per_s"], found["fixed_ms"]) == (None, None, None)


# -- what is said of it later ------------------------------------------------------------------------------------------

DRAINING = {
    NodeState.UNPROVEN: "unproven, draining",
    NodeState.READY: "draining",
    NodeState.EJECTED: "ejected, draining",
    NodeState.QUARANTINED: "quarantined, draining",
}


@pytest.mark.parametrize("state", NodeState)
async def test_draining_is_shown_in_every_state(gw: Gateway, tmp_path: Path, state: NodeState) -> None:
    async with added(gw, "drains") as node:
        await gw.act("drains", "drain")
        node.leave_alone_until = float("inf")  # no probe comes in between
        node.state = state
        (line, *_) = lines_of(await command(gw, tmp_path, "list"), "drains")
        assert f"  {DRAINING[state]}  " in line
        assert (await shown(gw, "drains"))["draining"] is True
        node.state = NodeState.READY


async def test_one_that_gave_nothing_right_for_longer_than_its_probes_are_apart_is_not_called_ready(
    gw: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it may be asked, for want of others; and the log says what it fails, once."""
    async with added(gw, "quiet") as node:
        gw.registry.failed(node, NodeBroke("it answered HTTP 500", check=Check.STATUS_5XX))
        node.leave_alone_until = float("inf")  # no probe comes in between
        assert node.last_right_answer is not None
        with caplog.at_level(logging.WARNING, "embedmesh.fleet"):
            node.last_right_answer -= 100
            await until("it is in the log", lambda: "quiet" in caplog.text)
            await asyncio.sleep(0.6)  # two looks of its prober
        assert node.state is NodeState.READY
        found = await shown(gw, "quiet")
        assert (found["state"], found["last_check"]) == ("unproven", "status_5xx")
        line, told = lines_of(await command(gw, tmp_path, "list"), "quiet")
        assert line.split()[2] == "unproven"
        assert told.startswith("quiet failed status_5xx: it answered HTTP 500")
    words = "node quiet has given no right answer of late: status_5xx: it answered HTTP 500"
    assert [record.message for record in caplog.records if "quiet" in record.message] == [words]


async def test_an_ejection_says_which_check_failed(gw: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    """In the log, the metrics and the record."""
    async with added(gw, "gone") as node:
        with caplog.at_level(logging.WARNING, "embedmesh.fleet"):
            gw.registry.failed(node, NodeUnreachable("the node does not accept connections", retry_after_s=60))
        assert "node gone is ejected: connect: the node does not accept connections" in caplog.text
        page = (await gw.ask("GET", "/metrics", key=gw.key("metrics"))).body.decode()
        assert 'embedmesh_node_ejections_total{check="connect",node="gone"} 1.0' in page
        found = await shown(gw, "gone")
        assert (found["state"], found["last_check"]) == ("ejected", "connect")


async def test_a_quarantine_says_which_check_failed_also_after_a_restart(
    gw: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the list, the record, the store, the log and the metrics."""
    why = "canary: its vectors are not the model's"
    async with added(gw, "lies") as node:
        with caplog.at_level(logging.WARNING, "embedmesh.fleet"):
            gw.registry.quarantine(node, "its vectors are not the model's", Check.CANARY)
        assert f"node lies is quarantined: {why}" in caplog.text
        await until("it is written down", lambda: gw.roster.record("lies").quarantined == why)
        found = await shown(gw, "lies")
        assert (found["state"], found["quarantined"], found["last_check"]) == ("quarantined", why, "canary")
        page = (await gw.ask("GET", "/metrics", key=gw.key("metrics"))).body.decode()
        assert 'embedmesh_node_quarantines_total{check="canary",node="lies"} 1.0' in page
        assert f"lies failed {why}" in (await command(gw, tmp_path, "list")).output
        gw.connected.leave("lies")
        gw.connected.join_upstream(gw.roster.record("lies"))  # as at the next start
        again = gw.node("lies")
        assert again is not None
        assert (again.state, str(again.last_failure)) == (NodeState.QUARANTINED, why)


async def test_the_list_fits_a_terminal(gw: Gateway, tmp_path: Path) -> None:
    """Whatever names, states and words there are."""
    name = "a-server-with-a-name-of-63-characters-" + "x" * 25
    async with added(gw, name) as node:
        await gw.act(name, "drain")
        node.counts["answers"] = 12_345_678
        gw.registry.quarantine(node, "its vectors are not the model's, " + "and so on " * 20, Check.CANARY)
        listed = await command(gw, tmp_path, "list")
        assert listed.exit_code == 0
        assert max(map(len, listed.output.splitlines())) <= COLUMNS
        assert len([line for line in listed.output.splitlines() if "12345678" in line]) == 1


# -- what callers get --------------------------------------------------------------------------------------------------


async def test_a_server_that_refuses_a_callers_text_is_not_sent_away_for_it(gw: Gateway) -> None:
    """The caller hears that no node gave a right answer; the next one, whose text it takes, is served."""

    def answer(asked: Asked) -> Reply:
        inputs = asked[1]["input"]
        return (400, b"{}") if "large" in inputs else ok({"data": [{"embedding": [1, 2, 3, 4]} for _ in inputs]})

    async with server(answer) as (port, _):
        try:
            await add(gw, port, "picky")
            node = await gw.until_ready("picky")
            for _ in range(8):
                refused = await gw.ask(
                    "POST", "/v1/embeddings", {"model": MODEL, "input": "large"}, key=gw.key("embeddings")
                )
                says(refused, 502, "refused the inputs")
                assert refused.error["code"] == "bad_node_response"
            assert (node.state, node.failures_in_a_row, sum(node.recent)) == (NodeState.READY, 0, 0)
            assert node.failed == {Check.STATUS_4XX: 8}
            served = await gw.ask(
                "POST", "/v1/embeddings", {"model": MODEL, "input": "short"}, key=gw.key("embeddings")
            )
            assert served.status == 200
        finally:
            await gw.act("picky", "remove")
