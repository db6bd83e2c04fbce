"""Tables fit the terminal, requests end, and a word that is nearly right is answered by the right one."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from embedmesh.command_line import as_arguments
from embedmesh.commands.group import cli
from embedmesh.commands.http_client import HttpClient, NoReply, to_url
from embedmesh.commands.options import settings_options
from embedmesh.commands.output import table
from embedmesh.settings import GatewaySettings

HEAD = ("key", "state", "limits", "name")
ROWS = [
    ("key_" + "0" * 32, "active", "-", "ci"),
    ("key_" + "1" * 32, "revoked", "60 requests/min, $5.00/month", "x" * 30),
]


def shown(columns: int) -> list[str]:
    command = click.Command("t", callback=lambda: click.echo(table(HEAD, ROWS)))
    return CliRunner().invoke(command, env={"COLUMNS": str(columns)}).output.splitlines()


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
def dripping() -> Iterator[Callable[[str], int]]:
    """A server, with more headers, that sends a byte of its reply at a time, and never ends. Gives its port."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        headers = ""

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65_536)
                sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n{headers}\r\n".encode())
                while not stop.wait(0.01):
                    try:
                        sock.sendall(b" ")
                    except OSError:
                        return

        def begin(more: str) -> int:
            nonlocal headers
            headers = more
            thread.start()
            return int(listener.getsockname()[1])

        thread = threading.Thread(target=serve, daemon=True)
        yield begin
        stop.set()
        thread.join()


def client(port: int, reply_s: float, reply_bytes_max: int = 2_000_000) -> HttpClient:
    return HttpClient("there", to_url(f"http://127.0.0.1:{port}"), reply_s=reply_s, reply_bytes_max=reply_bytes_max)


@pytest.mark.parametrize("keep", ["", "Connection: close\r\n"])
def test_a_request_ends_though_the_reply_drips(dripping: Callable[[str], int], keep: str) -> None:
    with pytest.raises(NoReply, match="whether it was done is not known") as late:
        client(dripping(keep), 0.3).send("GET", "/")
    assert late.value.kind == "late"


def test_a_reply_has_a_bound(dripping: Callable[[str], int]) -> None:
    with pytest.raises(NoReply, match="more than 5 bytes") as large:
        client(dripping(""), 30, reply_bytes_max=5).send("GET", "/")
    assert large.value.kind == "broken"


def test_a_connection_that_is_refused_is_named_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(NoReply, match="refused") as refused:
        client(port, 5).send("GET", "/")
    assert refused.value.kind == "connect"


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
