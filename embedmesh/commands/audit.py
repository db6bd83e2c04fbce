"""`embedmesh audit`: who changed what, when, and from where."""

from typing import Any

import click

from embedmesh.commands.operator import ADMIN_PAGE_ROWS, Operator, operator_command
from embedmesh.commands.options import MOMENT, WholeNumber
from embedmesh.commands.output import CommandResult, iso_time, table, utc
from embedmesh.rules.acts import Verb

AUDIT_ROWS = 50  # a screen or two
AUDIT_ROWS_MAX = 100_000  # some 50 MB

Row = dict[str, Any]


def _known(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    words = {word for verb in Verb for word in (verb.value, verb.value.partition(".")[0])}
    if text is not None and text not in words:
        raise click.BadParameter(f"{text!r} is no act: use one of {', '.join(sorted(words))}.", context, option)
    return text


@click.command()
@click.option(
    "--since", "since_ms", type=MOMENT, help="UTC, as 2026-12-01 or 2026-12-01T08:00:00Z. Default: all times."
)
@click.option("--actor", help="By whom: a key's id, oidc:ISSUER#SUBJECT, or user:NAME.")
@click.option("--act", callback=_known, help="What was done, as key.revoke; `key` is all that begins with it.")
@click.option(
    "--object", "object_id", help="To what: the id of a key, an account, a model, a node, an invite, a request."
)
@click.option(
    "--limit", type=WholeNumber(1, AUDIT_ROWS_MAX), default=AUDIT_ROWS, show_default=True, help="Rows, the latest."
)
@operator_command
def audit(
    operator: Operator, since_ms: int | None, actor: str | None, act: str | None, object_id: str | None, limit: int
) -> CommandResult:
    """Show who changed what, when, and from where; the latest first.

    Every act of an operator, and every key that an account has made or revoked itself, is a row, written together with
    what it changes and chained to the row before. No row is ever changed or deleted: `ledger check` proves it.

    \b
    Examples:
      embedmesh audit --act key.revoke
      embedmesh audit --object key_019aa0b4c0de7b62a1f0c3d4e5f60718
      embedmesh audit --since 2026-12-01 --limit 1000 --json | jq -c '.[]'
    """
    query: dict[str, Any] = {"since_ms": since_ms, "actor": actor, "act": act, "object": object_id}
    found: list[Row] = []
    for page in operator.pages("audit", cursor="act_id", page_rows=min(limit, ADMIN_PAGE_ROWS), **query):
        found += page["data"]
        if len(found) >= limit:
            break
    rows = [
        (utc(row["created_ms"]), row["actor"], row["act"], row["object"], _changes(row["changes"]), row["origin"])
        for row in found[:limit]
    ]
    value = [row | {"created": iso_time(row["created_ms"])} for row in found[:limit]]
    text = table(("when (UTC)", "who", "act", "to what", "what changed", "from"), rows) if rows else "No such act."
    return CommandResult(value, text)


def _changes(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_change(change)}" for name, change in changes.items())


def _change(change: Any) -> str:
    if isinstance(change, list) and len(change) == 2:
        before, after = change
        return _value(after) if before is None else f"{_value(before)} → {_value(after)}"
    return _value(change)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value)) or "-"
    if value is None or isinstance(value, bool):
        return "-" if value is None else str(value).lower()
    text = str(value)
    return text if text.isprintable() else repr(text)  # a reference is anybody's text
