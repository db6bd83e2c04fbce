"""Operators' commands against a real gateway: the same output as `--offline`, and one line where there is none."""

import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from embedmesh.commands.group import cli
from embedmesh.provision.bootstrap import bootstrap
from tests.commands.conftest import WIDE, run_offline
from tests.commands.edge import Edge, failure, start

MODEL = "all-MiniLM-L6-v2"
MONTH = time.strftime("%Y-%m", time.gmtime())
READY_S = 30.0


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """That of a gateway that runs, in front of a node that does not."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("operator") / "data"
    bootstrap(folder, f"http://127.0.0.1:{port}/v1")
    given = ["--data-dir", str(folder), "--port", str(port), "--nodes", f"unix:{folder}/none.sock"]
    gateway = start("gateway", *given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_S
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            assert time.monotonic() < deadline and gateway.poll() is None
            time.sleep(0.05)
        yield folder
    finally:
        gateway.send_signal(signal.SIGTERM)
        gateway.communicate(timeout=30)


def online(data_dir: Path, *words: object) -> Result:
    return CliRunner(env=WIDE).invoke(cli, [*map(str, words), "--data-dir", str(data_dir)])


def test_what_is_changed_over_http_is_in_the_store(data_dir: Path) -> None:
    """Each kind of change once; every answer is that of the store."""
    changes: list[tuple[object, ...]] = [
        ("accounts", "create", "team/1"),
        ("accounts", "create", "team", "--credit-limit", 1),
        ("accounts", "credit", "team", 2, "--reference", "a b&c"),
        ("accounts", "cache", "team", "free"),
        ("keys", "create", "team", "--model", MODEL, "--budget-day", 3),
        ("prices", "set", MODEL, "0.02", "--account", "team"),
    ]
    done = [online(data_dir, *words) for words in changes]
    assert [result.exit_code for result in done] == [1, 0, 0, 0, 0, 0], [result.output for result in done]
    assert done[2].stdout == "$2.00 credited; team has $3.00 available.\n"
    [team] = json.loads(run_offline(data_dir)("accounts", "show", "team", "--json").stdout)
    assert (team["balance_nanousd"], team["cache"]) == (2_000_000_000, "free")
    [key] = json.loads(run_offline(data_dir)("keys", "list", "team", "--json").stdout)
    assert (key["limits"]["budget_day"], key["limits"]["models"]) == (3_000_000_000, [f"sentence-transformers/{MODEL}"])


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(
    "words",
    [
        "keys list",
        "keys list nobody",
        "keys change key_none --days 1",
        "keys revoke key_none",
        "keys create --model all-minilm-l6",
        "accounts show",
        "accounts show nobody",
        "accounts limit revenue 1",
        f"accounts statement local {MONTH}",
        "accounts statement local 2026-13",
        "accounts statement nobody 2026-11",
        "prices list",
        "prices end all-MiniLM-L6-v2 --account nobody",
        "ledger check",
        f"ledger check --head {'1' * 64}",
        "ledger explain req_none",
        "ledger refund req_none --reference r",
        "nodes payables",
        "nodes pay n1 1 --reference r",
    ],
)
def test_both_ways_say_the_same(data_dir: Path, words: str, as_json: tuple[str, ...]) -> None:
    """On both streams, with the same exit code, in words and in JSON."""
    for attempt in range(2):  # a closing balance has the time of day in it
        ways = online(data_dir, *words.split(), *as_json), run_offline(data_dir)(*words.split(), *as_json)
        said = [(way.exit_code, way.stdout, way.stderr) for way in ways]
        if said[0] == said[1]:
            break
        assert attempt == 0, said
    assert ways[0].exit_code in (0, 1, 2) and (ways[0].stdout or ways[0].stderr)


@pytest.mark.parametrize("rows", [1, 2, 1_000])
def test_a_statement_comes_page_by_page(data_dir: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry once, whatever a page has."""
    account = f"pages-{rows}"
    for words in (("create", account), *(("credit", account, amount) for amount in (1, 2, 3))):
        assert online(data_dir, "accounts", *words).exit_code == 0
    monkeypatch.setattr("embedmesh.commands.operator.ADMIN_PAGE_ROWS", rows)
    found = json.loads(online(data_dir, "accounts", "statement", account, MONTH, "--json").stdout)
    assert [row["balance_usd"] for row in found] == [f"{usd}.000000000" for usd in (0, 1, 3, 6, 6)]


def test_a_gateway_is_named_with_or_without_v1_and_by_its_old_option(data_dir: Path) -> None:
    url = json.loads((data_dir / "bootstrap.json").read_text())["base_url"]
    for given in (["--gateway", url], ["--gateway", url.removesuffix("/v1")], ["--url", url + "/"]):
        assert online(data_dir, "nodes", "list", *given).exit_code == 0
    refused = online(data_dir, "keys", "list", "--gateway", url, "--offline")
    assert (refused.exit_code, refused.stderr) == (2, "embedmesh: Give --gateway or --offline, not both.\n")


def test_a_wrong_key_is_refused_with_what_to_give(data_dir: Path, tmp_path: Path) -> None:
    """One that the gateway does not know, and one that may only embed."""
    local = json.loads((data_dir / "bootstrap.json").read_text())
    for key, says in (("em_wrong", "does not accept this key"), (local["api_key"], "lacks the scope `admin`")):
        (tmp_path / "key").write_text(key)
        refused = online(data_dir, "keys", "list", "--admin-key-file", tmp_path / "key")
        assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert says in refused.stderr and "--admin-key-file, or EMBEDMESH_ADMIN_KEY" in refused.stderr
        assert key not in refused.stderr


def test_no_gateway_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    """Exit code 78; --offline works all the same, and is not offered where it cannot help."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    bootstrap(tmp_path / "data", f"http://127.0.0.1:{port}/v1")
    for words, offline in ((("keys", "list"), True), (("nodes", "list"), False)):
        process = start(*words, "--data-dir", str(tmp_path / "data"))
        out, said = process.communicate(timeout=60)
        assert (process.returncode, out, said.count("\n")) == (78, "", 1)
        assert f"No gateway answers on http://127.0.0.1:{port}/v1 (Connection refused)" in said
        assert "embedmesh serve" in said and ("--offline" in said) == offline
    assert run_offline(tmp_path / "data")("keys", "list").exit_code == 0


def test_a_gateway_of_another_version_is_named(edge: Edge, tmp_path: Path) -> None:
    """It may lack the route. Where nothing tells the version, it may be another program."""
    (tmp_path / "key").write_text("k")
    given = ("keys", "list", "--gateway", edge.base_url, "--admin-key-file", tmp_path / "key")
    assert "an embedmesh gateway?" in online(tmp_path, *given).stderr
    edge.routes["/openapi.json"] = web.json_response({"info": {"version": "0.0.1"}})
    edge.routes["/v1/admin/keys"] = failure(404, "not_found", "There is nothing at this path.")
    said = online(tmp_path, *given)
    assert said.exit_code == 1
    assert "There is nothing at this path. The gateway is embedmesh 0.0.1, this command " in said.stderr
    edge.routes["/v1/admin/keys"] = web.Response(body=b"<html>")
    assert "is no embedmesh gateway" in str(online(tmp_path, *given).exception)
