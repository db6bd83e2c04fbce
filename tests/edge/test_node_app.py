"""The node protocol, over a real Unix socket, a real worker and a small model."""

import asyncio
import base64
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from embedmesh.edge.unix_socket import bind_unix
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from tests.engine.tiny import POISON, catalogue_entry, make_folder, make_weights, textbook

pytestmark = pytest.mark.story

NODE = """
import sys, msgspec
from embedmesh import node
from embedmesh.settings import NodeSettings
sys.exit(node.main(msgspec.json.decode(sys.argv[1], type=NodeSettings, dec_hook=lambda kind, value: kind(value))))
"""
START_S = 15.0  # a second on a quiet machine; tests share theirs


class Node:
    """A node process, and a client on its socket."""

    def __init__(self, model: Model, uds: Path, **settings: Any) -> None:
        told = {"uds": str(uds), "models": [msgspec.to_builtins(model)], "threads": 1} | settings
        fds = [settings["lifeline_fd"]] if "lifeline_fd" in settings else []
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODE, json.dumps(told)], stderr=subprocess.PIPE, text=True, pass_fds=fds
        )
        self.uds = uds
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), base_url="http://node", timeout=START_S)

    def until(self, status: int) -> float:
        """Seconds until /readyz answers this."""
        begun = time.monotonic()
        while self.readyz() != status:
            assert time.monotonic() - begun < START_S
            time.sleep(0.02)
        return time.monotonic() - begun

    def readyz(self) -> int | None:
        try:
            return self.http.get("/readyz").status_code
        except httpx.TransportError:
            return None

    def embed(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/embeddings", json={"model": "tests/tiny", "input": ["w1"]} | body)

    def worker(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def end(self) -> tuple[int, str]:
        """Exit code and what it wrote, after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=START_S)
        self.http.close()
        return self.process.returncode, said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return catalogue_entry(make_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def node(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(model, tmp_path_factory.mktemp("run") / "node.sock")
    try:
        node.until(200)
        yield node
    finally:
        node.end()


def vectors(reply: httpx.Response) -> list[np.ndarray]:
    assert reply.status_code == 200, reply.text
    assert [item["index"] for item in reply.json()["data"]] == list(range(len(reply.json()["data"])))
    return [np.frombuffer(base64.b64decode(item["embedding"], validate=True), "<f4") for item in reply.json()["data"]]


def test_texts_and_ids_give_the_textbook_s_vectors(node: Node) -> None:
    """Mixed in one call; text, its ids, and special tokens spelled in a text."""
    reply = node.embed(input=["w1 w2", [5, 6], "w3 [SEP] w4", [7, 3, 8], "   ", []])
    got = vectors(reply)
    for vector, ids in zip(got[::2], ([2, 5, 6, 3], [2, 7, 3, 8, 3], [2, 3]), strict=True):
        assert np.abs(vector - textbook(ids, make_weights(), pooling="mean", normalize=True)).max() <= 1e-5
    assert all((left == right).all() for left, right in zip(got[::2], got[1::2], strict=True))
    usage = reply.json()["usage"]
    assert usage == {"prompt_tokens": 22, "total_tokens": 22}
    assert (reply.json()["object"], reply.json()["model"]) == ("list", "tests/tiny")


def test_an_alias_is_answered_as_asked(node: Node) -> None:
    assert node.embed(model="tiny").json()["model"] == "tiny"


def test_2048_inputs_come_back_in_order(node: Node) -> None:
    ids = [[4 + n % 50] * (1 + n % 40) for n in range(2048)]
    got = vectors(node.embed(input=ids))
    for n in (0, 1, 777, 2047):
        expected = textbook([2, *ids[n], 3], make_weights(), pooling="mean", normalize=True)
        assert np.abs(got[n] - expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"input": []}, 400, "empty_input", "input"),
        ({"input": ["w1", ""]}, 400, "empty_input", "input.1"),
        ({"input": [[1], [55]]}, 400, "invalid_value", "input.1"),
        ({"input": [[-1]]}, 400, "invalid_value", "input.0"),
        ({"input": [[2**70]]}, 400, "invalid_value", "input.0"),
        ({"input": ["w1", "w1 " * 47]}, 400, "context_length_exceeded", "input.1"),
        ({"input": [[5] * 47]}, 400, "context_length_exceeded", "input.0"),
        ({"input": ["w1"] * 2049}, 400, "too_many_inputs", "input"),
        ({"input": "w1"}, 400, "invalid_type", None),
        ({"input": [1]}, 400, "invalid_type", None),
        ({"input": [[True]]}, 400, "invalid_type", None),
        ({"dimensions": 3}, 400, "invalid_type", None),
        ({"encoding_format": "float"}, 400, "invalid_value", "encoding_format"),
    ],
)
def test_what_is_wrong_is_refused(node: Node, body: dict[str, Any], status: int, code: str, param: str | None) -> None:
    reply = node.embed(**body)
    assert (reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["param"]) == (status, code, param)


@pytest.mark.parametrize("body", [b"", b"{", b'{"model":"tiny","input":["\\ud800"]}', b"[" * 100_000, b"\xff"])
def test_what_is_no_json_is_refused(node: Node, body: bytes) -> None:
    reply = node.http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


def test_what_it_serves(node: Node, model: Model) -> None:
    (served,) = node.http.get("/v1/models").json()["data"]
    assert served == {
        "id": "tests/tiny",
        "width": 16,
        "max_tokens": 48,
        "digest": model.digest,
        "tier": "exact",
        "object": "model",
    }


def test_what_it_counts(node: Node) -> None:
    node.embed(input=["w1 w2"])
    page = node.http.get("/metrics").text
    assert 'embedmesh_node_ready{model="tests/tiny"} 1.0' in page
    assert "embedmesh_node_internal_errors_total 0.0" in page
    assert 'embedmesh_node_queue_tokens{model="tests/tiny"} 0.0' in page


def test_only_its_owner_may_connect(node: Node) -> None:
    assert stat.S_IMODE(node.uds.stat().st_mode) == 0o600


def test_a_killed_engine_costs_nobody_anything(node: Node) -> None:
    os.kill(node.worker(), signal.SIGKILL)
    assert len(vectors(node.embed())) == 1


def test_a_poisoned_text_fails_alone(node: Node) -> None:
    reply = node.embed(input=[[POISON]])
    assert reply.status_code == 500
    assert len(vectors(node.embed())) == 1


def test_a_full_queue_says_429_and_when_to_return(model: Model, tmp_path: Path) -> None:
    """The engine is held still; the first call runs, the second waits, the third finds no room."""
    node = Node(model, tmp_path / "n.sock", queue_tokens_max=1_024)
    try:
        node.until(200)
        os.kill(node.worker(), signal.SIGSTOP)

        async def calls() -> httpx.Response:
            transport = httpx.AsyncHTTPTransport(uds=str(node.uds))
            async with httpx.AsyncClient(transport=transport, base_url="http://node", timeout=START_S) as http:

                def call() -> asyncio.Task[httpx.Response]:
                    body = {"model": "tiny", "input": [[5] * 30] * 32}  # 1,024 tokens, one batch
                    return asyncio.create_task(http.post("/v1/embeddings", json=body))

                first = call()
                await asyncio.sleep(0.3)
                second = call()
                await asyncio.sleep(0.3)
                refused = await call()
                assert [reply.status_code for reply in await asyncio.gather(first, second)] == [200, 200]
                return refused

        refused = asyncio.run(calls())
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["Retry-After"]) >= 1
    finally:
        node.end()


def test_it_drains_and_leaves_nothing(model: Model, tmp_path: Path) -> None:
    node = Node(model, tmp_path / "n.sock")
    node.until(200)
    worker = node.worker()
    code, said = node.end()
    assert (code, said, node.uds.exists()) == (0, "", False)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_it_answers_what_is_queued_before_it_ends(model: Model, tmp_path: Path) -> None:
    """The engine is held still while the node is told to end; the call is answered all the same."""
    node = Node(model, tmp_path / "n.sock")
    node.until(200)
    worker = node.worker()
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(node.embed, input=[[5] * 40] * 200) for _ in range(2)]
        time.sleep(0.3)
        node.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        os.kill(worker, signal.SIGCONT)
        assert [len(vectors(call.result(START_S))) for call in calls] == [200, 200]
    assert node.end()[0] == 0


def test_a_node_that_drains_leaves_its_successors_socket_alone(model: Model, tmp_path: Path) -> None:
    first = Node(model, tmp_path / "n.sock")
    first.until(200)
    worker = first.worker()
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(first.embed, input=[[5] * 40])
        time.sleep(0.3)
        first.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        second = Node(model, tmp_path / "n.sock")
        second.until(200)
        os.kill(worker, signal.SIGCONT)
        assert len(vectors(call.result(START_S))) == 1
    assert first.process.wait(START_S) == 0
    second.until(200)
    assert second.end()[0] == 0


def test_it_ends_with_its_supervisor(model: Model, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    node = Node(model, tmp_path / "n.sock", lifeline_fd=ours)
    os.close(ours)
    node.until(200)
    os.close(theirs)
    assert node.process.wait(START_S) == 0
    node.end()


def test_its_worker_does_not_outlive_a_killed_node(model: Model, tmp_path: Path) -> None:
    node = Node(model, tmp_path / "n.sock")
    node.until(200)
    worker = node.worker()
    os.kill(worker, signal.SIGSTOP)  # not even one that cannot see its socket close
    node.process.kill()
    node.end()
    begun = time.monotonic()
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() - begun < START_S
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"digest": "0" * 64}, "not the model that the catalogue names"), ({"folder": "nowhere"}, "tokenizer.json")],
)
def test_a_wrong_model_is_one_line_and_78(model: Model, tmp_path: Path, changes: dict[str, str], says: str) -> None:
    node = Node(msgspec.structs.replace(model, **changes), tmp_path / "n.sock")
    _, said = node.process.communicate(timeout=START_S)
    assert node.process.returncode == 78
    assert said.startswith("embedmesh node: ")
    assert says in said
    assert said.count("\n") == 1
    node.http.close()


def test_a_stale_socket_is_taken_over_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "n.sock"
    bind_unix(path).close()
    with bind_unix(path) as sock:
        sock.listen()
        with pytest.raises(SetupError, match="already serving"):
            bind_unix(path)


@pytest.mark.parametrize("name", ["x" * 200, "no/such/folder"])
def test_a_path_that_cannot_be_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError):
        bind_unix(tmp_path / name)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "n.sock").write_text("mine")
    with pytest.raises(SetupError, match="not a socket"):
        bind_unix(tmp_path / "n.sock")
    assert (tmp_path / "n.sock").read_text() == "mine"
