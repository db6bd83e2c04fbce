"""The straight path: an ordinary request and its reply in two steps, without a task, a future or a coroutine.

What HTTP and the flow need of each other for it. What comes out of the ordinary later (a failed attempt, a caller that
leaves, or reads slowly) goes on as a coroutine, from the state reached.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from embedmesh.rules.exchange import Deliver, Reply
from embedmesh.rules.request_record import RequestRecord

GoOn = Callable[[Deliver], Awaitable[None]]
"""Continues a request: delivers its reply, or raises."""


class ToCaller(Protocol):
    """One request's way back to its caller."""

    def deliver(self, reply: Reply) -> object | None:
        """Write the reply, whose headers have the request's id (REQUEST_HEADER).

        None if the kernel has all of it, and `end` must be called; else the rest for `go_on`.
        """
        ...

    def end(self) -> None:
        """The request is over."""
        ...

    def go_on(self, handle: GoOn, rest: object | None = None) -> None:
        """Let a coroutine handle the request from now on. With a `rest`, delivering its reply is sending that."""
        ...


class Asked(Protocol):
    """A request whose work has begun. In the end it calls `ToCaller.end` or `go_on`."""

    def record(self) -> RequestRecord:
        """What log lines say of it now, under our own id of it, which the ledger has, too."""
        ...

    def go_on(self) -> GoOn:
        """From now on its life is that of a coroutine, which is run at once."""
        ...

    def caller_left(self) -> None:
        """Nobody reads the reply any more, and nothing of it was delivered."""
        ...


class Straight(Protocol):
    """Asks for ordinary requests."""

    def knows(self, headers: Mapping[str, str]) -> Any | None:
        """What the headers say, names in lower case; None if no request with such a head is ordinary."""
        ...

    def ask(self, head: Any, body: bytes, to_caller: ToCaller) -> Asked | None:
        """Have the work begun; None if the request is not ordinary: then nothing has changed. Never answers at once."""
        ...
