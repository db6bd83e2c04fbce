"""`embedmesh doctor`: what is well is ok, what is not is named with what to do, and nothing is changed."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from embedmesh.commands import checks
from embedmesh.commands.doctor import doctor
from embedmesh.provision.bootstrap import open_books
from embedmesh.settings import store_path
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.books.new_keys import LIMITS_EXAMPLE, NewKeys
from tests.commands.edge import Edge, bootstrap, failure
from tests.data import model_folder
from tests.engine.test_precision import pretend

Doctor = Callable[..., tuple[Result, dict[str, Any]]]


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Run it on tmp_path/data with no assets fetched; gives the checks by name."""
    monkeypatch.setenv("EMBEDMESH_ASSETS_DIR", str(tmp_path / "assets"))

    def run(*arguments: str) -> tuple[Result, dict[str, Any]]:
        result = CliRunner().invoke(doctor, ["--data-dir", str(tmp_path / "data"), "--json", *arguments])
        assert result.exit_code in (0, 1), result.output
        said = json.loads(result.stdout)
        assert said["well"] == (result.exit_code == 0)
        return result, {check["name"]: check for check in said["checks"]}

    return run


def live(edge: Edge) -> None:
    edge.routes = {
        "/health": web.json_response({"message": "ok"}),
        "/readyz": web.json_response({"message": "ready"}),
        "/v1/models": web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]}),
    }


