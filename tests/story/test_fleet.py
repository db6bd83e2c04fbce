"""A gateway, its own node and two that joined it, as real processes: they share the work, come, go, and are killed."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from embedmesh.client import Client
from embedmesh.process import EXIT_SETUP
from embedmesh.signing.identity import Identity, node_id
from tests.story.conftest import Note
from tests.story.endpoint import COMMAND, MODEL, READY_S, SAME, Endpoint, run, run_json, wait_until

TEXTS = ["hello world", "日本語の文", "one two three four five six seven eight nine ten " * 5]
BACK_S = 15.0  # a second or two when quiet
CALLERS = 4
PAUSE_S = 0.005  # of each after a reply, which takes as long: without, they cost more CPU than all that is tested


class Node:
    """One `embedmesh node` that belongs to the gateway, in a folder that outlives its processes."""

    def __init__(self, fleet: "Fleet", folder: Path, *more: object) -> None:
        self.fleet = fleet
        self.folder = folder
        self.log = folder.with_suffix(".log")
        self._more = more
        self.process: subprocess.Popen[bytes]

    def start(self, *more: object) -> "Node":
        given = ["node", "--gateway", self.fleet.gateway.root, "--data-dir", self.folder, "--threads", "1"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, (*given, *self._more, *more))], stdin=subprocess.DEVNULL, stderr=log
            )
        return self

    @property
    def node_id(self) -> str:
        """As the gateway calls it."""
        return node_id(Identity.load(self.folder / "node.identity").public_key)

    def shown(self) -> dict[str, Any]:
        """What the gateway says of it."""
        return self.fleet.shown(self.node_id)

    def wait_ready(self) -> "Node":
        wait_until(f"{self.folder.name} is ready", lambda: self.shown()["state"] == "ready", READY_S)
        return self

    def end(self) -> int:
        """Tell it to stop; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Its exit code, once it has stopped. Neither a bug nor a text may be in its log."""
        code = self.process.wait(READY_S)
        log = self.log.read_text()
        assert "Traceback" not in log, log
        assert "hello world" not in log
        return code


class Fleet:
    """The gateway and its two further nodes."""

    def __init__(self, folder: Path) -> None:
        self.gateway = Endpoint(folder / "gateway", "--node-networks", "127.0.0.0/8", "--threads", 1).wait_ready()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        there = ("--address", f"https://127.0.0.1:{port}", "--listen", f"127.0.0.1:{port}", "--price", "0.000000003")
        self.reached = Node(self, folder / "reached", *there, "--country", "de")
        self.dials = Node(self, folder / "dials")
        self.all = [self.reached, self.dials]

    def nodes(self, *arguments: object) -> Any:
        """`embedmesh nodes ARGUMENTS --json`, on the gateway's machine."""
        return run_json("nodes", *arguments, "--data-dir", self.gateway.data_dir)

    def shown(self, name: str) -> dict[str, Any]:
        """What the admin API says of a node, without the half second that a command takes."""
        reply = self.gateway.get(f"/v1/admin/nodes/{name}", self.gateway.admin_key)
        return reply.json() if reply.status_code == 200 else {"state": None}

    def act(self, name: str, action: str) -> dict[str, Any]:
        """Say something of a node, in the same way."""
        url = f"{self.gateway.base_url}/admin/nodes/{name}/{action}"
        reply = httpx.post(url, headers={"Authorization": f"Bearer {self.gateway.admin_key}"}, timeout=BACK_S)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def embed_by(self) -> str:
        """Who embeds now."""
        return self.gateway.ask(input="who?").headers["x-embedmesh-node"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Each was invited by `embedmesh nodes invite`. At the end nothing of it is left, and the ledger adds up."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        for node in made.all:
            invited = made.nodes("invite", "--note", node.folder.name, "--minutes", 5)
            node.start("--join", invited["token"])
        for node in made.all:
            wait_until("it has an identity", (node.folder / "node.identity").exists, READY_S)
            node.wait_ready()
        yield made
        for node in made.all:
            if node.process.poll() is None:
                assert node.end() == 0
        made.gateway.account()
        made.gateway.check_ledger()
        assert "embedmesh_internal_errors_total 0.0" in made.gateway.get("/metrics", made.gateway.admin_key).text
        assert made.gateway.stop() == 0
    finally:
        for node in made.all:
            if hasattr(node, "process") and node.process.poll() is None:
                node.process.kill()
                node.process.wait()
        made.gateway.kill_all()


def test_each_node_takes_confidential_requests(fleet: Fleet) -> None:
    """Also one that dials out. The client names the node that it has pinned; the vectors are those of a plain call."""
    gateway = fleet.gateway
    right = gateway.embed(TEXTS)
    for node in fleet.all:
        pins = node.folder / "node.identity.pub"
        with Client(
            base_url=gateway.base_url,
            api_key=gateway.api_key,
            pins=pins,
            confidential=True,
            lock_ahead=False,  # the last lock would be held until it expires
        ) as client:
            for _ in range(3):
                sealed = client.embeddings.create(model=MODEL, input=TEXTS)
                assert sealed.node_id == node.node_id
                assert np.abs(np.array([each.embedding for each in sealed.data]) - right).max() <= SAME


@contextmanager
def callers(fleet: Fleet) -> Iterator[list[str]]:
    """Several callers, each on a connection of its own, who hardly pause. What any of them got that is no 200."""
    ended, wrong = threading.Event(), list[str]()
    counts = [0] * CALLERS

    def call(number: int) -> None:
        headers = {"Authorization": f"Bearer {fleet.gateway.api_key}"}
        with httpx.Client(headers=headers, timeout=60) as http:
            while not ended.is_set():
                body = {"model": MODEL, "input": [f"caller {number} asks {counts[number]}", "and again"]}
                try:
                    reply = http.post(f"{fleet.gateway.base_url}/embeddings", json=body)
                except httpx.TransportError as error:
                    wrong.append(repr(error))
                    continue
                counts[number] += 1
                ended.wait(PAUSE_S)
                if reply.status_code != 200:
                    wrong.append(reply.text)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        wait_until("all of them are answered", lambda: min(counts) > 3, READY_S)
        yield wrong
        before = list(counts)
        wait_until(
            "all of them go on",
            lambda: all(now > then + 3 for now, then in zip(counts, before, strict=True)),
            READY_S,
        )
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_they_are_listed_and_shown(fleet: Fleet) -> None:
    """By `nodes list` and `nodes show`, with their kind and their state, for programs and for people."""
    for node in fleet.all:
        node.wait_ready()
    by_id = {node["node_id"]: node for node in fleet.nodes("list")}
    assert set(by_id) == {"local", fleet.reached.node_id, fleet.dials.node_id}
    kinds = {"local": "local", fleet.reached.node_id: "remote", fleet.dials.node_id: "dialled"}
    assert {name: node["kind"] for name, node in by_id.items()} == kinds
    assert {node["state"] for node in by_id.values()} == {"ready"}
    assert all(MODEL in node["models"] for node in by_id.values())
    shown = fleet.nodes("show", by_id[fleet.reached.node_id]["small_id"])
    assert (shown["node_id"], shown["country"], shown["offers"][0]["price"]) == (fleet.reached.node_id, "DE", 3)
    for_people = run("nodes", "list", "--data-dir", fleet.gateway.data_dir).stdout.decode()
    assert for_people.count("ready") == 3
    states = {one["note"]: (one["state"], one["node_id"]) for one in fleet.nodes("invites")}
    assert states == {node.folder.name: ("used", node.node_id) for node in fleet.all}


def test_each_gives_the_same_vectors(fleet: Fleet) -> None:
    """Over TLS to its address, or over its own connection: what this machine's own node gives."""
    names = ["local", fleet.reached.node_id, fleet.dials.node_id]
    vectors = {}
    for name in names:
        for other in set(names) - {name}:
            fleet.act(other, "drain")
        wait_until("it is ready", lambda: fleet.shown(name)["state"] == "ready", BACK_S)  # noqa: B023 - asked at once
        assert [fleet.shown(other)["state"] for other in set(names) - {name}] == ["draining"] * 2
        assert fleet.embed_by() == name
        vectors[name] = fleet.gateway.embed(TEXTS)
        for other in set(names) - {name}:
            assert fleet.act(other, "resume")["state"] == "ready"
    for name in names[1:]:
        assert np.abs(vectors[name] - vectors["local"]).max() <= SAME


def test_receipts_follow_within_seconds(fleet: Fleet) -> None:
    """Each answer that the gateway got is in its node's log, signed; none is false. Who asks for money is owed some."""
    for node in fleet.all:
        before = node.shown()["receipts_seen"]["matched"]
        wait_until(
            "receipts are matched", partial(lambda one: one.shown()["receipts_seen"]["matched"] > 0, node), BACK_S
        )
        seen = node.shown()["receipts_seen"]
        assert (seen["false"], seen["refused"]) == (0, 0)
        assert seen["matched"] >= before
    fleet.gateway.account()
    owed = fleet.gateway.account(f"node:{fleet.reached.node_id}").balance_nanousd
    assert owed > 0


def test_killed_under_load_it_costs_no_caller_anything(fleet: Fleet, note: Note) -> None:
    """kill -9 of one of two nodes: every request gets its vectors; started again, without a token, it is back."""
    assert fleet.nodes("drain", "local")["state"] == "draining"  # so that there are two
    for victim in fleet.all:
        with callers(fleet) as wrong:
            os.kill(victim.process.pid, signal.SIGKILL)
            victim.process.wait()
            wait_until("it is noticed", partial(lambda one: one.shown()["state"] == "ejected", victim), BACK_S)
        assert wrong == []
        began = time.monotonic()
        victim.start().wait_ready()
        note(f"kill -9 of a node ({victim.folder.name}): start to ready", time.monotonic() - began, "s")
    assert fleet.nodes("resume", "local")["state"] == "ready"


def test_told_to_stop_it_leaves_without_a_trace(fleet: Fleet, note: Note) -> None:
    """SIGTERM under load: it says farewell, answers what it has, and ends; nobody gets an error."""
    fleet.act("local", "drain")
    for node in fleet.all:
        with callers(fleet) as wrong:
            began = time.monotonic()
            node.process.send_signal(signal.SIGTERM)
            wait_until("it has said farewell", partial(lambda one: one.shown()["draining"], node), BACK_S)
            assert node.ended() == 0
            note(f"SIGTERM of a node ({node.folder.name}) under load to its end", time.monotonic() - began, "s")
            assert time.monotonic() - began < BACK_S
        assert wrong == []
        assert node.shown()["state"] in ("draining", "ejected")  # the second once a probe found nobody there
        node.start().wait_ready()
        assert not node.shown()["draining"]
    fleet.act("local", "resume")


def test_a_killed_gateway_finds_its_nodes_again(fleet: Fleet, note: Note) -> None:
    """They do nothing for it, and nobody has to."""
    pid = fleet.gateway.pid("gateway")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()

    def ready() -> bool:
        try:
            return all(node.shown()["state"] == "ready" for node in fleet.all)
        except httpx.TransportError:
            return False

    wait_until("both are back", ready, BACK_S)
    note("kill -9 of the gateway to both nodes ready", time.monotonic() - began, "s")
    assert all(node.process.poll() is None for node in fleet.all)
    assert fleet.gateway.embed(TEXTS).shape == (3, 384)


def test_a_removed_node_ends_and_stays_away(fleet: Fleet) -> None:
    """By `nodes remove`; it is told why, and a new token does not help."""
    node = fleet.dials
    removed = fleet.nodes("remove", node.node_id)
    assert (removed["standing"], removed["state"]) == ("removed", None)
    assert node.process.wait(BACK_S) == EXIT_SETUP
    assert "removed by the operator" in node.log.read_text()
    token = fleet.nodes("invite")["token"]
    assert node.start("--join", token).process.wait(READY_S) == EXIT_SETUP
    assert node.node_id not in {fleet.embed_by() for _ in range(10)}
