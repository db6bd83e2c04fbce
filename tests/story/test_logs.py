"""The logs of a real `embedmesh serve`: in both forms, no line of any process holds what callers or operators sent."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from embedmesh.process import EXIT_AGAIN, EXIT_SETUP
from tests.little_server import LittleServer
from tests.story.conftest import Serve
from tests.story.endpoint import COMMAND, MODEL, Endpoint, run, run_json, wait_until

SENTINEL = "s3ntin3l"
KEY_LIKE = "em_s3ntin3l0123456789abcdefghijkABCDEFGHIJ"
LINES_S = 30.0  # milliseconds, where the machine is not busy


def raw(endpoint: Endpoint, data: bytes) -> bytes:
    """Bytes in, the first bytes of what comes back; nothing, if it does not answer that."""
    address = endpoint.root.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), 10) as sock:
        sock.sendall(data)
        with suppress(OSError):
            return sock.recv(65_536)
    return b""


def post(path: str, body: bytes, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def everywhere(key: str) -> Iterator[bytes]:
    """Requests with the sentinel, or a key, wherever a caller can put one."""
    good = {"Authorization": f"Bearer {key}"}
    bodies: list[Any] = [
        {"model": SENTINEL, "input": "x"},
        {"model": MODEL, "input": SENTINEL, "user": SENTINEL},
        {"model": MODEL, "input": [SENTINEL, ""]},
        {"model": MODEL, "input": SENTINEL, SENTINEL: SENTINEL},
        {"model": MODEL, "input": SENTINEL, "encoding_format": SENTINEL},
        {"model": MODEL, "input": f"{SENTINEL}\n\x1b[31m" * 2_000},
    ]
    for path in ("/v1/embeddings", "/v1/confidential/embeddings", "/v1/nodes/lock", "/v1/chat/completions", "/v1/jobs"):
        for body in bodies:
            yield post(path, json.dumps(body).encode(), **good)
        yield post(path, b'{"model": "' + SENTINEL.encode() + b"\xff\n\x1b[2J", **good)
    ordinary = json.dumps({"model": MODEL, "input": f"a {SENTINEL}"}).encode()
    for wrong in (SENTINEL, f"Bearer {SENTINEL}", f"Basic {SENTINEL}", f"Bearer {KEY_LIKE}", f"{key} {SENTINEL}"):
        yield post("/v1/embeddings", ordinary, Authorization=wrong)
        yield post("/v1/account", b"", Authorization=wrong)
    yield post("/v1/embeddings", ordinary, api_key=KEY_LIKE, **good)
    yield post("/v1/embeddings", ordinary, Authorization=f"Bearer {key}", X_Forwarded_For=f"{SENTINEL}, 1.2.3.4")
    for name in (
        "Idempotency-Key",
        "User-Agent",
        "X-Request-Id",
        "Cookie",
        "Referer",
        "Traceparent",
        "X-Embedmesh-Job",
    ):
        for value in (f"{SENTINEL} \x1b[31m", f"{SENTINEL}\tx", "é" + SENTINEL):
            yield post("/v1/embeddings", ordinary, **good, **{name: value})
    for identifier in (KEY_LIKE, key):  # they have the form of an id
        yield post("/v1/embeddings", ordinary, **good, X_Request_Id=identifier)
    for path in (
        f"/v1/embeddings?key={SENTINEL}",
        f"/{SENTINEL}",
        f"/v1/models/{SENTINEL}%0a%1b",
        f"/openai/deployments/{SENTINEL}/embeddings",
        f"/v1/files/{SENTINEL}/content",
        f"/v1/embeddingz/{key}",
    ):
        yield post(path, ordinary, **good)
        yield f"GET {path} HTTP/1.1\r\nHost: {SENTINEL}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    line = json.dumps({"custom_id": SENTINEL, "body": {"input": SENTINEL}})
    form = '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
    form += f'Content-Disposition: form-data; name="file"; filename="{SENTINEL}.jsonl"\r\n\r\n{line}\r\n--b--\r\n'
    yield post("/v1/files", form.encode(), **good).replace(b"application/json", b"multipart/form-data; boundary=b")
    yield f"{SENTINEL} /{SENTINEL} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    yield f"GET /{SENTINEL}\x1b HTTP/9.9\r\n{SENTINEL}\r\n\r\n".encode()
    yield f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\nForged: {SENTINEL}\r\n\r\n".encode()
    yield b"GET / HTTP/1.1\r\nX: " + SENTINEL.encode() * 2_000 + b"\r\n\r\n"
    yield f"{SENTINEL}\n{SENTINEL}\r\n\r\n".encode()


def line_of(endpoint: Endpoint, request_id: str) -> str | None:
    """Of the access log: attempts that failed have lines with that id, too."""
    lines = endpoint.log.read_text().splitlines()
    return next((each for each in lines if request_id in each and "embedmesh.access" in each), None)


def joined_node(endpoint: Endpoint, folder: Path, options: tuple[str, ...]) -> str:
    """The id of a node that joins, proves itself and leaves. Its log is beside its folder."""
    invited = run_json("nodes", "invite", "--data-dir", endpoint.data_dir)
    given = ("node", "--gateway", endpoint.root, "--data-dir", str(folder), "--threads", "1", *options)
    with folder.with_suffix(".log").open("wb") as log:
        environment = os.environ | {"EMBEDMESH_JOIN": invited["token"]}
        process = subprocess.Popen([*COMMAND, *given], stdin=subprocess.DEVNULL, stderr=log, env=environment)

    def ready() -> str | None:
        nodes = endpoint.get("/v1/admin/nodes", endpoint.admin_key).json()["data"]
        return next((each["node_id"] for each in nodes if each["kind"] == "dialled" and each["state"] == "ready"), None)

    try:
        return wait_until("the node is ready", ready, 60.0)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_line_holds_what_was_sent(serve: Serve, tmp_path: Path, form: str) -> None:
    """With everything on, at the lowest level: texts, names, keys, tokens, and what would forge a line."""
    options = ("--log-format", form, "--log-level", "debug", "--access-log", "addresses")
    endpoint = serve(*options, "--workers", 2, "--trusted-proxies", "127.0.0.0/8").wait_ready()
    answers = [raw(endpoint, each) for each in everywhere(endpoint.api_key)]
    assert sum(b" 200 OK" in each for each in answers) >= 10 and sum(b" 401 " in each for each in answers) >= 5
    with LittleServer(refuse=(500, f"I do not know {SENTINEL}")) as little:
        token = tmp_path / "token"
        token.write_text(SENTINEL)
        added = run(
            "nodes", "add", little.url, "--model", MODEL, "--name", "little", "--token-file", token, "--data-dir",
            endpoint.data_dir,
        )  # fmt: skip
        assert SENTINEL.encode() not in added.stderr
    member = joined_node(endpoint, tmp_path / "member", options) if form == "json" else ""
    worker = endpoint.pid("worker")
    assert worker is not None
    os.kill(worker, signal.SIGABRT)
    wait_until("it answers again", endpoint.answers, 60.0)
    reply = endpoint.ask(input=f"once more {SENTINEL}", headers={"x-request-id": "mine-7"})
    assert reply.status_code == 200
    wait_until("the line is written", lambda: line_of(endpoint, "mine-7"), LINES_S)
    assert endpoint.stop() == 0
    said = endpoint.log.read_text()
    of_member = (tmp_path / "member.log").read_text() if member else ""
    for secret in (SENTINEL, endpoint.api_key, endpoint.admin_key, KEY_LIKE, "\x1b", "Forged", "emj_"):
        assert secret not in said + of_member, next(line for line in (said + of_member).splitlines() if secret in line)
    line = line_of(endpoint, "mine-7")
    assert line is not None
    own_id = reply.headers["x-embedmesh-request"]
    if form == "text":
        assert "POST /v1/embeddings 200 ok" in line and own_id in line and "account=local" in line
        return
    own = [json.loads(each) for each in of_member.splitlines()]
    assert {each.get("node") for each in own[-5:]} == {member}
    assert any(each.get("http.route") == "/v1/embeddings" and each["request_id"] for each in own)
    lines = [json.loads(each) for each in said.splitlines()]
    assert {each["service.name"] for each in lines} == {"embedmesh-serve", "embedmesh-gateway", "embedmesh-node"}
    assert len({each["process.pid"] for each in lines}) == 4
    assert all(set(each) >= {"ts", "level", "logger", "message"} for each in lines)
    assert any("is ejected" in each["message"] or "restarted" in each["message"] for each in lines)
    found = json.loads(line)
    assert (found["http.route"], found["http.response.status_code"], found["outcome"]) == ("/v1/embeddings", 200, "ok")
    assert (found["ledger_id"], found["account"], found["node"]) == (own_id, "local", reply.headers["x-embedmesh-node"])
    assert found["http.response.body.size"] == len(reply.content) and found["client.address"]
    assert found["tokens"] == reply.json()["usage"]["total_tokens"] and found["gen_ai.request.model"] == MODEL
    routes = {each.get("http.route", "") for each in lines if each["logger"] == "embedmesh.access"}
    assert {"/v1/models/*", "/v1/embeddings", ""} <= routes


@pytest.mark.parametrize("form", ["json", "text"])
def test_nor_do_programs_that_cannot_start(tmp_path: Path, form: str) -> None:
    """A DSN's password, a join token, a key: on the command line, or in the environment."""
    options = ("--log-format", form, "--data-dir", tmp_path / "data")
    dsn = f"postgresql://user:{SENTINEL}@127.0.0.1:1/database"
    done = [
        run("gateway", *options, "--port", 0, EMBEDMESH_STORE=dsn),
        run("node", *options, "--gateway", f"http://u:{SENTINEL}@127.0.0.1:1", "--join", f"emj_{SENTINEL}"),
        run(
            "node",
            *options,
            "--uds",
            tmp_path / "no" / "node.sock",
            EMBEDMESH_API_KEY=SENTINEL,
            EMBEDMESH_JOIN=SENTINEL,
        ),
    ]
    for each in done:
        said = each.stderr.decode()
        assert each.returncode in (EXIT_AGAIN, EXIT_SETUP), said
        assert SENTINEL not in said and "Traceback" not in said
        if form == "json":
            assert [json.loads(line)["level"] for line in said.splitlines()][-1] == "critical"


