"""Settings as command-line arguments, for the supervisor's children."""

from collections.abc import Collection
from typing import get_type_hints

import msgspec

from embedmesh.rules.money import plain_usd
from embedmesh.settings import IN_USD, meta_of


def as_arguments(settings: msgspec.Struct, *, without: Collection[str]) -> list[str]:
    """The arguments for these settings. Defaults, and the fields of `without`, are left out."""
    arguments: list[str] = []
    hints = get_type_hints(type(settings), include_extras=True)
    for field in msgspec.structs.fields(settings):
        value = getattr(settings, field.name)
        if field.name in without or value == field.default:
            continue
        option = "--" + field.name.replace("_", "-")
        if (meta := meta_of(hints[field.name])) and meta.extra == IN_USD:
            value = plain_usd(value)
        for one in value if isinstance(value, tuple) else (value,):
            arguments += [option] if one is True else [option, str(one)]
    return arguments
