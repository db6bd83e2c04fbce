"""Path parameters and query strings of routes, decoded into the structs of their rows."""

import functools
import re
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from embedmesh.http.routing import PATH_REMAINDER
from embedmesh.rules.errors import InvalidValue, NotFound, UnknownParameter
from embedmesh.rules.limits import PAGE_ROWS_MAX

PAGE_ROWS = 100  # where `limit` is not given
AT_PARAMETER = re.compile(r" - at `\$\.([^`]+)`$")
MISSING_PARAMETER = re.compile("missing required field `([^`]+)`")
DIGITS = re.compile("[0-9]{1,18}")

Limit = Annotated[int, Meta(ge=1, le=PAGE_ROWS_MAX, description=f"Rows of the page; {PAGE_ROWS} by default.")]
NonEmpty = Annotated[str, Meta(min_length=1)]

Q = TypeVar("Q", bound=msgspec.Struct)


def path_parameter(request: web.BaseRequest, *, any_name: bool) -> str:
    """The part of the path that fills the row's `{parameter}`.

    Raises NotFound for slashes and control characters, unless it may be `any_name`.
    """
    value = request[PATH_REMAINDER]
    if not any_name and ("/" in value or not value.isprintable()):
        raise NotFound("There is nothing at this path.")
    return value


def query_of(request: web.BaseRequest, kind: type[Q]) -> Q:
    """The query; an empty parameter counts as not given. Raises UnknownParameter, InvalidValue."""
    defaults = _defaults(kind)
    values: dict[str, Any] = {}
    for name, value in request.query.items():
        if name not in defaults:
            raise UnknownParameter(
                f"This path has no such query parameter; it takes only {', '.join(defaults)}.", param=name[:64]
            )
        if name in values:
            raise InvalidValue(f"`{name}` is given twice.", param=name)
        if not value.isprintable():
            raise InvalidValue(f"`{name}` has a control character.", param=name)
        number = isinstance(defaults[name], int) and DIGITS.fullmatch(value)
        values[name] = int(value) if number else value
    try:
        return msgspec.convert({name: value for name, value in values.items() if value != ""}, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        found = AT_PARAMETER.search(message) or MISSING_PARAMETER.search(message)
        param = found[1] if found else None
        message = AT_PARAMETER.sub("", message)
        raise InvalidValue(f"The query parameter `{param}` is not valid: {message}.", param=param) from None


@functools.cache
def _defaults(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Names of parameters -> their defaults."""
    return {field.encode_name: field.default for field in msgspec.structs.fields(kind)}
