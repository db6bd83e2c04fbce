"""Asking a running gateway's admin API, for the commands."""

import http.client
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import click

from embedmesh.commands.asking import Unanswered, ask
from embedmesh.commands.books import data_dir_option, json_option
from embedmesh.commands.endpoint import checked_url, read_key
from embedmesh.process import EXIT_SETUP
from embedmesh.rules.errors import SetupError
from embedmesh.settings import BOOTSTRAP, read_bootstrap

ANSWER_S = 30.0


def gateway_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which gateway is asked, and with which key."""
    for option in (
        json_option,
        data_dir_option,
        click.option(
            "--admin-key-file",
            type=click.Path(path_type=Path),
            help="File with a key that has the scope `admin`. Default: EMBEDMESH_ADMIN_KEY, else bootstrap.json's.",
        ),
        click.option("--url", help="The gateway, as http://HOST:PORT/v1. Default: bootstrap.json's."),
    ):
        command = option(command)
    return command


class Admin:
    """One gateway, asked with a key that has the scope `admin`."""

    def __init__(self, base_url: str, key: str) -> None:
        self.base_url = base_url
        self._key = key

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, decoded. Says what is wrong and exits where there is none, or a refusal."""
        parts = urlsplit(self.base_url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=ANSWER_S)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        where = parts.path + quote(path)
        try:
            told = ask(connection, self.base_url, method, where, body, headers, answer_s=ANSWER_S)
        except Unanswered as error:
            click.echo(f"No gateway answers on {self.base_url} ({error}). Is `embedmesh serve` running?", err=True)
            sys.exit(EXIT_SETUP)
        if told.status != 200:
            click.echo(told.body["error"]["message"], err=True)
            sys.exit(1)
        return told.body


def find_admin(url: str | None, key_file: Path | None, data_dir: Path) -> Admin:
    """What the command line says, else EMBEDMESH_BASE_URL and EMBEDMESH_ADMIN_KEY, else bootstrap.json in `data_dir`.

    Raises SetupError that says what to give.
    """
    local = read_bootstrap(data_dir)
    base_url = url or os.environ.get("EMBEDMESH_BASE_URL") or (local.base_url if local else None)
    if not base_url:
        raise SetupError(
            f"No gateway is known: there is no {BOOTSTRAP} in {data_dir}."
            " Start one with `embedmesh serve`, or give --url and --admin-key-file."
        )
    base_url = checked_url(base_url)
    key = read_key(key_file) if key_file else os.environ.get("EMBEDMESH_ADMIN_KEY")
    if not key and local and base_url == local.base_url.rstrip("/"):
        key = local.admin_key
    if not key:
        raise SetupError(f"No admin key is known for {base_url}. Give --admin-key-file or set EMBEDMESH_ADMIN_KEY.")
    return Admin(base_url, key)
