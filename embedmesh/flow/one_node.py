"""A request that goes whole to one node, and to another one if that fails before it has answered."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import Failure, NodeFailure
from embedmesh.rules.forwarding import Fleet, Part
from embedmesh.rules.models import Model

T = TypeVar("T")


class OneNode:
    """Implements the port `Asker`. It ends by `answered`, `failed` or `leave`; what comes later changes nothing."""

    def __init__(
        self,
        fleet: Fleet,
        model: Model,
        tokens: int,
        account_id: str,
        explain: Callable[[NodeFailure | None], Failure],
        *,
        only: str | None = None,
        beginning: bytes | None = None,
    ) -> None:
        """Enter the queue with about that many `tokens`, for a server of another make, or `only` for that node.

        `explain` makes the caller's failure of the last node's. Raises Overloaded.
        """
        self._explain = explain
        self._only = only is not None
        self._came: asyncio.Future[Part] | None = None  # what `_next` waits for
        self._part: Part | None = None  # that a node has, or that waits to be asked for
        self._failure: Failure | None = None
        ids = None if only is None else [b""]  # nodes of our own making read ids only, or what is sealed for them
        counted = Counted(lengths=[tokens], ids=ids, texts=[""], exact=False)
        self._ticket = fleet.enter(model, counted, account_id, self, only, beginning)

    def take(self, part: Part) -> None:
        self._part = part
        if self._came is not None and not self._came.done():
            self._came.set_result(part)

    def give_up(self, last: NodeFailure | None) -> None:
        self._failure = self._explain(last)
        if self._came is not None and not self._came.done():
            self._came.set_exception(self._failure)

    async def ask(self, attempt: Callable[[Part], Awaitable[T]]) -> tuple[T, Part]:
        """What the first node says whose attempt succeeds, which is still busy with it. Raises a Failure."""
        while True:
            part = await self._next()
            try:
                return await attempt(part), part
            except NodeFailure as failure:
                self._part = None
                if not self._ticket.ended(part, failure):
                    raise self._explain(failure) from None

    def answered(self) -> None:
        """The node is done, and its speed is learned from that: not where it is the `only` one, for a sealed request.

        The tokens of that are a guess by its length, and its caller has chosen how far that is off.
        """
        if self._only:
            self.leave()
            return
        self._end(lambda part: self._ticket.ended(part, None))

    def failed(self, failure: NodeFailure) -> None:
        """The node has failed after it had begun to answer: no other one is asked."""
        self._ticket.leave()
        self._end(lambda part: self._ticket.ended(part, failure))

    def leave(self) -> None:
        """No more is wanted. Nothing is learned of a node that has not ended."""
        self._end(self._ticket.abandoned)

    def _end(self, how: Callable[[Part], object]) -> None:
        self._ticket.leave()
        part, self._part = self._part, None
        if part is not None:
            how(part)

    async def _next(self) -> Part:
        if self._failure is not None:
            raise self._failure
        if self._part is None:
            self._came = asyncio.get_running_loop().create_future()
            return await self._came
        return self._part
