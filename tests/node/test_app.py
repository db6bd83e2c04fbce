"""The node protocol, over a real Unix socket, a real worker and a small model."""

import asyncio
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from bench.engine.large_folder import MODELS
from bench.engine.large_folder import make_folder as make_large
from embedmesh.engine.folder import digest
from embedmesh.engine.progress import STEPS
from embedmesh.http.unix_socket import bind_unix
from embedmesh.rules.embeddings import COMPACT, EmbedIds, EmbedVectors
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from tests.engine.tiny import POISON, catalogue_entry, make_folder, make_weights, textbook, write_safetensors
from tests.node.live_node import START_S, Node, rows, vectors

pytestmark = pytest.mark.story

BULK = [[4 + n // 40, 4 + n % 40] * 20 for n in range(200)]  # all different


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


def told(said: str) -> list[str]:
    """The lines that a node wrote, but for a busy machine's: how far its engine has loaded, that it is starved."""
    return [line for line in said.splitlines() if " INFO embedmesh.engine: " not in line and "is starved" not in line]


def expected(ids: list[int]) -> np.ndarray:
    return textbook(ids, make_weights(), pooling="mean", normalize=True)


def test_the_public_form_gives_the_textbook_s_vectors(node: Node) -> None:
    """Text, special tokens spelled in a text, white space."""
    reply = node.embed(input=["w1 w2", "w3 [SEP] w4", "   "])
    for vector, ids in zip(vectors(reply), ([2, 5, 6, 3], [2, 7, 3, 8, 3], [2, 3]), strict=True):
        assert np.abs(vector - expected(ids)).max() <= 1e-5
    assert reply.json()["usage"] == {"prompt_tokens": 11, "total_tokens": 11}
    assert (reply.json()["object"], reply.json()["model"]) == ("list", "tests/tiny")
    assert reply.headers["x-embedmesh-node"] == "self"
    assert "x-embedmesh-cost-nanousd" not in reply.headers
    floats = node.embed(input="w1 w2", encoding_format="float").json()["data"][0]["embedding"]
    assert np.abs(np.array(floats) - expected([2, 5, 6, 3])).max() <= 1e-5


def test_the_compact_form_gives_the_same_bytes(node: Node) -> None:
    got = rows(node.compact([[5, 6], [7, 3, 8], []]))
    assert (got == np.stack(vectors(node.embed(input=["w1 w2", "w3 [SEP] w4", "   "])))).all()
    assert msgspec.msgpack.decode(node.compact([[5, 6], []]).content, type=EmbedVectors).tokens == 6


def test_equal_inputs_of_a_call_are_run_once(node: Node) -> None:
    """By the padded tokens that the node computed, and each gets its vector all the same."""

    def padded() -> float:
        page = node.http.get("/metrics").text
        return float(page.split('embedmesh_node_padded_tokens_total{model="tests/tiny"} ')[1].split()[0])

    before = padded()
    got = rows(node.compact([[9, 10, 11], [12, 13], [9, 10, 11]] * 500))
    assert padded() - before <= 2 * 12 + 100 * 4  # two sequences; probes of the idle engine meanwhile
    assert (got[0] == got[2]).all() and (got[1] == got[4]).all() and (got[0] != got[1]).any()
    assert len(got) == 1500


def test_an_alias_is_answered_as_asked(node: Node) -> None:
    assert node.embed(model="tiny").json()["model"] == "tiny"


def test_2048_inputs_come_back_in_order(node: Node) -> None:
    ids = [[4 + n % 50] * (1 + n % 40) for n in range(2048)]
    got = rows(node.compact(ids))
    for n in (0, 1, 777, 2047):
        assert np.abs(got[n] - expected([2, *ids[n], 3])).max() <= 1e-5


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"model": "tiny:fast"}, 404, "model_not_found", "model"),
        ({"input": []}, 400, "empty_input", "input"),
        ({"input": ["w1", ""]}, 400, "empty_input", "input.1"),
        ({"input": ["w1", "w1 " * 47]}, 400, "context_length_exceeded", "input.1"),
        ({"input": ["w1"] * 2049}, 400, "too_many_inputs", "input"),
        ({"input": [[True]]}, 400, "invalid_type", "input.0"),
        ({"dimensions": 17}, 400, "invalid_value", "dimensions"),
        ({"shape": 1}, 400, "unknown_parameter", "shape"),
    ],
)
def test_what_is_wrong_is_refused(node: Node, body: dict[str, Any], status: int, code: str, param: str | None) -> None:
    reply = node.embed(**body)
    assert (reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["param"]) == (status, code, param)


