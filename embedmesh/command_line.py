"""Settings as command-line arguments, for the supervisor's children."""

from collections.abc import Collection
from typing import get_type_hints

import msgspec

from embedmesh.rules.money import plain_usd
from embedmesh.settings import IN_USD, meta_of


def as_arguments(
    settings: msgspec.Struct, *, without: Collection[str], only: Collection[str] | None = None
) -> list[str]:
    """The arguments for these settings. Defaults, and the fields of `without`, are left out.

    With `only` they are those fields, defaults included: what else there is the children read from their file.
    """
    arguments: list[str] = []
    hints = get_type_hints(type(settings), include_extras=True)
    for field in msgspec.structs.fields(settings):
        value = getattr(settings, field.name)
        left_out = value == field.default if only is None else field.name not in only
        if field.name in without or left_out or value is None or value is False:
            continue
        option = "--" + field.name.replace("_", "-")
        if (meta := meta_of(hints[field.name])) and meta.extra == IN_USD:
            value = plain_usd(value)
        for one in value if isinstance(value, tuple) else (value,):
            arguments += [option] if one is True else [option, str(one)]
    return arguments
