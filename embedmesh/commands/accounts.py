"""`embedmesh accounts`: who has how much money."""

import secrets
from pathlib import Path

import click

from embedmesh.commands.books import books_of, data_dir_option, iso_time, json_option
from embedmesh.commands.telling import print_json, print_table
from embedmesh.rules.money import format_usd, parse_usd
from embedmesh.storage.books.accounts import Account

CUSTOMER = "customer"  # the kind of an account that pays; all others are our own bookkeeping


@click.group()
def accounts() -> None:
    """Show accounts and give them credit."""


@accounts.command()
@click.argument("account", required=False)
@data_dir_option
@json_option
def show(account: str | None, data_dir: Path, as_json: bool) -> None:
    """Show one account, or all.

    Customers come first, then the internal accounts that their money comes from and goes to.

    \b
    Examples:
      embedmesh accounts show
      embedmesh accounts show local --json
    """
    with books_of(data_dir) as books:
        shown = [books.accounts.find(account)] if account else books.accounts.list()
    shown = sorted(shown, key=lambda each: each.kind != CUSTOMER)
    if as_json:
        print_json([_as_json(each) for each in shown])
        return
    amounts = ("balance", "held", "available")
    print_table(("account", "kind", *amounts), [_as_row(each) for each in shown], right=amounts)


@accounts.command(context_settings={"ignore_unknown_options": True})  # or -5 would be an option
@click.argument("account")
@click.argument("usd")
@click.option(
    "--reference", help="Your own id of this payment: the same reference is applied once. Default: a new one."
)
@data_dir_option
@json_option
def credit(account: str, usd: str, reference: str | None, data_dir: Path, as_json: bool) -> None:
    """Give an account USD of credit, as 12.50; -12.50 takes it back.

    \b
    Examples:
      embedmesh accounts credit local 25 --reference invoice-2026-118
      embedmesh accounts credit local -5
    """
    try:
        amount = parse_usd(usd)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="USD") from None
    with books_of(data_dir) as books:
        applied = books.accounts.credit(account, amount, reference or f"cli-{secrets.token_hex(8)}")
        after = books.accounts.find(account)
    if as_json:
        print_json({"applied": applied, **_as_json(after)})
        return
    done = f"{format_usd(abs(amount))} {'credited' if amount > 0 else 'taken back'}"
    what = done if applied else "Nothing done: that reference was applied before"
    click.echo(f"{what}; {account} has {format_usd(after.available_nanousd)} available.")


def _as_row(account: Account) -> tuple[str, ...]:
    amounts = (account.balance_nanousd, account.held_nanousd, account.available_nanousd)
    kind = account.kind if account.kind == CUSTOMER else f"internal: {account.kind.replace('_', ' ')}"
    return (account.account_id, kind, *map(format_usd, amounts))


def _as_json(account: Account) -> dict[str, object]:
    return {
        "account": account.account_id,
        "kind": account.kind,
        "balance_nanousd": account.balance_nanousd,
        "held_nanousd": account.held_nanousd,
        "available_nanousd": account.available_nanousd,
        "created": iso_time(account.created_ms),
    }