@pytest.mark.parametrize(
    ("ids", "code", "param"),
    [
        ([], "empty_input", "input"),
        ([[1], [55]], "invalid_value", "input.1"),
        ([[2**32 - 1]], "invalid_value", "input.0"),
        ([[5] * 47], "context_length_exceeded", "input.0"),
        ([[5]] * 2049, "too_many_inputs", "input"),
    ],
)
def test_wrong_ids_are_refused(node: Node, ids: list[list[int]], code: str, param: str) -> None:
    reply = node.compact(ids)
    assert (reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["param"]) == (400, code, param)


@pytest.mark.parametrize("body", [b"", b"{", b'{"model":"tiny","input":["\\ud800"]}', b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("content_type", ["application/json", COMPACT])
def test_what_is_not_of_its_form_is_refused(node: Node, body: bytes, content_type: str) -> None:
    reply = node.http.post("/v1/embeddings", content=body, headers={"Content-Type": content_type})
    assert reply.status_code == 400


@pytest.mark.parametrize(
    "asked",
    [
        EmbedIds("tests/tiny", b"\1\0\0\0", b""),  # the lengths do not add up
        EmbedIds("tests/tiny", b"\1\0\0", b"\5\0\0\0"),  # no whole number
        EmbedIds("tests/tiny", b"\xff\xff\xff\xff" * 2, b"\5\0\0\0"),
    ],
)
def test_ids_that_do_not_add_up_are_refused(node: Node, asked: EmbedIds) -> None:
    reply = node.http.post("/v1/embeddings", content=msgspec.msgpack.encode(asked), headers={"Content-Type": COMPACT})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_type")


def test_tokenize_tells_what_the_model_is_given(node: Node) -> None:
    body = {"model": "tiny", "input": ["w1 w2", "w3"]}
    reply = node.http.post("/v1/tokenize", json=body)
    assert [item["token_ids"] for item in reply.json()["data"]] == [[2, 5, 6, 3], [2, 7, 3]]
    assert reply.json()["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    refused = node.http.post("/v1/tokenize", json={"model": "tiny", "input": ""})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "empty_input")


def test_what_it_serves(node: Node, model: Model) -> None:
    listed = node.http.get("/v1/models").json()
    (served,) = listed["data"]
    assert listed["threads"] == "1 thread: as --threads says"
    assert served == {
        "id": "tests/tiny",
        "width": 16,
        "max_tokens": 48,
        "digest": model.digest,
        "tier": "exact",
        "aliases": ["tiny"],
        "object": "model",
        "created": 0,
        "owned_by": "embedmesh",
    }
    assert node.http.get("/v1/models/tests%2Ftiny").json() == served
    assert node.http.get("/v1/models/other").status_code == 404


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
    reply = node.compact([[POISON]])
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
                    texts = [f"w{n} " + "w1 " * 29 for n in range(32)]  # 1,024 tokens, one batch
                    return asyncio.create_task(http.post("/v1/embeddings", json={"model": "tiny", "input": texts}))

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
    assert (code, told(said), node.uds.exists()) == (0, [], False)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_it_answers_what_is_queued_before_it_ends(model: Model, tmp_path: Path) -> None:
    """The engine is held still while the node is told to end; the call is answered all the same."""
    node = Node(model, tmp_path / "n.sock")
    node.until(200)
    worker = node.worker()
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(node.compact, BULK) for _ in range(2)]
        time.sleep(0.3)
        node.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        os.kill(worker, signal.SIGCONT)
        assert [len(rows(call.result(START_S))) for call in calls] == [200, 200]
    assert node.process.wait(START_S) == 0  # a second SIGTERM might meet Python's own last milliseconds
    node.end()


def test_a_node_that_drains_leaves_its_successors_socket_alone(model: Model, tmp_path: Path) -> None:
    first = Node(model, tmp_path / "n.sock")
    first.until(200)
    worker = first.worker()
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(first.compact, [[5] * 40])
        time.sleep(0.3)
        first.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        second = Node(model, tmp_path / "n.sock")
        second.until(200)
        with suppress(ProcessLookupError):  # on a busy machine its deadline may have passed: then another one answers
            os.kill(worker, signal.SIGCONT)
        assert len(rows(call.result(START_S))) == 1
    assert first.process.wait(START_S) == 0
    second.until(200)
    assert second.end()[0] == 0


def test_it_ends_with_its_supervisor(model: Model, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    node = Node(model, tmp_path / "n.sock", lifeline_fd=ours, pass_fds=(ours,))
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
    [({"digest": "0" * 64}, "not the model that the catalogue names"), ({"folder": "nowhere"}, "nowhere")],
)
def test_a_wrong_model_is_one_line_and_78(model: Model, tmp_path: Path, changes: dict[str, str], says: str) -> None:
    node = Node(msgspec.structs.replace(model, **changes), tmp_path / "n.sock")
    _, said = node.process.communicate(timeout=START_S)
    assert node.process.returncode == 78
    (line,) = told(said)
    assert line.startswith("embedmesh node: ")
    assert says in line
    node.http.close()


def test_models_come_and_go_while_it_runs(model: Model, tmp_path: Path) -> None:
    """Loaded by name, tier included; unloaded only after its last call was answered."""
    other = catalogue_entry(make_folder(tmp_path / "other", pooling="cls"))
    other = msgspec.structs.replace(other, id="tests/other", aliases=("other",))
    node = Node([model, other], tmp_path / "n.sock", model=["tiny"])
    try:
        node.until(200)
        assert node.embed(model="other").status_code == 404
        loaded = node.http.post("/v1/models", json={"model": "other"})
        assert (loaded.status_code, loaded.json()["id"]) == (200, "tests/other")
        cls = textbook([2, 5, 3], make_weights(), pooling="cls", normalize=True)
        assert np.abs(vectors(node.embed(model="other"))[0] - cls).max() <= 1e-5
        assert node.http.post("/v1/models", json={"model": "other"}).status_code == 200  # harmless
        assert [one["id"] for one in node.http.get("/v1/models").json()["data"]] == ["tests/tiny", "tests/other"]

        worker = node.worker()
        os.kill(worker, signal.SIGSTOP)
        with ThreadPoolExecutor(2) as threads:
            call = threads.submit(node.compact, BULK)
            time.sleep(0.3)
            gone = threads.submit(node.http.delete, "/v1/models/tiny")
            time.sleep(0.2)
            assert not gone.done()
            assert node.embed().status_code == 404
            os.kill(worker, signal.SIGCONT)
            assert len(rows(call.result(START_S))) == 200
            assert gone.result(START_S).status_code == 200
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
        assert node.readyz() == 200  # of what is left
        assert 'embedmesh_node_ready{model="tests/other"}' in node.http.get("/metrics").text
        assert 'embedmesh_node_ready{model="tests/tiny"}' not in node.http.get("/metrics").text
        assert node.http.delete("/v1/models/tiny").status_code == 404
    finally:
        assert node.end()[0] == 0


def test_a_model_that_cannot_start_does_not_end_the_others(model: Model, tmp_path: Path) -> None:
    """It is not listed, so that no gateway asks for it; /readyz names it. When its files are there, it comes."""
    folder = make_folder(tmp_path / "late")
    late = msgspec.structs.replace(model, id="late", aliases=(), folder=str(folder))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"x")
    node = Node([late, model], tmp_path / "n.sock")

    def listed() -> list[str]:
        with suppress(httpx.TransportError):
            return [one["id"] for one in node.http.get("/v1/models").json()["data"]]
        return []

    try:
        until(lambda: listed() == ["tests/tiny"])
        assert len(vectors(node.embed())) == 1
        until(lambda: "late (down" in node.http.get("/readyz").text)
        (folder / "model.safetensors").write_bytes(weights)
        until(lambda: listed() == ["late", "tests/tiny"])
        assert len(vectors(node.embed(model="late"))) == 1
    finally:
        code, said = node.end()
    assert code == 0
    assert "a model is not served: Model folder late is not the model" in said


def test_a_node_whose_models_all_fail_to_start_is_one_line_and_78(model: Model, tmp_path: Path) -> None:
    broken = [msgspec.structs.replace(model, id=name, aliases=(), digest=name * 64) for name in "ab"]
    node = Node(broken, tmp_path / "n.sock")
    _, said = node.process.communicate(timeout=START_S)
    assert (node.process.returncode, len(told(said))) == (78, 1), said
    assert "is not the model that the catalogue names" in said
    node.http.close()


def until(look: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not look():
        assert time.monotonic() - begun < START_S
        time.sleep(0.02)


def test_what_cannot_be_loaded_is_refused_and_harms_nothing(model: Model, tmp_path: Path) -> None:
    broken = msgspec.structs.replace(model, id="broken", aliases=(), digest="0" * 64)
    node = Node([model, broken], tmp_path / "n.sock", model="tiny")
    try:
        node.until(200)
        for body, status, code in (
            ({"model": "x"}, 404, "model_not_found"),
            ({"model": "broken"}, 400, "invalid_value"),
            ({}, 400, "invalid_json"),
        ):
            reply = node.http.post("/v1/models", json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
            assert len(vectors(node.embed())) == 1
            assert len(node.http.get("/v1/models").json()["data"]) == 1
    finally:
        assert node.end()[0] == 0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_a_node_alone_serves_the_openai_sdk_and_nobody_without_its_key(model: Model, tmp_path: Path) -> None:
    import openai  # takes a second, which the tests that are collected only need not spend

    port = free_port()
    node = Node(model, tmp_path / "n.sock", standalone=True, port=port, api_key="a-key-of-ours")
    try:
        node.until(200)
        root = f"http://127.0.0.1:{port}"
        sdk = openai.OpenAI(base_url=f"{root}/v1", api_key="a-key-of-ours", max_retries=0)
        reply = sdk.embeddings.create(model="tiny", input=["w1 w2"])
        assert np.abs(np.array(reply.data[0].embedding) - expected([2, 5, 6, 3])).max() <= 1e-5
        assert [one.id for one in sdk.models.list()] == ["tests/tiny"]
        assert httpx.get(f"{root}/readyz").status_code == httpx.get(f"{root}/health").status_code == 200
        for said in ("", "Bearer", "Bearer a-key-of-our", "Bearer a-key-of-ours2", "Bearer ä", "Basic a-key-of-ours"):
            headers = [(b"Authorization", said.encode())]
            for method, path in [
                ("POST", "/v1/embeddings"),
                ("POST", "/v1/tokenize"),
                ("GET", "/v1/models"),
                ("GET", "/v1/models/tiny"),
                ("GET", "/metrics"),
            ]:
                assert httpx.request(method, root + path, headers=headers).status_code == 401, (said, path)
        good = {"Authorization": "Bearer a-key-of-ours"}
        check_other_ways(root)
        assert httpx.post(f"{root}/v1/models", json={"model": "tiny"}, headers=good).status_code == 405
        assert httpx.delete(f"{root}/v1/models/tiny", headers=good).status_code == 405
    finally:
        assert node.end()[0] == 0


def check_other_ways(root: str) -> None:
    """HTTP as a gateway has it: HEAD, other paths, the key as `api-key`, near misses, members of other APIs."""
    key = {"api-key": "a-key-of-ours"}
    asked = {"input": "w1 w2"}
    plain = httpx.post(f"{root}/v1/embeddings", json=asked | {"model": "tiny"}, headers=key)
    assert plain.status_code == 200
    for path in ("/embeddings", "/v1/embeddings/", "/openai/deployments/tiny/embeddings?api-version=1"):
        members = {"model": "tests/tiny", "timeout": 5, "normalize": True, "truncate_prompt_tokens": 48}
        reply = httpx.post(root + path, json=asked | members, headers=key)
        assert reply.json()["data"] == plain.json()["data"]
        assert reply.headers["x-embedmesh-ignored"] == "timeout"
    assert httpx.post(f"{root}/openai/deployments/tiny/embeddings", json=asked, headers=key).status_code == 200
    both = key | {"Authorization": "Bearer another"}
    for path in ("/embeddings", "/openai/deployments/tiny/embeddings", "/v1/tokenize"):
        assert httpx.post(root + path, json=asked).status_code == 401
        assert httpx.post(root + path, json=asked, headers=both).status_code == 400
    for path in ("/health", "/readyz", "/v1/models", "/openai/v1/models/tiny"):
        head, get = (httpx.request(method, root + path, headers=key) for method in ("HEAD", "GET"))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(get.content)) != "0"
    assert "POST /v1/embeddings?" in httpx.post(f"{root}/v1/embedding").json()["error"]["message"]
    assert "tests/tiny" in httpx.get(f"{root}/v1/models/none", headers=key).json()["error"]["message"]
    refused = httpx.post(f"{root}/embeddings", json=asked | {"model": "tiny", "normalize": False}, headers=key)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "normalize")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"standalone": True}, "--api-key"),
        ({"model": "nobody"}, "no model 'nobody' in the catalogue"),
    ],
)
def test_a_door_without_a_lock_and_an_unknown_model_are_one_line_and_78(
    model: Model, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    node = Node(model, tmp_path / "n.sock", **options)
    _, said = node.process.communicate(timeout=START_S)
    assert (node.process.returncode, len(told(said))) == (78, 1), said
    assert says in said
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


def test_a_model_that_is_too_large_is_refused_while_the_others_go_on(model: Model, tmp_path: Path) -> None:
    """By what its headers say, before anything is loaded; who insists gets it."""
    folder = make_folder(tmp_path / "huge")
    write_safetensors(folder / "model.safetensors", make_weights(), claims={"unused.weight": (10**7, 10**7)})
    huge = msgspec.structs.replace(catalogue_entry(folder), id="tests/huge", aliases=("huge",))
    node = Node([model, huge], tmp_path / "n.sock")
    try:
        until(lambda: node.readyz() is not None and node.http.get("/v1/models").json()["data"] != [])
        assert len(vectors(node.embed())) == 1
        assert "huge (down" in node.http.get("/readyz").text  # it is tried again
        node.http.delete("/v1/models/huge")
        refused = node.http.post("/v1/models", json={"model": "huge"})
        assert refused.status_code == 400
        assert "The model huge needs about 400000." in refused.json()["error"]["message"]
        assert len(vectors(node.embed())) == 1
    finally:
        code, said = node.end()
    assert code == 0
    assert "a model is not served: The model huge needs about" in said
    insists = Node(huge, tmp_path / "i.sock", memory_check="ignore")
    try:
        insists.until(200)
    finally:
        assert insists.end()[0] == 0


def test_while_a_model_loads_it_says_how_far_it_is(model: Model, tmp_path: Path) -> None:
    node, seen = Node(model, tmp_path / "n.sock"), []
    try:
        while node.readyz() != 200:
            with suppress(httpx.TransportError):
                seen.append(node.http.get("/v1/models/tiny").json().get("loading"))
        steps = [each for each in seen if each]
        assert steps
        assert all(STEPS[each["step"]] == each["percent"] for each in steps)
        assert "loading" not in node.http.get("/v1/models/tiny").json()
    finally:
        assert node.end()[0] == 0


def test_a_model_that_is_unloaded_leaves_nothing_of_its_tokenizer(model: Model, tmp_path: Path) -> None:
    """Of 250,000 pieces. Its worker has ended; but the node itself had the pieces, and the words it built of them."""
    large = MODELS["multilingual-e5-large-instruct"]
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    folder = make_large(large._replace(config=large.config | small), tmp_path / "pieces")
    pieces = msgspec.structs.replace(
        model, id="tests/pieces", aliases=(), folder=str(folder), max_tokens=512, digest=digest(folder)
    )
    node = Node([model, pieces], tmp_path / "n.sock")

    def resident() -> int:
        return int(Path(f"/proc/{node.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    try:
        node.until(200)
        assert node.embed(model="tests/pieces").status_code == 200
        before = resident()
        assert node.http.delete("/v1/models/tests%2Fpieces").status_code == 200
        assert before - resident() > 60e6
        assert node.embed().status_code == 200
    finally:
        assert node.end()[0] == 0
