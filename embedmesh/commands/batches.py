"""`embedmesh batches`: what has become of an account's batches; ending one."""

import click

from embedmesh.commands.account_client import AccountClient, Row, account_command
from embedmesh.commands.output import CommandResult, table, utc
from embedmesh.rules.money import format_usd

HEAD = ("batch", "status", "lines", "done", "failed", "model", "created")
TIMES = ("created", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled", "expires")
ERRORS_SHOWN_MAX = 10  # --json has all


@click.group()
def batches() -> None:
    """List your account's batches, look at one, cancel one.

    \b
    Example:
      embedmesh batches list
    """


@batches.command("list")
@account_command
def list_(account: AccountClient) -> CommandResult:
    """List batches, the newest first.

    \b
    Examples:
      embedmesh batches list
      embedmesh batches list --json | jq '.[] | select(.status == "in_progress")'
    """
    found = account.rows("batches", cursor="id")
    text = table(HEAD, [_as_row(batch) for batch in found], right=HEAD[2:5]) if found else "There is no batch."
    return CommandResult(found, text)


@batches.command()
@click.argument("batch_id")
@account_command
def show(account: AccountClient, batch_id: str) -> CommandResult:
    """Show a batch: its state, lines, files and errors.

    \b
    Example:
      embedmesh batches show batch_019aa0b4c0de…
    """
    return _shown(account.get("batches", batch_id))


@batches.command()
@click.argument("batch_id")
@account_command
def cancel(account: AccountClient, batch_id: str) -> CommandResult:
    """Cancel a batch. Lines that are done stay done; the others cost nothing.

    \b
    Example:
      embedmesh batches cancel batch_019aa0b4c0de…
    """
    return _shown(account.post("batches", batch_id, "cancel"))


def _shown(batch: Row) -> CommandResult:
    counts, used = batch["request_counts"], batch["usage"]
    lines = [
        f"{batch['id']}: {batch['status']}",
        f"lines: {counts['completed']:,} done, {counts['failed']:,} failed, of {counts['total']:,}",
        f"endpoint: {batch['endpoint']}, model: {batch['model'] or '-'}",
        f"tokens: {used['total_tokens']:,}; set aside: {format_usd(batch['held_nanousd'])}",
        f"files: input {batch['input_file_id']}, output {batch['output_file_id'] or '-'}, "
        f"errors {batch['error_file_id'] or '-'}",
        *(f"{name.replace('_', ' ')}: {_time(batch, name)}" for name in TIMES if batch[f"{name}_at"] is not None),
    ]
    errors = batch["errors"]["data"] if batch["errors"] else []
    for error in errors[:ERRORS_SHOWN_MAX]:
        where = f"line {error['line']}: " if error["line"] else ""
        lines.append(f"error: {where}{error['message']} ({error['code']})")
    if len(errors) > ERRORS_SHOWN_MAX:
        lines.append(f"and {len(errors) - ERRORS_SHOWN_MAX} errors more: --json has all")
    return CommandResult(batch, "\n".join(lines))


def _as_row(batch: Row) -> tuple[str, ...]:
    counts = batch["request_counts"]
    return (
        batch["id"],
        batch["status"],
        f"{counts['total']:,}",
        f"{counts['completed']:,}",
        f"{counts['failed']:,}",
        batch["model"] or "-",
        _time(batch, "created"),
    )


def _time(batch: Row, name: str) -> str:
    return utc(batch[f"{name}_at"] * 1000)
