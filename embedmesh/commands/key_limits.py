"""The options by which `embedmesh keys create` and `change` limit a key, and its limits in words."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import click

from embedmesh.commands.options import USD, WholeNumber, catalogue_option
from embedmesh.rules.money import format_usd
from embedmesh.storage.books.keys import LIMIT_MAX

KEY_LIMIT_FIELDS = ("models", "requests_a_minute", "tokens_a_minute", "concurrency", "budget_day", "budget_month")
LIMIT_MODELS_SHOWN_MAX = 2  # in a column of a table


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a command that takes `limits`: those that were given, by the admin API's names."""

    @wraps(command)
    def with_limits(**given: Any) -> None:
        values = {name: given.pop(name) for name in KEY_LIMIT_FIELDS}
        command(limits={name: value for name, value in values.items() if value not in (None, ())}, **given)

    number = WholeNumber(1, LIMIT_MAX)
    made: Callable[..., None] = with_limits
    for option in (
        click.option("--budget-month", type=USD, help="USD that it may spend in a month, UTC."),
        click.option("--budget-day", type=USD, help="USD that it may spend in a day, UTC."),
        click.option("--concurrency", type=number, help="Requests at one time."),
        click.option("--tokens-a-minute", type=number, help="Tokens a minute."),
        click.option("--requests-a-minute", type=number, help="Requests a minute."),
        catalogue_option("With --offline: the gateway's catalogue, a TOML file. Default: the built-in one."),
        click.option("--model", "models", multiple=True, help="Model that it may use. Repeatable. Default: all."),
    ):
        made = option(made)
    return made


def in_words(limits: Mapping[str, Any]) -> str:
    """All limits in a line; a dash for none."""
    numbers = (("requests_a_minute", "requests/min"), ("tokens_a_minute", "tokens/min"), ("concurrency", "at once"))
    words = [f"{limits[name]:,} {unit}" for name, unit in numbers if limits[name] is not None]
    budgets = (("budget_day", "day"), ("budget_month", "month"))
    words += [f"{format_usd(limits[name])}/{span}" for name, span in budgets if limits[name] is not None]
    names = [model.rpartition("/")[2] for model in limits["models"]]
    if names:
        words.append(" or ".join(names) if len(names) <= LIMIT_MODELS_SHOWN_MAX else f"{len(names)} models")
    return ", ".join(words) or "-"