def test_a_machine_before_set_up(examined: Doctor, tmp_path: Path) -> None:
    """The missing model fails and says what to run; the ranks are a warning; nothing is made."""
    result, found = examined("--port", str(free_port()))
    assert result.exit_code == 1
    assert (found["all-MiniLM-L6-v2"]["state"], found["cl100k_base"]["state"]) == ("fail", "warn")
    assert found["all-MiniLM-L6-v2"]["todo"] == "Run `embedmesh setup`."
    for name in ("python", "cpu", "threads", "sqlite", "data folder", "port"):
        assert found[name]["state"] == "ok", found[name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_a_machine_after_set_up(tmp_path: Path) -> None:
    """With the files there it is well, and the table for people says so, too."""
    model_folder()
    given = ["--data-dir", str(tmp_path / "data"), "--port", str(free_port())]
    result = CliRunner().invoke(doctor, given)
    assert result.exit_code == 0, result.output
    assert "hashes right" in result.stdout and "fail" not in result.stdout
    assert result.stdout.splitlines()[-1] in ("All is well.", "1 warning: it will run.", "2 warnings: it will run.")
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_a_running_server_is_asked_for_an_embedding(examined: Doctor, edge: Edge, tmp_path: Path) -> None:
    """Its port counts as ours; the embedding is real."""
    live(edge)
    bootstrap(tmp_path / "data", edge.base_url)
    _, found = examined()
    assert [found[name]["state"] for name in ("port", "endpoint", "ready", "embedding", "data folder")] == ["ok"] * 5
    assert found["embedding"]["found"].startswith("4 components, 3 tokens, ")
    assert [asked.texts for asked in edge.asked] == [["doctor"]]


def test_a_model_that_embeds_is_asked_for_an_embedding(examined: Doctor, edge: Edge, tmp_path: Path) -> None:
    """Whatever is served before it; tests/story/test_rerank.py has a server where none embeds."""
    live(edge)
    bootstrap(tmp_path / "data", edge.base_url)
    served = [{"id": kind, "modalities": [kind]} for kind in ("chat", "rerank", "embeddings")]
    edge.routes["/v1/models"] = web.json_response({"object": "list", "data": served})
    assert examined()[1]["embedding"]["state"] == "ok"
    edge.routes["/v1/models"] = web.json_response({"object": "list", "data": served[:1]})
    assert examined()[1]["embedding"] == {
        "name": "embedding", "state": "ok", "found": "no model embeds or reranks here: none was asked", "todo": ""
    }  # fmt: skip
    assert [asked.body["model"] for asked in edge.asked] == ["embeddings"]


def test_a_server_that_is_not_well(examined: Doctor, edge: Edge, tmp_path: Path) -> None:
    """Each way to be ill is told apart."""
    bootstrap(tmp_path / "data", edge.base_url)

    def state_of(name: str) -> tuple[str, str]:
        _, found = examined()
        return found[name]["state"], found[name]["found"]

    assert state_of("endpoint") == ("fail", f"another program than embedmesh listens at {edge.base_url}")
    assert "port" not in examined()[1]  # not said twice
    live(edge)
    edge.routes["/readyz"] = failure(503, "no_node_available", "No node has answered yet.")
    assert state_of("ready") == ("fail", "No node has answered yet.")
    edge.routes["/readyz"] = web.json_response({"ready": False, "reasons": ["the store", "x starved: y"]}, status=503)
    assert state_of("ready") == ("fail", "the store; x starved: y")
    live(edge)
    edge.routes["/v1/models"] = failure(401, "invalid_api_key", "The key is not good.")
    assert state_of("embedding") == ("fail", "The key is not good. (invalid_api_key)")
    live(edge)
    edge.script = lambda asked: failure(429, "insufficient_quota", "Not enough money.")
    assert state_of("embedding") == ("fail", "Not enough money. (insufficient_quota)")
    edge.script = lambda asked: web.json_response({"nonsense": True})
    assert state_of("endpoint")[0] == "fail"
    edge.routes["/v1/models"] = web.json_response({"data": []})
    assert state_of("embedding") == ("fail", "no model is served")


def test_a_server_that_gets_too_little_cpu_is_a_warning(examined: Doctor, edge: Edge, tmp_path: Path) -> None:
    """It answers, slowly; and what to do is said."""
    bootstrap(tmp_path / "data", edge.base_url)
    live(edge)
    edge.routes["/readyz"] = web.json_response({"ready": True, "reasons": ["1 of 1 nodes starved: x"]})
    _, found = examined()
    assert (found["ready"]["state"], found["embedding"]["state"]) == ("warn", "ok")
    assert "1 of 1 nodes starved: x" in found["ready"]["found"] and "CPU" in found["ready"]["todo"]


def test_a_server_that_has_stopped_is_a_warning(examined: Doctor, tmp_path: Path) -> None:
    """Not running is no fault; the port it had is looked at."""
    port = free_port()
    bootstrap(tmp_path / "data", f"http://127.0.0.1:{port}/v1")
    _, found = examined()
    assert found["endpoint"]["state"] == "warn" and "embedmesh serve" in found["endpoint"]["todo"]
    assert found["port"]["found"] == f"127.0.0.1 port {port}: free"


def test_a_program_that_does_not_speak_http(examined: Doctor, tmp_path: Path) -> None:
    """One failure, not two, for whatever else listens where our server was."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        bootstrap(tmp_path / "data", f"http://127.0.0.1:{other.getsockname()[1]}/v1")
        rude = threading.Thread(target=hang_up_on_all, args=(other,))
        rude.start()
        _, found = examined()
        other.shutdown(socket.SHUT_RDWR)
        rude.join()
    assert found["endpoint"]["state"] == "fail" and "another program" in found["endpoint"]["found"]
    assert "port" not in found


@pytest.mark.parametrize(("place", "says"), [("/proc/x", "/proc is not writable"), ("file", "is a file, not a folder")])
def test_a_data_folder_that_cannot_be(tmp_path: Path, place: str, says: str) -> None:
    """One failure, of the folder, and no word on a full disk."""
    (tmp_path / "file").touch()
    assert says in checks.check_data_dir(tmp_path / place).found
    assert checks.check_data_dir(tmp_path / place).state == "fail"
    assert checks.check_disk(tmp_path / place).state != "fail"


def test_a_port_that_another_program_has(examined: Doctor) -> None:
    """It fails and says to choose another."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        _, found = examined("--port", str(other.getsockname()[1]))
    assert found["port"]["state"] == "fail" and "--port" in found["port"]["todo"]


def test_a_data_folder_that_others_can_read(examined: Doctor, tmp_path: Path) -> None:
    """Keys that others may read are a failure; the command that mends it is given."""
    data_dir = bootstrap(tmp_path / "data", "http://127.0.0.1:9/v1")
    (data_dir / "bootstrap.json").chmod(0o644)
    _, found = examined()
    assert found["data folder"]["state"] == "fail"
    assert "bootstrap.json" in found["data folder"]["found"] and "chmod" in found["data folder"]["todo"]


def test_damaged_files_are_told_from_missing_ones(examined: Doctor, tmp_path: Path) -> None:
    """A file that is there and wrong is named."""
    ranks = tmp_path / "assets" / "cl100k_base.tiktoken"
    ranks.parent.mkdir()
    ranks.write_bytes(b"x")
    _, found = examined()
    assert found["cl100k_base"]["found"] == "damaged: cl100k_base.tiktoken"


def test_a_catalogue_of_the_operator(examined: Doctor, tmp_path: Path) -> None:
    """The file's faults and its models' folders are looked at."""
    file = tmp_path / "models.toml"
    file.write_text("models = 3")
    assert "models: expected" in examined("--catalogue", str(file))[1]["catalogue"]["found"]
    digest = "0" * 64
    file.write_text(f'[[models]]\nid="m"\nfolder="f"\nwidth=3\nmax_tokens=9\nprice=1\ndigest="{digest}"\n')
    assert examined("--catalogue", str(file))[1]["model m"]["found"].startswith("no folder")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "modules.json").write_text("[]")
    assert examined("--catalogue", str(file))[1]["model m"]["state"] == "fail"


