"""`embedmesh embed` as a process among others: killed, interrupted, in a pipe, badly set up."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedmesh.rules.errors import SetupError
from tests.commands.edge import Edge, bootstrap, start, vector_of
from tests.commands.texts import TEXTS, Embed, assert_rows, rows_of, texts_file

pytestmark = pytest.mark.story


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "waited for ten seconds"
        time.sleep(0.01)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize("suffix", [".jsonl", ".npy"])
def test_a_killed_process_goes_on_where_it_was(
    edge: Edge, embed: Embed, tmp_path: Path, number: signal.Signals, status: int, suffix: str
) -> None:
    """Ctrl-C or kill -9 in the middle: what was written stays, the rest follows, and the file is whole."""
    data_dir, out = bootstrap(tmp_path / "data", edge.base_url), tmp_path / ("out" + suffix)
    file = texts_file(tmp_path, TEXTS)
    edge.holds_back = lambda asked: len(asked.texts) == 5 and asked.texts[0] not in TEXTS[:20]
    process = start("embed", str(file), "-o", str(out), "--batch", "5", "--data-dir", str(data_dir))
    wait_until(lambda: len(edge.asked) >= 8)  # four answered and written, four waiting: the bound on requests in flight
    assert len(edge.asked) == 8
    rival = embed(file, "-o", out)
    assert rival.exit_code == 2 and "Another `embedmesh embed` is writing" in rival.stderr
    process.send_signal(number)
    _, said = process.communicate(timeout=5)
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert number != signal.SIGINT or "continue at line 21" in said
    assert embed(file, "-o", out).exit_code == 0
    assert sorted(edge.answered) == sorted(TEXTS)  # each once
    if suffix == ".jsonl":
        assert_rows(rows_of(out), TEXTS)
    else:
        assert np.array_equal(np.load(out), np.stack([vector_of(text) for text in TEXTS]))


def test_a_pipe_in_and_a_pipe_out(edge: Edge, tmp_path: Path) -> None:
    """Vectors go to stdout and nothing else does; the summary goes to stderr."""
    data_dir = bootstrap(tmp_path / "data", edge.base_url)
    process = start("embed", "--json", "--data-dir", str(data_dir))
    out, said = process.communicate("\n".join(TEXTS), timeout=10)
    assert process.returncode == 0, said
    assert_rows([json.loads(line) for line in out.splitlines()], TEXTS)
    assert json.loads(said)["lines"] == 50


def test_ctrl_c_while_it_waits_for_a_pipe(edge: Edge, tmp_path: Path) -> None:
    """A pipe that gives nothing does not keep the command from ending; what came before is answered and shown."""
    data_dir = bootstrap(tmp_path / "data", edge.base_url)
    process = start("embed", "--batch", "1", "--data-dir", str(data_dir))
    assert process.stdin is not None
    process.stdin.write("one\n")
    process.stdin.flush()
    wait_until(lambda: edge.answered == ["one"])
    time.sleep(0.1)  # the answer is on its way back
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    out, said = process.communicate()
    assert [json.loads(line)["index"] for line in out.splitlines()] == [0]
    assert "Traceback" not in said


def test_a_reader_that_has_seen_enough(edge: Edge, tmp_path: Path) -> None:
    """`| head -1` ends the run without a traceback."""
    data_dir = bootstrap(tmp_path / "data", edge.base_url)
    file = texts_file(tmp_path, [f"{i}" for i in range(5_000)])
    process = start("embed", str(file), "--batch", "50", "--data-dir", str(data_dir))
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["index"] == 0
    process.stdout.close()
    said = process.stderr.read() if process.stderr else ""
    assert process.wait(5) == 141
    assert "rror" not in said and "Traceback" not in said
    for pipe in (process.stdin, process.stderr):
        assert pipe is not None
        pipe.close()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["missing.txt"], "cannot be read"),
        (["texts.txt", "-o", "no/such/folder.jsonl"], "cannot be written"),
        (["."], "cannot be read"),
    ],
)
def test_an_input_or_output_that_cannot_be_used(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    """Wrong usage, in one line, before anything is asked."""
    monkeypatch.chdir(tmp_path)
    texts_file(tmp_path, TEXTS)
    result = embed(*arguments)
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1


def test_an_address_that_is_none(embed: Embed, tmp_path: Path) -> None:
    """A SetupError in one line."""
    error = embed(texts_file(tmp_path, TEXTS), "--url", "ftp://x").exception
    assert isinstance(error, SetupError) and "must look like" in str(error) and "\n" not in str(error)


def test_without_any_endpoint(tmp_path: Path) -> None:
    """The program says so in one line, exit 78, no traceback."""
    process = start("embed", "--data-dir", str(tmp_path / "nowhere"), stdin=subprocess.DEVNULL)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 78
    assert "No gateway is known" in said and said.count("\n") == 1
