"""`embedmesh files`: which files an account keeps at a gateway; deleting one."""

import click

from embedmesh.commands.account_client import AccountClient, Row, account_command
from embedmesh.commands.output import CommandResult, table, utc

HEAD = ("file", "bytes", "purpose", "created", "expires", "name")


@click.group()
def files() -> None:
    """List the files that your account keeps for batches, delete one.

    \b
    Example:
      embedmesh files list
    """


@files.command("list")
@account_command
def list_(account: AccountClient) -> CommandResult:
    """List files, the newest first.

    \b
    Example:
      embedmesh files list --json
    """
    found = account.rows("files", cursor="id")
    text = table(HEAD, [_as_row(file) for file in found], right=HEAD[1:2]) if found else "There is no file."
    return CommandResult(found, text)


@files.command()
@click.argument("file_id")
@account_command
def delete(account: AccountClient, file_id: str) -> CommandResult:
    """Delete a file. A batch that reads it goes on.

    \b
    Example:
      embedmesh files delete file_019aa0b4c0de…
    """
    return CommandResult(account.delete("files", file_id), f"File {file_id} is deleted.")


def _as_row(file: Row) -> tuple[str, ...]:
    times = utc(file["created_at"] * 1000), utc(file["expires_at"] * 1000)
    return file["id"], f"{file['bytes']:,}", file["purpose"], *times, file["filename"]
