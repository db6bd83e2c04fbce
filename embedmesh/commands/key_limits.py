"""The options by which `embedmesh keys create` and `change` say what a key may do, and its limits in words."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec

from embedmesh.commands.catalogued import model_ids
from embedmesh.commands.models import catalogue_option
from embedmesh.commands.options import USD, WholeNumber
from embedmesh.rules.limits import KEY_LIMIT_MAX
from embedmesh.rules.money import format_usd
from embedmesh.storage.books.keys import Limits

MODELS_SHOWN_MAX = 2


class AskedLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says; None where it says nothing."""

    models: tuple[str, ...] = ()
    catalogue: Path | None = None
    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None
    concurrency: int | None = None
    budget_day: int | None = None
    budget_month: int | None = None

    @property
    def says_something(self) -> bool:
        """Whether anything is asked."""
        return bool(self._asked())

    def over(self, before: Limits) -> Limits:
        """Those before, but for what is asked. Raises WrongUsage (no such model) and SetupError."""
        asked = self._asked()
        if self.models:
            asked["models"] = model_ids(self.models, self.catalogue)
        return msgspec.structs.replace(before, **asked)

    def _asked(self) -> dict[str, Any]:
        said = msgspec.structs.asdict(self).items()
        return {name: value for name, value in said if value not in (None, ()) and name != "catalogue"}


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a command that takes them as AskedLimits, `asked`."""

    @wraps(command)
    def with_limits(**given: Any) -> None:
        names = AskedLimits.__struct_fields__
        asked = AskedLimits(**{name: given.pop(name) for name in names})
        command(asked=asked, **given)

    a_minute = WholeNumber(1, KEY_LIMIT_MAX)
    made: Callable[..., None] = with_limits
    for option in (
        click.option("--budget-month", type=USD, help="USD that it may spend in a month, UTC."),
        click.option("--budget-day", type=USD, help="USD that it may spend in a day, UTC."),
        click.option("--concurrency", type=WholeNumber(1, KEY_LIMIT_MAX), help="Requests at one time."),
        click.option("--tokens-a-minute", type=a_minute, help="Tokens a minute."),
        click.option("--requests-a-minute", type=a_minute, help="Requests a minute."),
        catalogue_option,
        click.option("--model", "models", multiple=True, help="Model that it may use. Repeatable. Default: all."),
    ):
        made = option(made)
    return made


def in_words(limits: Limits) -> str:
    """All limits in a line; a dash for none."""
    words = [
        f"{value:,} {name}"
        for value, name in (
            (limits.requests_a_minute, "requests/min"),
            (limits.tokens_a_minute, "tokens/min"),
            (limits.concurrency, "at once"),
        )
        if value is not None
    ]
    for value, name in ((limits.budget_day, "day"), (limits.budget_month, "month")):
        if value is not None:
            words.append(f"{format_usd(value)}/{name}")
    if limits.models:
        names = [model.rpartition("/")[2] for model in limits.models]
        words.append(" or ".join(names) if len(names) <= MODELS_SHOWN_MAX else f"{len(names)} models")
    return ", ".join(words) or "-"
