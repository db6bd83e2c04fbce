"""A model is found here before anybody is asked; offline nobody is asked; online just the right files come.

The hub is a server of our own on loopback that speaks as much of the hub's protocol as `huggingface_hub` needs. Each
look-up runs in a process of its own: the library reads its settings when it is imported.
"""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from embedmesh.engine.folder import digest, read_folder
from embedmesh.provision.hub import find_model
from embedmesh.rules.errors import SetupError
from tests.engine.tiny import make_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOLDENS = Path(__file__).parents[1] / "engine" / "goldens"
ONNX, RERANKER = GOLDENS / "folders" / "onnx", GOLDENS / "rerankers" / "bert"

LOOK_UP = """
import sys, pathlib
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("TRAFFIC", arguments[-1] if event == "socket.connect" else arguments[0], flush=True)
        if "--guard" in sys.argv:
            import os
            os._exit(99)
sys.addaudithook(hook)
from embedmesh.provision.hub import find_model
from embedmesh.rules.errors import SetupError
try:
    print("FOUND", find_model(sys.argv[1], models_dir=pathlib.Path(sys.argv[2]), offline="--offline" in sys.argv))
except SetupError as error:
    print("REFUSED", error)
print("LIBRARY", "huggingface_hub" in sys.modules)
"""


def look_up(
    name: str, models_dir: Path, *options: str, endpoint: str = "http://127.0.0.1:9", **environment: str
) -> tuple[int, str]:
    """Find a model in a process of its own: its exit status, and what it and the library said."""
    home = models_dir.parent / "home"
    kept = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "AI_AGENT": "x",
    }
    kept |= environment
    command = [sys.executable, "-c", LOOK_UP, name, str(models_dir), *options]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