@pytest.mark.parametrize(
    ("told", "host", "state"),
    [
        (NewKeys(), None, None),
        (NewKeys(), "127.0.0.1", None),
        (NewKeys(open_to_others=True), None, "warn"),
        (NewKeys(open_to_others=True), "localhost", None),
        (NewKeys(), "0.0.0.0", "warn"),
        (NewKeys(), "::", "warn"),
        (NewKeys(), "gateway.example", "warn"),
        (NewKeys(Limits(concurrency=8), open_to_others=True), None, "ok"),
        (NewKeys(Limits(concurrency=8)), "0.0.0.0", "ok"),
    ],
)
def test_new_keys_without_limits_where_others_reach_the_gateway(
    examined: Doctor, tmp_path: Path, told: NewKeys, host: str | None, state: str | None
) -> None:
    """A warning that says how to give them some; no word on a laptop."""
    with open_books(tmp_path / "data", store_path(tmp_path / "data")) as books:
        books.new_keys.write(told)
    _, found = examined(*([] if host is None else ["--host", host]), "--port", str(free_port()))
    assert found.get("new keys", {}).get("state") == state
    if state == "warn":
        assert f"--key-defaults {LIMITS_EXAMPLE}" in found["new keys"]["todo"]


@pytest.mark.parametrize("kilobytes, state", [(8_000_000, "ok"), (900_000, "warn"), (400_000, "fail"), (None, "ok")])
def test_memory(tmp_path: Path, kilobytes: int | None, state: str) -> None:
    """Half a gigabyte is needed; a system that does not say is not blamed."""
    meminfo = tmp_path / "meminfo"
    if kilobytes is not None:
        meminfo.write_text(f"MemTotal: 1 kB\nMemAvailable:  {kilobytes} kB\n")
    assert checks.check_memory(meminfo).state == state


def test_cpu_and_python(tmp_path: Path) -> None:
    """What decides the speed is shown; Python 3.10 fails, and a build without a profile does not."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: sse2 avx2 avx512f avx512_bf16\n")
    assert checks.check_cpu(cpuinfo).found.endswith("AVX2 AVX-512 BF16")
    assert checks.check_python((3, 10, 4)).state == "fail"
    for profiled, words in ((True, "3.12.4 with PGO"), (False, "3.12.4 without PGO")):
        check = checks.check_python((3, 12, 4), profiled=profiled)
        assert (check.state, check.found.startswith(words)) == ("ok", True)


def test_tiers_by_what_the_cpu_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are served, and what the others would need; a CPU that serves only exact is well."""
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: avx2 avx512f avx512_vnni\n")
    pretend(monkeypatch, info)
    check = checks.check_tiers()
    assert (check.state, check.found) == (
        "ok",
        "exact int8; fast would need bfloat16 instructions (AVX512_BF16 or AMX)",
    )


def hang_up_on_all(listening: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it ends when the socket is shut down
        while True:
            listening.accept()[0].close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
