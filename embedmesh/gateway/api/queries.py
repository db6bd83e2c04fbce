"""What the path and the query of a small route say, and lists that are answered a page at a time."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, TypeVar

from aiohttp import web

from embedmesh.http.routing import PATH_REMAINDER
from embedmesh.rules.errors import InvalidValue, NotFound, UnknownParameter
from embedmesh.rules.limits import PAGE_ROWS_MAX

ROWS = 100  # of a page, where nobody says how many
NUMBER = re.compile("[0-9]{1,18}")
DATE = re.compile("(19[7-9]|[2-9][0-9]{2})[0-9]-[0-9]{2}-[0-9]{2}")  # no day before 1970 has anything

T = TypeVar("T")


def rest_of(request: web.BaseRequest) -> str:
    """What the path says behind the route. Raises NotFound for what can name nothing."""
    rest = request[PATH_REMAINDER]
    if not rest.isprintable():
        raise NotFound("Nothing has such a name.")
    return rest


def query_of(request: web.BaseRequest, *names: str) -> Mapping[str, str]:
    """The query's parameters, each at most once; an empty one is not given. Raises UnknownParameter, InvalidValue."""
    asked: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in names:
            takes = f"only {', '.join(names)}" if names else "none"
            raise UnknownParameter(f"This path has no such query parameter; it takes {takes}.", param=name[:64])
        if name in asked:
            raise InvalidValue(f"`{name}` is given twice.", param=name)
        if not value.isprintable():
            raise InvalidValue(f"`{name}` has a character that is none.", param=name)
        asked[name] = value
    return {name: value for name, value in asked.items() if value}


def number(query: Mapping[str, str], name: str, default: int, *, most: int) -> int:
    """A parameter from 1 to `most`. Raises InvalidValue."""
    text = query.get(name)
    if text is None:
        return default
    if not NUMBER.fullmatch(text) or not 1 <= int(text) <= most:
        raise InvalidValue(f"`{name}` is a whole number from 1 to {most:,}.", param=name)
    return int(text)


def rows_of(query: Mapping[str, str]) -> int:
    """How many rows a page is to have. Raises InvalidValue."""
    return number(query, "limit", ROWS, most=PAGE_ROWS_MAX)


def day(query: Mapping[str, str], name: str, default: date) -> date:
    """A parameter that is a day, UTC. Raises InvalidValue."""
    text = query.get(name)
    if text is None:
        return default
    try:
        if not DATE.fullmatch(text):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidValue(f"`{name}` is a day, written as in 2026-11-30.", param=name) from None


def page(rows: Sequence[T], limit: int, show: Callable[[T], Any]) -> dict[str, Any]:
    """A page of a list; `rows` has one more than the page where there are more."""
    return {"object": "list", "data": [show(row) for row in rows[:limit]], "has_more": len(rows) > limit}
