"""The commands, run as people run them, against a running endpoint and its store."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from embedmesh.commands.group import cli
from embedmesh.storage.sqlite.driver import driver as sqlite
from tests.data import THOROUGH
from tests.story.conftest import Serve
from tests.story.endpoint import COMMAND, MODEL, SAME, WIDTH, Endpoint, Vectors, run, run_json, wait_until

TEXTS = ["A first line.", "Ein zweiter Satz.", "三行目", "the fourth & last"]
MANY = [f"line {number} of a file that takes a while " + "to embed " * 10 for number in range(160)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("".join(text + "\n" for text in TEXTS), encoding="utf-8")
    return file


@pytest.fixture
def data(endpoint: Endpoint) -> tuple[object, ...]:
    """The option that says which store and bootstrap.json are meant."""
    return ("--data-dir", endpoint.data_dir)


def rows(jsonl: bytes) -> Vectors:
    """The vectors of JSON lines, whose indices must be in order."""
    found = [json.loads(line) for line in jsonl.splitlines()]
    assert [row["index"] for row in found] == list(range(len(found)))
    return np.array([row["embedding"] for row in found], np.float32)


# -- embed -----------------------------------------------------------------------------------------------------------


def test_embed_a_file(endpoint: Endpoint, lines: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    """JSON lines and a float32 array hold the same vectors, which are the endpoint's."""
    expected = endpoint.embed(TEXTS)
    summary = run_json("embed", lines, "-o", tmp_path / "v.jsonl", *data)
    assert np.abs(rows((tmp_path / "v.jsonl").read_bytes()) - expected).max() <= SAME
    assert (summary["ended"], summary["embedded"], summary["refused"]) == ("finished", 4, 0)
    assert summary["cost_nanousd"] == 10 * summary["tokens"]

    run_json("embed", lines, "-o", tmp_path / "v.npy", *data)
    array = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert (array.dtype, array.shape) == (np.float32, (4, WIDTH))
    assert np.abs(array - expected).max() <= SAME


def test_embed_standard_input(endpoint: Endpoint, lines: Path, data: tuple[object, ...]) -> None:
    """Lines in, lines out, through pipes; a line that is refused is told by number and does not stop the others."""
    done = run("embed", "-", *data, stdin=lines.read_bytes())
    assert done.returncode == 0, done.stderr.decode()
    assert np.abs(rows(done.stdout) - endpoint.embed(TEXTS)).max() <= SAME
    done = run("embed", "-", *data, stdin=b"good\n" + b"word " * 300 + b"\ngood\n")
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["embedding"] is None for row in found] == [False, True, False]
    assert found[1]["error"]["code"] == "context_length_exceeded"
    assert b"line 2" in done.stderr


