"""What carries a bulk run's requests: the form of a post and of its reply, and how one fails."""

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple


class Posted(NamedTuple):
    """A whole reply. Names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray | memoryview


Post = Callable[[str, bytes, Mapping[str, str], int], Awaitable[Posted]]
"""Sends a body to a path below the endpoint, with these headers besides its own; how large the reply may be.

Raises NotPosted.
"""


class NotPosted(Exception):
    """No reply has come. The message is for people, and names the address."""


class NothingThere(NotPosted):
    """There is no connection: nothing was sent. `is_refused`: the host is there, and nothing listens."""

    def __init__(self, words: str, *, is_refused: bool = False) -> None:
        super().__init__(words)
        self.is_refused = is_refused


class NoSecureConnection(NotPosted):
    """Nor will there be: the other side's certificate is not trusted."""


class ConnectionBroke(NotPosted):
    """The request may have been read."""


class ConnectionWasClosed(ConnectionBroke):
    """The server had closed a kept connection, as servers do with those that are not used for a while. Send again."""


class TooLate(NotPosted):
    """The time for it is over; the request may have been read."""