class Hub:
    """`acme/tiny` at one commit, as files by name; and what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.files = {
            file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
        self.broken_after: int | None = None
        self.asked: list[str] = []
        self.agents: set[str] = set()
        self.revisions = {"main", "v1", COMMIT}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET."""
        parts = urlsplit(path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._answer_api(parts[2:])
        if parts[:2] != ["acme", "tiny"] or parts[2] != "resolve" or "/".join(parts[4:]) not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        name = "/".join(parts[4:])
        content = self.files[name]
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, content

    def _answer_api(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        if parts[:2] == ["acme", "closed"]:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if parts[:2] == ["acme", "down"]:
            return 500, {}, b"{}"
        if parts[:2] != ["acme", "tiny"]:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if len(parts) > 3 and parts[3] not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        body: Any = {"id": "acme/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
        if len(parts) > 2 and parts[2] == "tree":
            body = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """One request to the hub."""

    hub: Hub

    def do_HEAD(self) -> None:
        self._reply(with_body=False)

    def do_GET(self) -> None:
        self._reply(with_body=True)

    def _reply(self, *, with_body: bool) -> None:
        if with_body:
            self.hub.asked.append(self.path)
        self.hub.agents.add(self.headers["User-Agent"])
        status, headers, body = self.hub.answer(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            short = "safetensors" in self.path and self.hub.broken_after is not None
            self.wfile.write(body[: self.hub.broken_after] if short else body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Hub, str]]:
    """A running hub and its address. Its model has all that repositories usually hold besides."""
    folder = make_folder(tmp_path / "published")
    for name in ("README.md", "pytorch_model.bin", "evil.py", "vocab.txt", "optimizer.safetensors", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not wanted")
    (folder / "onnx" / "model.onnx").write_bytes(b"not wanted")
    served = Hub(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": served}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield served, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def found(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


WANTED = {
    "config.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "model.safetensors",
}


@pytest.mark.story
@pytest.mark.parametrize("name", ["acme/tiny", "acme/tiny@v1", f"acme/tiny@{COMMIT}"])
def test_a_model_is_fetched_with_just_what_it_is_served_from(tmp_path: Path, hub: tuple[Hub, str], name: str) -> None:
    """It is then the published model by its digest, the staging folder is gone, and the next look-up asks nobody."""
    served, endpoint = hub
    models = tmp_path / "models"
    status, said = look_up(name, models, endpoint=endpoint)
    assert f"FOUND {models / name}" in said
    assert status == 0
    assert found(models / name) == WANTED
    assert digest(models / name) == digest(make_folder(tmp_path / "again"))
    assert found(models / ".fetch") == {".lock"}
    assert not any("agent/" in agent for agent in served.agents), "the library was told to send no telemetry"
    assert all(path.startswith(("/api/models/acme/tiny", "/acme/tiny/resolve/")) for path in served.asked)
    served.asked.clear()
    assert look_up(name, models, "--guard", endpoint=endpoint)[1].startswith(f"FOUND {models / name}\nLIBRARY False")
    assert served.asked == []


@pytest.mark.story
def test_an_onnx_file_is_fetched_only_where_it_is_needed(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    served, endpoint = hub
    served.files = Hub(ONNX).files | {"model.safetensors": b"of an architecture that we do not build"}
    served.files["config.json"] = served.files["config.json"].replace(b'"electra"', b'"deberta-v2"')
    status, said = look_up("acme/tiny", tmp_path / "models", endpoint=endpoint)
    assert status == 0, said
    here = found(tmp_path / "models" / "acme" / "tiny")
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} < here
    assert "model.safetensors" not in here
    assert read_folder(tmp_path / "models" / "acme" / "tiny").source == "onnx"


@pytest.mark.story
def test_a_reranker_is_fetched_without_modules(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    served, endpoint = hub
    served.files = Hub(RERANKER).files | {"onnx/model.onnx": b"not wanted", "pytorch_model.bin": b"not wanted"}
    _, said = look_up("acme/tiny", tmp_path / "models", endpoint=endpoint)
    folder = tmp_path / "models" / "acme" / "tiny"
    assert "FOUND" in said, said
    assert found(folder) == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert (digest(folder), read_folder(folder).reranks) == (digest(RERANKER), True)


@pytest.mark.story
def test_a_fetch_that_broke_leaves_no_model_and_is_taken_up_again(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    served, endpoint = hub
    served.broken_after = 1_000
    _, said = look_up("acme/tiny", tmp_path / "models", endpoint=endpoint)
    assert "REFUSED The model acme/tiny cannot be fetched" in said
    assert not (tmp_path / "models" / "acme").exists()
    stale = tmp_path / "models" / ".fetch" / "older" / "acme--tiny" / "model-2.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_text("of another commit")
    served.broken_after = None
    served.asked.clear()
    _, said = look_up("acme/tiny", tmp_path / "models", endpoint=endpoint)
    assert "FOUND" in said
    assert not any("tokenizer.json" in path for path in served.asked), "what was whole is not fetched twice"
    assert found(tmp_path / "models" / "acme" / "tiny") == WANTED
    assert not stale.exists()


@pytest.mark.story
def test_a_model_that_is_not_understood_is_not_kept(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    """And its weights are not fetched when its configs say so already."""
    served, endpoint = hub
    del served.files["modules.json"]
    _, said = look_up("acme/tiny", tmp_path / "models", endpoint=endpoint)
    assert "REFUSED Model folder acme--tiny has no modules.json" in said
    assert not any("safetensors" in path for path in served.asked)
    assert found(tmp_path / "models") == {".fetch/.lock"}


@pytest.mark.story
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("acme/none", "the hub has no such model"),
        ("acme/tiny@v2", "the hub has no such revision"),
        ("acme/closed", "it is gated"),
        ("acme/down", "the hub answered 500"),
    ],
)
def test_what_the_hub_cannot_give_is_said_in_one_line(
    tmp_path: Path, hub: tuple[Hub, str], name: str, says: str
) -> None:
    _, said = look_up(name, tmp_path / "models", endpoint=hub[1])
    line = next(line for line in said.splitlines() if line.startswith("REFUSED"))
    assert says in line
    assert "127.0.0.1" not in line


@pytest.mark.story
def test_a_hub_that_is_away_is_said_in_one_line(tmp_path: Path) -> None:
    status, said = look_up("acme/tiny", tmp_path / "models")
    assert "REFUSED The model acme/tiny cannot be fetched: the hub cannot be reached" in said
    assert status == 0


@pytest.mark.story
def test_offline_nothing_leaves_the_machine(tmp_path: Path) -> None:
    """The guard ends the process at the first name that is looked up or address that is connected to."""
    status, said = look_up("acme/tiny", tmp_path / "models", "--guard")
    assert (status, "TRAFFIC" in said) == (99, True), "the guard itself must bite"
    status, said = look_up("acme/tiny", tmp_path / "none", "--guard", "--offline")
    assert status == 0
    assert "REFUSED The model acme/tiny is not in" in said
    assert "offline mode forbids to fetch it" in said
    assert "LIBRARY False" in said
    assert not (tmp_path / "none").exists()
    status, said = look_up("acme/tiny", tmp_path / "models", "--guard", HF_HUB_OFFLINE="1")
    assert (status, "REFUSED The model acme/tiny cannot be fetched: HF_HUB_OFFLINE forbids it." in said) == (0, True)


def test_a_folder_is_found_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, absolute or relative; else by its name among the models that are here."""
    models = tmp_path / "models"
    folder = make_folder(models / "acme" / "tiny@v1")
    assert find_model(str(folder), models_dir=tmp_path, offline=True) == folder
    assert find_model("acme/tiny@v1", models_dir=models, offline=True) == folder
    shutil.copytree(folder, models / "mine")
    assert find_model("mine", models_dir=models, offline=True) == models / "mine"
    monkeypatch.chdir(models)
    assert find_model("acme/tiny@v1", models_dir=tmp_path, offline=True) == folder
    with pytest.raises(SetupError, match="offline"):
        find_model("acme/tiny", models_dir=models, offline=True)


@pytest.mark.parametrize("name", ["", "tiny", "../tiny", "acme/../tiny", "/no/such", "a/b/c", "acme/tiny@", "acme/t n"])
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError, match="no model folder"):
        find_model(name, models_dir=tmp_path, offline=False)
