"""A file of settings from the outside: what `config` shows and checks, and reloads by SIGHUP and by an operator."""

import json
import os
import pty
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.data import model_folder
from tests.story.conftest import Serve
from tests.story.endpoint import MODEL, Endpoint, run, run_json, wait_until

DIGEST = "8b15441b4c169b78dcc3f86d491663fade918ca0772dae0b58d0eba4f681d569"
SEEN = 12  # replies in a row, each on a connection of its own: both workers gave some of them
FOLLOWS_S = 30.0

CATALOGUE = """
[[models]]
id = "{model}"
aliases = ["{alias}"]
folder = "{folder}"
width = 384
max_tokens = {max_tokens}
price = {price}
digest = "{digest}"
"""


class Config:
    """The file and its catalogue."""

    def __init__(self, folder: Path) -> None:
        self.file, self.models = folder / "embedmesh.toml", folder / "models.toml"

    def write(self, text: str, *, alias: str = "first", price: int = 10_000_000, max_tokens: int = 256) -> None:
        made = CATALOGUE.format(
            model=MODEL, alias=alias, folder=model_folder(), digest=DIGEST, price=price, max_tokens=max_tokens
        )
        self.models.write_text(made)
        self.file.write_text(f'catalogue = "models.toml"\n{text}')


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path)


