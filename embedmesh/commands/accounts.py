"""`embedmesh accounts`: who has how much money, how much may be owed, and what answers from the cache cost."""

import secrets
from pathlib import Path

import click

from embedmesh.commands.books import books_of, data_dir_option, every, iso_time, json_option
from embedmesh.commands.options import SIGNED_USD, USD
from embedmesh.commands.statement import statement
from embedmesh.commands.telling import print_json, print_table
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.money import format_usd
from embedmesh.storage.books.accounts import Account

CUSTOMER = "customer"  # the kind of an account that pays; all others are our own bookkeeping
CACHE = click.Choice([policy.value for policy in CachePolicy])
IN_WORDS = {
    CachePolicy.OFF: "its answers never come from memory",
    CachePolicy.CHARGED: "its answers may come from memory, and cost the same then",
    CachePolicy.FREE: "its answers may come from memory, and cost nothing then",
}


@click.group()
def accounts() -> None:
    """Make accounts, show them, and give them credit."""


accounts.add_command(statement)


@accounts.command()
@click.argument("account")
@click.option("--credit-limit", type=USD, default="0", help="USD that it may owe: postpaid. Default: 0, prepaid.")
@click.option(
    "--cache",
    type=CACHE,
    default=CachePolicy.OFF.value,
    help="Whether answers may come from memory where the same text was embedded before with the same model and "
    "options: charged as any, or free. Default: off.",
)
@data_dir_option
@json_option
def create(account: str, credit_limit: int, cache: str, data_dir: Path, as_json: bool) -> None:
    """Make a customer's account, prepaid or postpaid.

    \b
    Examples:
      embedmesh accounts create search-team
      embedmesh accounts create partner --credit-limit 200 --cache charged
    """
    with books_of(data_dir) as books:
        made = books.accounts.create(account, credit_limit_nanousd=credit_limit, cache=CachePolicy(cache))
    if as_json:
        print_json(_as_json(made))
        return
    cached = "" if made.cache is CachePolicy.OFF else f"; {IN_WORDS[made.cache]}"
    click.echo(f"{account} is there: {_terms(made)}{cached}.")


@accounts.command()
@click.argument("account")
@click.argument("usd", type=USD)
@data_dir_option
@json_option
def limit(account: str, usd: int, data_dir: Path, as_json: bool) -> None:
    """Let an account owe up to USD; 0 makes it prepaid.

    Below what it owes already, running requests included, no limit can be set.

    \b
    Examples:
      embedmesh accounts limit partner 500
      embedmesh accounts limit partner 0
    """
    with books_of(data_dir) as books:
        after = books.accounts.change(account, credit_limit_nanousd=usd)
    if as_json:
        print_json(_as_json(after))
        return
    click.echo(f"{account} is {_terms(after)}; {format_usd(after.available_nanousd)} available.")


@accounts.command("cache")
@click.argument("account")
@click.argument("policy", type=CACHE)
@data_dir_option
@json_option
def cache_(account: str, policy: str, data_dir: Path, as_json: bool) -> None:
    """Whether an account's answers may come from memory.

    They may where the same text was embedded before with the same model and options. `charged`: such an answer costs
    as much as any; `free`: it costs nothing; `off`: none comes from memory. On every gateway within a second.

    \b
    Examples:
      embedmesh accounts cache search-team free
      embedmesh accounts cache search-team off
    """
    with books_of(data_dir) as books:
        after = books.accounts.change(account, cache=CachePolicy(policy))
    if as_json:
        print_json(_as_json(after))
        return
    click.echo(f"{account}: {IN_WORDS[after.cache]}.")


@click.command()
@click.argument("account", required=False)
@data_dir_option
@json_option
def show(account: str | None, data_dir: Path, as_json: bool) -> None:
    """Show one account, or all.

    Customers come first, then the internal accounts that their money comes from and goes to.

    \b
    Examples:
      embedmesh accounts show
      embedmesh accounts list
      embedmesh accounts show local --json
    """
    with books_of(data_dir) as books:
        shown = [books.accounts.find(account)] if account else every(lambda after: books.accounts.list(after=after))
    shown = sorted(shown, key=lambda each: each.kind != CUSTOMER)
    if as_json:
        print_json([_as_json(each) for each in shown])
        return
    amounts = ("balance", "held", "credit limit", "available")
    print_table(("account", "kind", *amounts, "cache"), [_as_row(each) for each in shown], right=amounts)


for name in ("show", "list"):
    accounts.add_command(show, name)


@accounts.command(context_settings={"ignore_unknown_options": True})  # or -5 would be an option
@click.argument("account")
@click.argument("usd", type=SIGNED_USD)
@click.option(
    "--reference", help="Your own id of this payment: the same reference is applied once. Default: a new one."
)
@data_dir_option
@json_option
def credit(account: str, usd: int, reference: str | None, data_dir: Path, as_json: bool) -> None:
    """Give an account USD of credit, as 12.50; -12.50 takes it back.

    \b
    Examples:
      embedmesh accounts credit local 25 --reference invoice-2026-118
      embedmesh accounts credit local -5
    """
    with books_of(data_dir) as books:
        applied = books.accounts.credit(account, usd, reference or f"cli-{secrets.token_hex(8)}")
        after = books.accounts.find(account)
    if as_json:
        print_json({"applied": applied, **_as_json(after)})
        return
    done = f"{format_usd(abs(usd))} {'credited' if usd > 0 else 'taken back'}"
    what = done if applied else "Nothing done: that reference was applied before"
    click.echo(f"{what}; {account} has {format_usd(after.available_nanousd)} available.")


def _terms(account: Account) -> str:
    owed = account.credit_limit_nanousd
    return f"postpaid, up to {format_usd(owed)}" if owed else "prepaid"


def _as_row(account: Account) -> tuple[str, ...]:
    kind = account.kind if account.kind == CUSTOMER else f"internal: {account.kind.replace('_', ' ')}"
    return (
        account.account_id,
        kind,
        format_usd(account.balance_nanousd),
        format_usd(account.held_nanousd),
        format_usd(account.credit_limit_nanousd) if account.kind == CUSTOMER else "-",
        format_usd(account.available_nanousd),
        account.cache if account.kind == CUSTOMER else "-",
    )


def _as_json(account: Account) -> dict[str, object]:
    return {
        "account": account.account_id,
        "kind": account.kind,
        "balance_nanousd": account.balance_nanousd,
        "held_nanousd": account.held_nanousd,
        "credit_limit_nanousd": account.credit_limit_nanousd,
        "available_nanousd": account.available_nanousd,
        "cache": account.cache,
        "created": iso_time(account.created_ms),
    }
