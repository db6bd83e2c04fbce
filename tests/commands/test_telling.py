"""Tables fit the terminal, questions to a gateway end, and a word that is nearly right is answered by the right one."""

import http.client
import socket
import threading
from collections.abc import Iterator
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from embedmesh.command_line import as_arguments
from embedmesh.commands.asking import Unanswered, ask
from embedmesh.commands.catalogued import model_ids
from embedmesh.commands.group import cli
from embedmesh.commands.options import settings_options
from embedmesh.commands.telling import WrongUsage, print_table
from embedmesh.settings import GatewaySettings

HEAD = ("key", "state", "limits", "name")
ROWS = [
    ("key_" + "0" * 32, "active", "-", "ci"),
    ("key_" + "1" * 32, "revoked", "60 requests/min, $5.00/month", "x" * 30),
]


def shown(columns: int) -> list[str]:
    return (
        CliRunner()
        .invoke(click.Command("t", callback=lambda: print_table(HEAD, ROWS)), env={"COLUMNS": str(columns)})
        .output.splitlines()
    )


def test_a_table_that_fits_has_a_row_a_line() -> None:
    assert [line.split()[0] for line in shown(120)] == ["key", ROWS[0][0], ROWS[1][0]]


@pytest.mark.parametrize("columns", [80, 60])
def test_a_table_that_does_not_fit_has_a_record_a_row(columns: int) -> None:
    """No line is longer than the terminal is wide, and nothing but empty cells is left out."""
    lines = shown(columns)
    assert max(map(len, lines)) <= columns
    assert lines[:2] == [ROWS[0][0], "  state: active  name: ci"]
    assert " ".join(lines[2:]).split() == [
        ROWS[1][0], "state:", "revoked", "limits:", "60", "requests/min,", "$5.00/month", "name:", "x" * 30,
    ]  # fmt: skip


@pytest.fixture
def dripping() -> Iterator[int]:
    """A server that sends a byte of its answer whenever it may, and never ends."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65_536)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not stop.wait(0.01):
                    try:
                        sock.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        stop.set()
        thread.join()


def test_a_question_ends_though_the_answer_drips(dripping: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", dripping, timeout=60)
    with pytest.raises(Unanswered, match="whether it was done is not known"):
        ask(connection, "there", "GET", "/", None, {}, answer_s=0.3)


def test_no_answer_at_all_is_told_with_its_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(Unanswered, match="refused"):
        ask(http.client.HTTPConnection("127.0.0.1", port, timeout=5), "there", "GET", "/", None, {}, answer_s=5)


@pytest.mark.parametrize(
    "words, says",
    [
        (["servr"], "Did you mean 'serve'?"),
        (["nodes", "lst"], "Did you mean 'list'?"),
        (["keys", "create", "--nam", "x"], "Did you mean '--name'?"),
    ],
    ids=" ".join,
)
def test_the_nearest_command_is_named(words: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert says in result.output


def test_the_nearest_model_is_named() -> None:
    with pytest.raises(WrongUsage, match=r"Did you mean all-MiniLM-L6-v2\?"):
        model_ids(["all-minilm-l6-v2"], None)


@pytest.mark.parametrize(
    "given, means",
    [
        ("0.02", 20_000_000),
        ("0", 0),
        ("20000000", "must be at most $1,000.00: it is in USD."),
        ("-1", "not be below 0"),
    ],
)
def test_prices_are_given_in_usd(given: str, means: int | str, tmp_path: object) -> None:
    """And handed on so: a number of nano-USD, as they were before, is no price."""
    found: list[GatewaySettings] = []

    @click.command()
    @settings_options(GatewaySettings)
    def command(**settings: Any) -> None:
        found.append(GatewaySettings(**settings))

    result = CliRunner().invoke(command, ["--ask-max", given, "--data-dir", str(tmp_path)])
    if isinstance(means, str):
        assert result.exit_code == 2
        assert means in result.output
        return
    assert [settings.ask_max for settings in found] == [means]
    again = as_arguments(found[0], without=("data_dir",))
    CliRunner().invoke(command, [*again, "--data-dir", str(tmp_path)])
    assert msgspec.structs.asdict(found[0]) == msgspec.structs.asdict(found[1])
