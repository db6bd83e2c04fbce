"""`embedmesh keys`: make, list, change, rotate and revoke API keys."""

import time
from pathlib import Path
from typing import Any

import click
import msgspec

from embedmesh.commands.books import books_of, data_dir_option, every, iso_time, json_option, when
from embedmesh.commands.key_limits import AskedLimits, in_words, limit_options
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.telling import WrongUsage, print_json, print_table
from embedmesh.rules.errors import NotFound
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import SCOPES, Key, Limits

HOUR_S = 60 * 60
DAY_MS = 24 * HOUR_S * 1000
DAYS = WholeNumber(1, 36_500)
OVERLAP_HOURS_MAX = 8_760


@click.group()
def keys() -> None:
    """Make API keys, say what they may do, and end them."""


@keys.command()
@click.argument("account", default="local")
@click.option("--name", default="", help="What the key is for.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(sorted(SCOPES)), help="What it may do. Repeatable.")
@limit_options
@click.option("--days", type=DAYS, help="Days until it expires. Default: never.")
@data_dir_option
@json_option
def create(
    account: str,
    name: str,
    scopes: tuple[str, ...],
    asked: AskedLimits,
    days: int | None,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Make a key. It is shown once; only a keyed hash of it is kept.

    Limits that are not given are those that the gateways' --key-defaults says, or none.

    \b
    Examples:
      embedmesh keys create
      embedmesh keys create local --name grafana --scope metrics --days 90
      embedmesh keys create local --model all-MiniLM-L6-v2 --requests-a-minute 600 --budget-month 50
    """
    with books_of(data_dir) as books:
        limits = asked.over(books.new_keys.read().limits)
        key, token = books.keys.create(
            account, scopes or ("embeddings",), name=name, expires_ms=_in_days(days), limits=limits
        )
    words = f"This is key {key.key_id} of {account}. It is not shown again."
    if limits != Limits():
        words += f"\nLimits: {in_words(limits)}."
    _hand_over(key, token, as_json, words)


@keys.command("list")
@click.argument("account", required=False)
@data_dir_option
@json_option
def list_(account: str | None, data_dir: Path, as_json: bool) -> None:
    """List the keys of an account, or of all, with their limits.

    A key that another made, or that was rotated, draws from that one's limits and budgets, too.

    When a key was last used is noted now and then, not at every request.

    \b
    Example:
      embedmesh keys list local --json
    """
    with books_of(data_dir) as books:
        if account is not None:
            books.accounts.find(account)  # one that is not there fails, instead of having no keys
        found = every(lambda after: books.keys.list(account, after=after))
    if as_json:
        print_json([_as_json(key) for key in found])
        return
    head: tuple[str, ...] = ("key", "account", "state", "created", "expires", "last used", "scopes", "limits", "name")
    rows = [_as_row(key) for key in found]
    if any(key.parent_id for key in found):
        head = (*head, "draws from")
        rows = [(*row, key.parent_id or "-") for row, key in zip(rows, found, strict=True)]
    print_table(head, rows)


@keys.command()
@click.argument("key_id")
@click.option("--name", help="What the key is for.")
@click.option("--no-limits", is_flag=True, help="Take all limits away, the models too, before others are set.")
@limit_options
@click.option("--days", type=DAYS, help="Days from now until it expires.")
@click.option("--never-expires", is_flag=True, help="Let it expire no more.")
@data_dir_option
@json_option
def change(
    key_id: str,
    name: str | None,
    no_limits: bool,
    asked: AskedLimits,
    days: int | None,
    never_expires: bool,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Change what a key may do, on every gateway within a second. What is not named stays as it is.

    \b
    Examples:
      embedmesh keys change key_019aa0b4c0de… --requests-a-minute 60
      embedmesh keys change key_019aa0b4c0de… --no-limits --budget-day 5
    """
    if days and never_expires:
        raise WrongUsage("Give --days or --never-expires, not both.")
    if name is None and not (no_limits or asked.says_something or days or never_expires):
        raise WrongUsage("Say what to change: `embedmesh keys change --help` lists it.")
    changes: dict[str, Any] = {} if name is None else {"name": name}
    if days or never_expires:
        changes["expires_ms"] = _in_days(days)
    with books_of(data_dir) as books:
        before = _find(books, key_id)
        limits = asked.over(Limits() if no_limits else before.limits)
        key = books.keys.change(key_id, limits=limits, **changes)
    if as_json:
        print_json(_as_json(key))
        return
    expires = "never" if key.expires_ms is None else f"{when(key.expires_ms)} UTC"
    click.echo(f"Key {_named(key)} is changed. Limits: {in_words(key.limits)}. Expires: {expires}.")


@keys.command()
@click.argument("key_id")
@click.option(
    "--overlap",
    type=WholeNumber(0, OVERLAP_HOURS_MAX),
    default=24,
    show_default=True,
    help="Hours until the old key ends; 0 ends it at once.",
)
@data_dir_option
@json_option
def rotate(key_id: str, overlap: int, data_dir: Path, as_json: bool) -> None:
    """Make a key that takes another's place.

    It has the same name, scopes, limits and expiry. It has spent what the old one has, and has the keys that this made.

    Both are good for a while, so that nobody who uses the old one is refused before he has the new one. Together they
    may do what one may.

    \b
    Examples:
      embedmesh keys rotate key_019aa0b4c0de…
      embedmesh keys rotate key_019aa0b4c0de… --overlap 72
    """
    with books_of(data_dir) as books:
        _find(books, key_id)
        key, token = books.keys.rotate(key_id, overlap_s=overlap * HOUR_S)
        old = books.keys.find(key_id)
    _hand_over(
        key,
        token,
        as_json,
        f"This is key {_named(key)}. It is not shown again; the old one, {key_id}, ends {when(old.expires_ms)} UTC.",
        old_expires=iso_time(old.expires_ms),
    )


@keys.command()
@click.argument("key_id")
@data_dir_option
@json_option
def revoke(key_id: str, data_dir: Path, as_json: bool) -> None:
    """Make a key useless, everywhere within a second.

    Those that it made are useless then, too.

    \b
    Example:
      embedmesh keys revoke key_019aa0b4c0de…
    """
    with books_of(data_dir) as books:
        key = _find(books, key_id)
        if not books.keys.revoke(key_id):
            raise click.ClickException(f"Key {_named(key)} was revoked before.")
    if as_json:
        print_json({"revoked": True, "key_id": key_id})
        return
    click.echo(f"Key {_named(key)} is revoked.")


def _find(books: Books, key_id: str) -> Key:
    try:
        return books.keys.find(key_id)
    except NotFound:
        raise click.ClickException(f"There is no key {key_id}. `embedmesh keys list` shows them.") from None


def _hand_over(key: Key, token: str, as_json: bool, words: str, **more: object) -> None:
    """The token alone on standard output, so that it can go into a file."""
    if as_json:
        print_json({"key": token, **_as_json(key), **more})
        return
    click.echo(token)
    click.echo(words, err=True)


def _in_days(days: int | None) -> int | None:
    return int(time.time() * 1000) + days * DAY_MS if days else None


def _as_row(key: Key) -> tuple[str, ...]:
    return (
        key.key_id,
        key.account_id,
        _state(key),
        when(key.created_ms),
        when(key.expires_ms),
        when(key.last_used_ms),
        ",".join(key.scopes),
        in_words(key.limits),
        key.name,
    )


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
        "last_used": iso_time(key.last_used_ms),
        "limits": msgspec.to_builtins(key.limits),
        "rotated_to": key.rotated_to,
        "parent": key.parent_id,
    }
