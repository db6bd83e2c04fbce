"""`embedmesh accounts`: balances, credit, credit limits, and whether answers may come from the cache."""

import secrets
from typing import Any

import click

from embedmesh.commands.operator import Operator, operator_command
from embedmesh.commands.options import SIGNED_USD, USD
from embedmesh.commands.output import CommandResult, iso_time, table
from embedmesh.commands.statement import statement
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.money import format_usd
from embedmesh.storage.books.accounts import CUSTOMER_KIND

CACHE_CHOICE = click.Choice([policy.value for policy in CachePolicy])
CACHE_IN_WORDS = {
    "off": "its answers never come from memory",
    "charged": "its answers may come from memory, and cost the same then",
    "free": "its answers may come from memory, and cost nothing then",
}
AMOUNTS = ("balance", "held", "credit limit", "available")

Row = dict[str, Any]


@click.group()
def accounts() -> None:
    """Make accounts, show them, and give them credit.

    \b
    Example:
      embedmesh accounts create search-team
    """


accounts.add_command(statement)


@accounts.command()
@click.argument("account")
@click.option("--credit-limit", type=USD, default="0", help="USD that it may owe: postpaid. Default: 0, prepaid.")
@click.option(
    "--cache",
    type=CACHE_CHOICE,
    default=CachePolicy.OFF.value,
    help="Whether answers may come from memory where the same text was embedded before with the same model and "
    "options: charged as any, or free. Default: off.",
)
@operator_command
def create(operator: Operator, account: str, credit_limit: int, cache: str) -> CommandResult:
    """Make a customer's account, prepaid or postpaid.

    \b
    Examples:
      embedmesh accounts create search-team
      embedmesh accounts create partner --credit-limit 200 --cache charged
    """
    body = {"id": account, "credit_limit_nanousd": credit_limit, "cache": cache}
    made = operator.post("accounts", body=body)
    cached = "" if made["cache"] == CachePolicy.OFF else f"; {CACHE_IN_WORDS[made['cache']]}"
    return CommandResult(_as_json(made), f"{account} is there: {_terms(made)}{cached}.")


@accounts.command()
@click.argument("account")
@click.argument("usd", type=USD)
@operator_command
def limit(operator: Operator, account: str, usd: int) -> CommandResult:
    """Let an account owe up to USD; 0 makes it prepaid.

    The limit cannot be less than what the account owes already, running requests included.

    \b
    Examples:
      embedmesh accounts limit partner 500
      embedmesh accounts limit partner 0
    """
    after = operator.post("accounts", account, body={"credit_limit_nanousd": usd})
    return CommandResult(_as_json(after), f"{account} is {_terms(after)}; {_available(after)}.")


@accounts.command("cache")
@click.argument("account")
@click.argument("policy", type=CACHE_CHOICE)
@operator_command
def cache_(operator: Operator, account: str, policy: str) -> CommandResult:
    """Set whether an account's answers may come from memory.

    They may where the same text was embedded before with the same model and options. `charged`: such an answer costs
    as much as any; `free`: it costs nothing; `off`: none comes from memory. On every gateway within a second.

    \b
    Examples:
      embedmesh accounts cache search-team free
      embedmesh accounts cache search-team off
    """
    after = operator.post("accounts", account, body={"cache": policy})
    return CommandResult(_as_json(after), f"{account}: {CACHE_IN_WORDS[after['cache']]}.")


@click.command()
@click.argument("account", required=False)
@operator_command
def show(operator: Operator, account: str | None) -> CommandResult:
    """Show one account, or all.

    Customers come first, then the internal accounts that their money comes from and goes to.

    \b
    Examples:
      embedmesh accounts show
      embedmesh accounts list
      embedmesh accounts show local --json
    """
    found = [operator.get("accounts", account)] if account else operator.rows("accounts", cursor="id")
    found.sort(key=lambda each: each["kind"] != CUSTOMER_KIND)
    text = table(("account", "kind", *AMOUNTS, "cache"), [_as_row(each) for each in found], right=AMOUNTS)
    return CommandResult([_as_json(each) for each in found], text)


for name in ("show", "list"):
    accounts.add_command(show, name)


@accounts.command(context_settings={"ignore_unknown_options": True})  # or -5 would be an option
@click.argument("account")
@click.argument("usd", type=SIGNED_USD)
@click.option(
    "--reference", help="Your own id of this payment: the same reference is applied once. Default: a new one."
)
@operator_command
def credit(operator: Operator, account: str, usd: int, reference: str | None) -> CommandResult:
    """Give an account USD of credit, as 12.50; -12.50 takes it back.

    \b
    Examples:
      embedmesh accounts credit local 25 --reference invoice-2026-118
      embedmesh accounts credit local -5
    """
    body = {"amount_nanousd": usd, "reference": reference or f"cli-{secrets.token_hex(8)}"}
    applied = operator.post("accounts", account, "credits", body=body)["applied"]
    after = operator.get("accounts", account)
    done = f"{format_usd(abs(usd))} {'credited' if usd > 0 else 'taken back'}"
    what = done if applied else "Nothing done: that reference was applied before"
    return CommandResult({"applied": applied, **_as_json(after)}, f"{what}; {account} has {_available(after)}.")


def _available(account: Row) -> str:
    return f"{format_usd(account['available_nanousd'])} available"


def _terms(account: Row) -> str:
    owed = account["credit_limit_nanousd"]
    return f"postpaid, up to {format_usd(owed)}" if owed else "prepaid"


def _as_row(account: Row) -> tuple[str, ...]:
    pays = account["kind"] == CUSTOMER_KIND
    return (
        account["id"],
        CUSTOMER_KIND if pays else f"internal: {account['kind'].replace('_', ' ')}",
        format_usd(account["balance_nanousd"]),
        format_usd(account["held_nanousd"]),
        format_usd(account["credit_limit_nanousd"]) if pays else "-",
        format_usd(account["available_nanousd"]),
        account["cache"] if pays else "-",
    )


def _as_json(account: Row) -> Row:
    amounts = ("balance_nanousd", "held_nanousd", "credit_limit_nanousd", "available_nanousd")
    return {
        "account": account["id"],
        **{name: account[name] for name in ("kind", *amounts, "cache")},
        "created": iso_time(account["created_ms"]),
    }
