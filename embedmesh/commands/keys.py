"""`embedmesh keys`: make, list, change, rotate and revoke API keys."""

import time
from typing import Any

import click

from embedmesh.commands.key_limits import KEY_LIMIT_FIELDS, in_words, limit_options
from embedmesh.commands.operator import ApiRefusal, Operator, operator_command
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.output import CommandResult, WrongUsage, iso_time, table, utc
from embedmesh.storage.books.keys import CALLER_SCOPES, SCOPES

HOUR_S = 60 * 60
DAY_MS = 24 * HOUR_S * 1000
DAYS = WholeNumber(1, 36_500)
OVERLAP_HOURS_MAX = 8_760

Row = dict[str, Any]


@click.group()
def keys() -> None:
    """Make API keys, limit them, and end them.

    \b
    Example:
      embedmesh keys create local --name ci --days 90
    """


@keys.command()
@click.argument("account", default="local")
@click.option("--name", default="", help="What the key is for.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(sorted(SCOPES)), help="What it may do. Repeatable.")
@limit_options
@click.option("--days", type=DAYS, help="Days until it expires. Default: never.")
@operator_command
def create(
    operator: Operator, account: str, name: str, scopes: tuple[str, ...], limits: Row, days: int | None
) -> CommandResult:
    """Make a key. It is shown once; only a keyed hash of it is kept.

    Limits that are not given come from the gateway's --key-defaults, if it has any.

    \b
    Examples:
      embedmesh keys create
      embedmesh keys create local --name grafana --scope metrics --days 90
      embedmesh keys create local --model all-MiniLM-L6-v2 --requests-a-minute 600 --budget-month 50
    """
    body = {"account": account, "scopes": scopes or CALLER_SCOPES, "name": name, "limits": limits}
    made = operator.post("keys", body=body | {"expires_ms": _in_days(days)})
    note = f"This is key {made['key_id']} of {account}. It is not shown again."
    if (words := in_words(made["limits"])) != "-":
        note += f"\nLimits: {words}."
    return CommandResult({"key": made["key"], **_as_json(made)}, made["key"], note)


@keys.command("list")
@click.argument("account", required=False)
@operator_command
def list_(operator: Operator, account: str | None) -> CommandResult:
    """List the keys of an account, or of all, with their limits.

    A key that another key made, or that was rotated, also draws from that key's limits and budgets.

    When a key was last used is noted now and then, not at every request.

    \b
    Example:
      embedmesh keys list local --json
    """
    found = operator.rows("keys", cursor="key_id", account=account)
    head: tuple[str, ...] = ("key", "account", "state", "created", "expires", "last used", "scopes", "limits", "name")
    rows = [_as_row(key) for key in found]
    if any(key["parent_id"] for key in found):
        head = (*head, "draws from")
        rows = [(*row, key["parent_id"] or "-") for row, key in zip(rows, found, strict=True)]
    return CommandResult([_as_json(key) for key in found], table(head, rows))


@keys.command()
@click.argument("key_id")
@click.option("--name", help="What the key is for.")
@click.option("--no-limits", is_flag=True, help="Remove all limits, those on models too, before others are set.")
@limit_options
@click.option("--days", type=DAYS, help="Days from now until it expires.")
@click.option("--never-expires", is_flag=True, help="Remove the expiry.")
@operator_command
def change(
    operator: Operator,
    key_id: str,
    name: str | None,
    no_limits: bool,
    limits: Row,
    days: int | None,
    never_expires: bool,
) -> CommandResult:
    """Change what a key may do, on every gateway within a second. Options that are not given change nothing.

    \b
    Examples:
      embedmesh keys change key_019aa0b4c0de… --requests-a-minute 60
      embedmesh keys change key_019aa0b4c0de… --no-limits --budget-day 5
    """
    if days and never_expires:
        raise WrongUsage("Give --days or --never-expires, not both.")
    changes: Row = {} if name is None else {"name": name}
    if days or never_expires:
        changes["expires_ms"] = _in_days(days)
    if no_limits or limits:
        changes["limits"] = (dict.fromkeys(KEY_LIMIT_FIELDS) if no_limits else {}) | limits
    if not changes:
        raise WrongUsage("Say what to change: `embedmesh keys change --help` lists it.")
    _find(operator, key_id)
    key = operator.post("keys", key_id, body=changes)
    expires = "never" if key["expires_ms"] is None else f"{utc(key['expires_ms'])} UTC"
    text = f"Key {_named(key)} is changed. Limits: {in_words(key['limits'])}. Expires: {expires}."
    return CommandResult(_as_json(key), text)


@keys.command()
@click.argument("key_id")
@click.option(
    "--overlap",
    type=WholeNumber(0, OVERLAP_HOURS_MAX),
    default=24,
    show_default=True,
    help="Hours until the old key ends; 0 ends it at once.",
)
@operator_command
def rotate(operator: Operator, key_id: str, overlap: int) -> CommandResult:
    """Replace a key by a new one.

    The new key has the same name, scopes, limits and expiry. It starts with what the old one has spent, and takes over
    the keys that the old one made.

    Both work during the overlap, so that nobody is refused before they have the new key. Together they may do what one
    key may.

    \b
    Examples:
      embedmesh keys rotate key_019aa0b4c0de…
      embedmesh keys rotate key_019aa0b4c0de… --overlap 72
    """
    _find(operator, key_id)
    new = operator.post("keys", key_id, "rotate", body={"overlap_s": overlap * HOUR_S})
    old = _find(operator, key_id)
    ends = f"the old one, {key_id}, ends {utc(old['expires_ms'])} UTC"
    return CommandResult(
        {"key": new["key"], **_as_json(new), "old_expires": iso_time(old["expires_ms"])},
        new["key"],
        f"This is key {_named(new)}. It is not shown again; {ends}.",
    )


@keys.command()
@click.argument("key_id")
@operator_command
def revoke(operator: Operator, key_id: str) -> CommandResult:
    """Revoke a key, everywhere within a second.

    The keys that it made end with it.

    \b
    Example:
      embedmesh keys revoke key_019aa0b4c0de…
    """
    key = _find(operator, key_id)
    if key["revoked_ms"] is not None:
        raise click.ClickException(f"Key {_named(key)} was revoked before.")
    operator.delete("keys", key_id)
    return CommandResult({"revoked": True, "key_id": key_id}, f"Key {_named(key)} is revoked.")


def _find(operator: Operator, key_id: str) -> Row:
    try:
        found: Row = operator.get("keys", key_id)
    except ApiRefusal as refusal:
        if refusal.code != "not_found":
            raise
        raise click.ClickException(f"There is no key {key_id}. `embedmesh keys list` shows them.") from None
    return found


def _in_days(days: int | None) -> int | None:
    return int(time.time() * 1000) + days * DAY_MS if days else None


def _as_row(key: Row) -> tuple[str, ...]:
    return (
        key["key_id"],
        key["account"],
        key["state"],
        utc(key["created_ms"]),
        utc(key["expires_ms"]),
        utc(key["last_used_ms"]),
        ",".join(key["scopes"]),
        in_words(key["limits"]),
        key["name"],
    )


def _named(key: Row) -> str:
    return f"{key['key_id']} of {key['account']}" + (f" ({key['name']})" if key["name"] else "")


def _as_json(key: Row) -> Row:
    same = ("key_id", "account", "name", "scopes", "state")
    times = ("created", "expires", "last_used")
    return {
        **{name: key[name] for name in same},
        **{name: iso_time(key[f"{name}_ms"]) for name in times},
        "limits": key["limits"],
        "rotated_to": key["rotated_to"],
        "parent": key["parent_id"],
    }