@pytest.mark.parametrize("suffix", ["jsonl", "npy"] if THOROUGH else ["npy"])  # see test_embed_process.py
def test_embed_goes_on_after_ctrl_c(endpoint: Endpoint, data: tuple[object, ...], tmp_path: Path, suffix: str) -> None:
    """Interrupted in the middle, the same command goes on where it was, and embeds no line twice."""
    source, target = tmp_path / "many.txt", tmp_path / f"v.{suffix}"
    source.write_text("".join(text + "\n" for text in MANY))
    command = ["embed", source, "-o", target, "--batch", 10, *data]
    running = subprocess.Popen(
        [*COMMAND, *map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until("first rows are written", lambda: written(tmp_path) > 30_000, 20)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130, said.decode()
    assert b"Traceback" not in said

    summary = run_json(*command)
    assert 0 < summary["lines_before"] < len(MANY)
    assert summary["lines_before"] + summary["lines"] == len(MANY)
    vectors = np.load(target, allow_pickle=False) if suffix == "npy" else rows(target.read_bytes())
    assert vectors.shape == (len(MANY), WIDTH)
    some = [0, summary["lines_before"] - 1, summary["lines_before"], len(MANY) - 1]
    assert np.abs(endpoint.embed([MANY[number] for number in some]) - vectors[some]).max() <= SAME


def written(folder: Path) -> int:
    """Bytes of output so far, under whatever name it has until it is whole."""
    return sum(path.stat().st_size for path in folder.glob("v.*"))


# -- accounts, keys, ledger, store -----------------------------------------------------------------------------------


def test_keys(endpoint: Endpoint, data: tuple[object, ...]) -> None:
    """A key that was made works, is listed without itself, and is useless once revoked."""
    made = run_json("keys", "create", "local", "--name", "story", "--scope", "embeddings", *data)
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert endpoint.ask(input="x", headers=headers).status_code == 200
    listed = run("keys", "list", *data, "--json")
    assert made["key"].encode() not in listed.stdout
    assert {key["key_id"]: key["state"] for key in json.loads(listed.stdout)}[made["key_id"]] == "active"
    assert run_json("keys", "revoke", made["key_id"], *data) == {"revoked": True, "key_id": made["key_id"]}
    time.sleep(1.0)  # it is useless everywhere within a second
    assert endpoint.ask(input="x", headers=headers).status_code == 401
    again = run("keys", "revoke", made["key_id"], *data)
    assert again.returncode == 1
    assert b"revoked before" in again.stderr


def test_accounts(endpoint: Endpoint, data: tuple[object, ...]) -> None:
    """Credit is applied once for each reference; the books show it; a wrong amount is refused."""
    before = endpoint.account().balance_nanousd
    credited = [run_json("accounts", "credit", "local", "1.25", "--reference", "story-1", *data) for _ in range(2)]
    assert [each["applied"] for each in credited] == [True, False]
    (shown,) = run_json("accounts", "show", "local", *data)
    assert shown["balance_nanousd"] == before + 1_250_000_000
    taken_back = run("accounts", "credit", *data, "--json", "local", "-1.25")
    assert json.loads(taken_back.stdout)["balance_nanousd"] == before
    assert run("accounts", "credit", "local", "a lot", *data).returncode == 2
    assert run("accounts", "show", "nobody", *data).returncode == 1


def test_ledger_check_says_so_when_a_promise_is_broken(endpoint: Endpoint, tmp_path: Path) -> None:
    """It adds up while it is in use; a store that somebody has changed does not, and that is an exit code of 1."""
    assert run("ledger", "check", "--data-dir", endpoint.data_dir).stdout.startswith(b"The money adds up: ")
    copy = tmp_path / "data"
    copy.mkdir(mode=0o700)
    run_json("store", "backup", copy / "embedmesh.db", "--data-dir", endpoint.data_dir)
    shutil.copy(endpoint.data_dir / "key.secret", copy)
    db = sqlite.connect(copy / "embedmesh.db")
    db.execute("UPDATE accounts SET balance = balance + 1 WHERE account_id = 'local'")
    db.commit()
    db.close()
    done = run("ledger", "check", "--offline", "--data-dir", copy, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert run("ledger", "check", "--offline", "--data-dir", copy).stdout.startswith(b"THE MONEY DOES NOT ADD UP: ")


def test_a_backup_can_be_served_from(endpoint: Endpoint, serve: Serve, tmp_path: Path) -> None:
    """The copy of a store in use, its secret and bootstrap.json are all that another data folder needs."""
    balance = endpoint.account().balance_nanousd
    restored = tmp_path / "restored"
    restored.mkdir(mode=0o700)
    told = run_json("store", "backup", restored / "embedmesh.db", "--data-dir", endpoint.data_dir)
    assert told["bytes"] == (restored / "embedmesh.db").stat().st_size
    for name in ("key.secret", "bootstrap.json"):
        shutil.copy(endpoint.data_dir / name, restored)
    one = serve("--key-defaults", "requests-a-minute=60", "--host", "0.0.0.0", data_dir=restored).wait_ready()
    assert one.api_key == endpoint.api_key
    assert one.account().balance_nanousd == balance
    assert np.abs(one.embed("the same key") - endpoint.embed("the same key")).max() <= SAME
    assert run_json("keys", "create", "--data-dir", restored)["limits"]["requests_a_minute"] == 60
    [new_keys] = [each for each in run_json("doctor", "--data-dir", restored)["checks"] if each["name"] == "new keys"]
    assert (new_keys["state"], new_keys["found"]) == ("ok", "their limits: 60 requests/min")
    one.check_ledger()
    assert one.stop() == 0


# -- models, doctor --------------------------------------------------------------------------------------------------


def test_models() -> None:
    """The built-in catalogue, its files, and what a folder would be in a catalogue."""
    (model,) = run_json("models", "list")
    assert (model["id"], model["width"], model["max_tokens"], model["present"]) == (MODEL, WIDTH, 256, True)
    assert run_json("models", "check") == [{"id": MODEL, "state": "ok"}]
    entry = run_json("models", "inspect", model["folder"])
    assert (entry["width"], entry["max_tokens"], entry["digest"]) == (WIDTH, 256, model["digest"])


def test_doctor(endpoint: Endpoint, data: tuple[object, ...], tmp_path: Path) -> None:
    """All is well here, down to a real embedding; where something is not, it says what to do and ends with 1."""
    found = {check["name"]: check for check in run_json("doctor", *data)["checks"]}
    assert found["embedding"]["found"].startswith(f"{WIDTH} components")
    assert {check["state"] for check in found.values()} <= {"ok", "warn"}
    done = run("doctor", "--data-dir", tmp_path / "new", "--port", endpoint.base_url.split(":")[2].partition("/")[0])
    assert done.returncode == 1
    assert b"Choose another by --port" in done.stdout


# -- help and wrong usage --------------------------------------------------------------------------------------------


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that is not a group, with the words that call it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found, (*path, name))


ALL = dict(commands(cli))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_of_every_command_has_an_example(words: tuple[str, ...]) -> None:
    """Each says by example how it is called; each can speak JSON, but for the programs that log."""
    shown = ALL[words].get_help(click.Context(ALL[words], info_name="embedmesh " + " ".join(words)))
    assert "Example" in shown
    assert f"embedmesh {' '.join(words)}" in shown.partition("Example")[2]
    assert "--json" in shown or words in (("gateway",), ("node",))


def test_help_is_quick_and_whole() -> None:
    """`embedmesh --help` lists every command."""
    shown = run("--help").stdout.decode()
    assert all(f"\n  {words[0]} " in shown for words in ALL)


@pytest.mark.parametrize("group", [(), *sorted({words[:1] for words in ALL if len(words) > 1})], ids=" ".join)
def test_summaries_are_not_cut(group: tuple[str, ...]) -> None:
    """In a terminal of 80 columns each command's summary is a whole sentence on one line."""
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(cli, [*group, "--help"]).output
    listed = shown.partition("Commands:\n")[2].splitlines()
    assert listed
    assert all(line.endswith(".") and not line.endswith("...") for line in listed), listed


INTERRUPTED = """
import signal, sys
from embedmesh.cli import main
# Ctrl-C after so much CPU time: on a busy machine, too, main() has begun by then.
signal.signal(signal.SIGVTALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
signal.setitimer(signal.ITIMER_VIRTUAL, float(sys.argv.pop(1)))
main()
"""


@pytest.mark.parametrize("words", [("--help",), ("models", "list"), ("embed", "-")], ids=" ".join)
def test_ctrl_c_at_once(words: tuple[str, ...]) -> None:
    """Interrupted while it is still importing, a command ends without a word."""
    for after_s in (0.001, 0.03, 0.1):
        command = [sys.executable, "-c", INTERRUPTED, str(after_s), *words]
        done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, timeout=30, check=False)
        # Later it may have ended before: well, or with the alarm in Python's own last milliseconds.
        ends = (130,) if after_s < 0.03 else (130, 0, 78, -signal.SIGVTALRM)
        assert done.returncode in ends, done.stderr.decode()
        assert b"Traceback" not in done.stderr and b"Abort" not in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [("serve", "--prot", "80"), ("serve", "--port", "seventy"), ("embed", "--batch", "0"), ("nonsense",)],
    ids=" ".join,
)
def test_wrong_usage(wrong: tuple[str, ...]) -> None:
    """Exit code 2; the last line says what is wrong, and there is no traceback."""
    done = run(*wrong)
    said = done.stderr.decode()
    assert done.returncode == 2
    assert said.splitlines()[-1].startswith("Error: ")
    assert wrong[-2 if len(wrong) > 1 else 0] in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "command",
    [("accounts", "show"), ("keys", "list", "--offline"), ("ledger", "check"), ("ledger", "check", "--offline")],
    ids=" ".join,
)
def test_without_a_store(command: tuple[str, ...], tmp_path: Path) -> None:
    """Commands where there is no gateway, or no store, say how to get one, and make none."""
    done = run(*command, "--data-dir", tmp_path / "nothing")
    assert done.returncode == 78
    assert done.stderr.decode().count("\n") == 1
    assert b"Start `embedmesh serve` once" in done.stderr
    assert not (tmp_path / "nothing").exists()
