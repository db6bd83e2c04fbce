"""`embedmesh keys`: make, list and revoke API keys."""

import time
from pathlib import Path

import click

from embedmesh.commands.books import books_of, data_dir_option, iso_time, json_option, when
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.telling import print_json, print_table
from embedmesh.storage.books.keys import SCOPES, Key

DAY_MS = 24 * 60 * 60 * 1000


@click.group()
def keys() -> None:
    """Make, list and revoke API keys."""


@keys.command()
@click.argument("account", default="local")
@click.option("--name", default="", help="What the key is for.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(sorted(SCOPES)), help="What it may do. Repeatable.")
@click.option("--days", type=WholeNumber(1, 36_500), help="Days until it expires. Default: never.")
@data_dir_option
@json_option
def create(account: str, name: str, scopes: tuple[str, ...], days: int | None, data_dir: Path, as_json: bool) -> None:
    """Make a key. It is shown once; only a keyed hash of it is kept.

    \b
    Examples:
      embedmesh keys create
      embedmesh keys create local --name grafana --scope metrics --days 90
    """
    expires_ms = int(time.time() * 1000) + days * DAY_MS if days else None
    with books_of(data_dir) as books:
        key, token = books.keys.create(account, scopes or ("embeddings",), name=name, expires_ms=expires_ms)
    if as_json:
        print_json({"key": token, **_as_json(key)})
        return
    click.echo(token)
    click.echo(f"This is key {key.key_id} of {account}. It is not shown again.", err=True)


@keys.command("list")
@click.argument("account", required=False)
@data_dir_option
@json_option
def list_(account: str | None, data_dir: Path, as_json: bool) -> None:
    """List the keys of an account, or of all.

    \b
    Example:
      embedmesh keys list local --json
    """
    with books_of(data_dir) as books:
        if account is not None:
            books.accounts.find(account)  # one that is not there fails, instead of having no keys
        found = books.keys.list(account)
    if as_json:
        print_json([_as_json(key) for key in found])
        return
    rows = [
        (
            key.key_id,
            key.account_id,
            _state(key),
            when(key.created_ms),
            when(key.expires_ms),
            ",".join(key.scopes),
            key.name,
        )
        for key in found
    ]
    print_table(("key", "account", "state", "created", "expires", "scopes", "name"), rows)


@keys.command()
@click.argument("key_id")
@data_dir_option
@json_option
def revoke(key_id: str, data_dir: Path, as_json: bool) -> None:
    """Make a key useless, at once, on every gateway of this store.

    \b
    Example:
      embedmesh keys revoke key_019aa0b4c0de…
    """
    with books_of(data_dir) as books:
        key = next((key for key in books.keys.list() if key.key_id == key_id), None)
        if key is None:
            raise click.ClickException(f"There is no key {key_id}. `embedmesh keys list` shows them.")
        if not books.keys.revoke(key_id):
            raise click.ClickException(f"Key {_named(key)} was revoked before.")
    if as_json:
        print_json({"revoked": True, "key_id": key_id})
        return
    click.echo(f"Key {_named(key)} is revoked.")


def _named(key: Key) -> str:
    return f"{key.key_id} of {key.account_id}" + (f" ({key.name})" if key.name else "")


def _state(key: Key) -> str:
    if key.revoked_ms is not None:
        return "revoked"
    if key.expires_ms is not None and key.expires_ms <= time.time() * 1000:
        return "expired"
    return "active"


def _as_json(key: Key) -> dict[str, object]:
    return {
        "key_id": key.key_id,
        "account": key.account_id,
        "name": key.name,
        "scopes": key.scopes,
        "state": _state(key),
        "created": iso_time(key.created_ms),
        "expires": iso_time(key.expires_ms),
    }