@contextmanager
def asked_meanwhile(endpoint: Endpoint) -> Iterator[list[int]]:
    """Statuses of requests that are made all the while."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with httpx.Client(headers={"Authorization": f"Bearer {endpoint.api_key}"}, timeout=60.0) as http:
                for _ in range(5):
                    reply = http.post(
                        f"{endpoint.base_url}/embeddings", json={"model": MODEL, "input": "all the while"}
                    )
                    statuses.append(reply.status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for each in threads:
        each.start()
    try:
        yield statuses
    finally:
        stop.set()
        for each in threads:
            each.join()


def everywhere(endpoint: Endpoint, origin: str, alias: str, cost: int) -> None:
    """Wait until each of SEEN new connections gets the CORS header, the alias and the price."""

    def seen() -> bool:
        for _ in range(SEEN):
            headers = {"Authorization": f"Bearer {endpoint.api_key}", "Origin": origin}
            body = {"model": alias, "input": "hello"}
            reply = httpx.post(f"{endpoint.base_url}/embeddings", json=body, headers=headers, timeout=60.0)
            if reply.status_code != 200 or reply.headers.get("access-control-allow-origin") != origin:
                return False
            if int(reply.headers["x-embedmesh-cost-nanousd"]) != cost:
                return False
        return True

    wait_until(f"both workers have {origin} and {alias}", seen, FOLLOWS_S)


def reload(endpoint: Endpoint) -> Any:
    """What the admin API says."""
    headers = {"Authorization": f"Bearer {endpoint.admin_key}"}
    return httpx.post(f"{endpoint.base_url}/admin/reload", headers=headers, timeout=60.0)


def test_workers_follow_while_requests_run_and_a_broken_file_changes_nothing(config: Config, serve: Serve) -> None:
    config.write('cors_origin = ["https://one.example"]\n')
    endpoint = serve("--workers", 2, "--config", config.file).wait_ready()
    tokens = endpoint.ask(input="hello").json()["usage"]["total_tokens"]
    with asked_meanwhile(endpoint) as statuses:
        everywhere(endpoint, "https://one.example", "first", 10 * tokens)
        config.write('cors_origin = ["https://two.example"]\nport = 1', alias="second", price=20_000_000)
        endpoint.process.send_signal(signal.SIGHUP)
        everywhere(endpoint, "https://two.example", "second", 20 * tokens)
        config.write('cors_origin = ["https://three.example"]\nin_flight_max = 500', alias="third", price=30_000_000)
        told = run_json("config", "reload", "--data-dir", endpoint.data_dir)
        assert set(told["changed"]) == {"cors_origin", "in_flight_max", "catalogue"}, told
        assert told["models"]["changed"] == [MODEL]
        everywhere(endpoint, "https://three.example", "third", 30 * tokens)  # the worker that was not asked, too
        for text, says in (("cors_orign = []", "`cors_origin`"), ('cors_origin = ["x"]', "Mend --cors-origin")):
            config.write(text, alias="fourth")
            refused = reload(endpoint)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
            assert says in refused.json()["error"]["message"]
            assert str(config.file.parent) not in refused.text
        config.write("", max_tokens=128)
        assert "has another max_tokens" in reload(endpoint).json()["error"]["message"]
        everywhere(endpoint, "https://three.example", "third", 30 * tokens)
    assert set(statuses) == {200}
    refusals = "embedmesh_settings_reloads_refused_total"  # the other worker tells of its own within seconds
    wait_until("each refusal is counted", lambda: endpoint.metric(refusals) >= 3, FOLLOWS_S)
    log = endpoint.log.read_text()
    assert "a restart is needed for: port" in log and "the settings stay as they were" in log
    assert "embedmesh.node: the catalogue was read again" in log
    assert endpoint.stop() == 0


def test_config_shows_where_each_setting_comes_from_and_masks_secrets(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    file = data / "embedmesh.toml"
    file.write_text('port = 8099\nhost = "0.0.0.0"\nhedge = true\nstore = "postgresql://me:hidden@db/x"\n')
    file.chmod(0o600)
    done = run("config", "show", "--json", "serve", "--data-dir", data, "--port", "8100", EMBEDMESH_WORKERS="2")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    found = {row["name"]: (row["value"], row["from"], row["reloads"]) for row in shown["settings"]}
    assert shown["file"] == str(file)
    assert found["port"] == (8100, "command line", False)
    assert found["host"] == ("0.0.0.0", "file", False)
    assert found["workers"] == (2, "environment (EMBEDMESH_WORKERS)", False)
    assert found["hedge"] == (True, "file", True)
    assert found["policy"] == ("fastest", "default", True)
    assert found["store"] == ("postgresql://me:****@db/x", "file", False)
    plain = run("config", "show", "gateway", "--data-dir", data)
    assert b"hidden" not in plain.stdout and b"SETTING" in plain.stdout


def test_config_check_tells_all_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "embedmesh.toml"
    file.write_text('port = 8099\nprot = 1\npolicy = "fastst"\n')
    done = run("config", "check", "--json", file)
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], len(told["problems"])) == (78, False, 2)
    assert "line 2" in told["problems"][1] + told["problems"][0]
    file.write_text('cors_origin = ["x"]\ncatalogue = "models.toml"\noidc_audience = "x"\nnodes = ["tcp:1"]\n')
    models = CATALOGUE.format(model="m", alias="a", folder="nowhere", digest=DIGEST, price=1, max_tokens=8)
    (tmp_path / "models.toml").write_text(models)
    problems = json.loads(run("config", "check", "--json", file).stdout)["problems"]
    assert len(problems) == 4 and any("nowhere" in each for each in problems), problems
    file.write_text("port = 8099\n")
    assert run("config", "check", file).returncode == 0
    started = run("serve", "--config", tmp_path / "none.toml", "--data-dir", tmp_path / "data")
    assert (started.returncode, b"cannot be read" in started.stderr) == (78, True)


def test_commands_that_open_the_store_find_it_by_the_same_file(tmp_path: Path) -> None:
    """A store that the file names, in a data directory that it names."""
    file = tmp_path / "embedmesh.toml"
    file.write_text('data_dir = "here"\nstore = "books/other.db"\n')
    (tmp_path / "books").mkdir()
    made = run("store", "init", "--config", file)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "books" / "other.db").exists() and (tmp_path / "here" / "bootstrap.json").exists()
    listed = run("accounts", "list", "--offline", "--json", "--config", file)
    assert listed.returncode == 0 and "local" in [row["account"] for row in json.loads(listed.stdout)]


def test_it_stops_when_its_terminal_is_closed_and_goes_on_at_sighup_while_it_is_open(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    import subprocess
    import sys

    log = (tmp_path / "log").open("wb")
    arguments = ["serve", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "embedmesh", *arguments], stdin=theirs, stdout=log, stderr=log, start_new_session=True
    )
    os.close(theirs)
    try:
        said = tmp_path / "log"
        wait_until("it is ready", lambda: "Ready:" in said.read_text() or process.poll() is not None, 60.0)
        process.send_signal(signal.SIGHUP)
        wait_until("it reads again", lambda: "reading the settings again" in said.read_text(), 30.0)
        assert process.poll() is None
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60.0) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()


def test_the_node_of_serve_follows_to_another_catalogue(config: Config, serve: Serve) -> None:
    """At SIGHUP, where the file of settings names another: the node can load what is in it, also once it starts anew.

    And what serves another store than the last time says so.
    """
    config.write("")
    endpoint = serve("--config", config.file).wait_ready()
    ready = json.loads(endpoint.said.read_text())
    assert ready["store"] == str(endpoint.data_dir / "embedmesh.db")
    other = config.file.with_name("other.toml")
    other.write_text(config.models.read_text().replace('aliases = ["first"]', 'aliases = ["other"]'))
    config.file.write_text('catalogue = "other.toml"\n')
    config.models.unlink()
    endpoint.process.send_signal(signal.SIGHUP)
    wait_until("the node has read it", lambda: "the catalogue was read again" in endpoint.log.read_text(), FOLLOWS_S)
    assert "the catalogue stays as it was" not in endpoint.log.read_text()
    node = endpoint.pid("node")
    assert node is not None
    os.kill(node, signal.SIGKILL)
    wait_until("it answers again", endpoint.answers, 60.0)
    assert endpoint.ask(input="hello", model="other").status_code == 200
    assert endpoint.stop() == 0
    elsewhere = serve("--config", config.file, "--store", config.file.with_name("b.db")).wait_ready()
    said = elsewhere.log.read_text()
    assert f"served another store, {ready['store']}; this one serves {config.file.parent}/b.db" in said, said
    assert elsewhere.stop() == 0
