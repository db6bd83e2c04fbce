"""`embedmesh jobs`: what has become of an account's jobs; ending one."""

import click

from embedmesh.commands.account_client import AccountClient, Row, account_command
from embedmesh.commands.output import CommandResult, table, utc
from embedmesh.rules.money import format_usd

HEAD = ("job", "status", "texts", "tokens", "charged", "budget", "created", "name")


@click.group()
def jobs() -> None:
    """List your account's jobs, look at one, cancel one.

    \b
    Example:
      embedmesh jobs list
    """


@jobs.command("list")
@account_command
def list_(account: AccountClient) -> CommandResult:
    """List jobs, the newest first.

    \b
    Examples:
      embedmesh jobs list
      embedmesh jobs list --json | jq '.[] | select(.status == "open")'
    """
    found = account.rows("jobs", cursor="id")
    text = table(HEAD, [_as_row(job) for job in found], right=HEAD[2:6]) if found else "There is no job."
    return CommandResult(found, text)


@jobs.command()
@click.argument("job_id")
@account_command
def show(account: AccountClient, job_id: str) -> CommandResult:
    """Show a job: texts, tokens, money, speed.

    \b
    Example:
      embedmesh jobs show job_019aa0b4c0de…
    """
    return _shown(account.get("jobs", job_id))


@jobs.command()
@click.argument("job_id")
@account_command
def cancel(account: AccountClient, job_id: str) -> CommandResult:
    """Cancel a job. What it has charged stays charged; the rest of its budget goes back.

    \b
    Example:
      embedmesh jobs cancel job_019aa0b4c0de…
    """
    return _shown(account.post("jobs", job_id, "cancel"))


def _shown(job: Row) -> CommandResult:
    total = "" if job["texts_total"] is None else f" of {job['texts_total']:,}"
    eta = "" if job["eta_s"] is None else f", {job['eta_s']:,} s left at this rate"
    lines = [
        f"{job['id']}: {job['status']}" + (f" ({job['name']})" if job["name"] else ""),
        f"texts: {job['texts']:,}{total}, in {job['requests']:,} requests; "
        f"{job['texts_per_s']:,.1f}/s over the last minute{eta}",
        f"tokens: {job['tokens']:,}; computed again, free: {job['recomputed_tokens']:,}",
        f"money: {format_usd(job['charged_nanousd'])} charged of {format_usd(job['budget_nanousd'])}, "
        f"{format_usd(job['held_nanousd'])} set aside",
        f"created: {_time(job, 'created')}",
        f"expires: {_time(job, 'expires')}" if job["ended_at"] is None else f"ended: {_time(job, 'ended')}",
    ]
    return CommandResult(job, "\n".join(lines))


def _as_row(job: Row) -> tuple[str, ...]:
    return (
        job["id"],
        job["status"],
        f"{job['texts']:,}",
        f"{job['tokens']:,}",
        format_usd(job["charged_nanousd"]),
        format_usd(job["budget_nanousd"]),
        _time(job, "created"),
        job["name"] or "",
    )


def _time(job: Row, name: str) -> str:
    return utc(job[f"{name}_at"] * 1000)
