"""Asking a node on its Unix socket, for the commands."""

import http.client
import socket
import sys
from pathlib import Path
from typing import Any

import click

from embedmesh.commands import asking
from embedmesh.process import EXIT_SETUP

ANSWER_S = 600.0  # a large model on a slow disk; unloading waits for its last calls


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("node", timeout=ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(node: Path, method: str, path: str, body: dict[str, str] | None = None) -> Any:
    """The node's answer, decoded. Says what is wrong and exits where there is none, or a refusal."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    try:
        told = asking.ask(_UnixConnection(node), str(node), method, path, body, headers, answer_s=ANSWER_S)
    except asking.Unanswered as error:
        click.echo(
            f"No node answers on {node} ({error}). Is `embedmesh serve` running? Or name its socket: --node PATH.",
            err=True,
        )
        sys.exit(EXIT_SETUP)
    if told.status != 200:
        click.echo(told.body["error"]["message"], err=True)
        sys.exit(1)
    return told.body