def test_a_log_that_nobody_reads_stops_nothing(serve: Serve, tmp_path: Path) -> None:
    """The pipe is full from the first lines on: requests are answered, and lines come once somebody reads.

    When the reader has gone, it is the same; and the end takes no longer.
    """
    pipe = tmp_path / "data.log"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4_096)
    endpoint = serve("--log-format", "json", "--access-log", "on")
    ready = wait_until("it is ready", lambda: '"ready"' in endpoint.said.read_text(), 60.0)
    assert ready
    told = json.loads((endpoint.data_dir / "bootstrap.json").read_bytes())
    endpoint.wait_ready()
    for number in range(60):
        reply = endpoint.ask(input="so it is", headers={"x-request-id": f"unread-{number}"})
        assert reply.status_code == 200
    said = b""

    def whole() -> bool:
        nonlocal said
        with suppress(BlockingIOError):
            said += os.read(reading, 65_536)
        return b"unread-59" in said

    wait_until("all lines have come", whole, LINES_S)
    assert all(f'"unread-{number}"'.encode() in said for number in range(60))
    assert told["api_key"].encode() not in said
    os.close(reading)
    for _ in range(5):
        assert endpoint.ask(input="nobody is there").status_code == 200
    pipe.unlink()
    pipe.write_bytes(said)
    began = time.monotonic()
    assert endpoint.stop() == 0
    assert time.monotonic() - began < 30
