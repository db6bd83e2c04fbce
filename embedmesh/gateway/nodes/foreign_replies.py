"""How replies of servers of other makes are read: leniently, where only one meaning is possible."""

import json
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from embedmesh.http.sse import BYTE_ORDER_MARK
from embedmesh.rules.errors import NodeBroke, WrongAnswer
from embedmesh.rules.nodes import Check
from embedmesh.upstream.generating import COMPRESSED
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.server import is_plain

COUNT_DIGITS_MAX = 15  # of a number that is written as a string

Read = TypeVar("Read")


def read_reply(reply: Http1Reply, decode: Callable[[bytes], Read], otherwise: str) -> Read:
    """A body as `decode` reads it, which raises ValueError or RecursionError for a wrong one. Raises a NodeFailure.

    `otherwise` are the words for a body of another form.
    """
    try:
        return decode(reply.body.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError):  # msgspec's, json's and Unicode's own errors are ValueErrors
        if reply.by_closing:
            raise NodeBroke("the server closed the connection before its reply was whole") from None
        raise WrongAnswer(otherwise if is_plain(reply.headers) else COMPRESSED, check=Check.FORM) from None


def check_once_each(body: bytes, names: Collection[str]) -> None:
    """Raises ValueError where one object has one of these members twice: parsers differ in which one counts."""

    def once_each(pairs: list[tuple[str, Any]]) -> None:
        said = [name for name, _ in pairs]
        if any(said.count(name) > 1 for name in names):
            raise ValueError("a field is there twice")

    json.loads(body, object_pairs_hook=once_each)


def whole(said: object) -> int | None:
    """A whole number of at least 0, also as `3.0` or `"3"`; None for anything else."""
    if isinstance(said, str) and said.isascii() and said.isdecimal() and len(said) <= COUNT_DIGITS_MAX:
        return int(said)
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else None
