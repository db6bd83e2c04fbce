"""A lock for a caller's next sealed request, which it asks for with this one: one exchange a call instead of two.

It is opened as any other, while this request's own lock is redeemed: both are written in one batch. It is told once, in
the reply to the request that asked. Where there is none by then, or that request comes to nothing, nobody has it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from embedmesh.flow.lock import check_units
from embedmesh.rules.confidential import NODES_LOCKED_MAX, SDK_SCHEME, LockTerms, Scheme, SealingNode
from embedmesh.rules.errors import Failure, InvalidValue
from embedmesh.rules.exchange import NEXT_LOCK_HEADER

NODE_CHARS_MAX = 64
DIGITS_MAX = 9

Opened = tuple[LockTerms, SealingNode]


class WantedLock(NamedTuple):
    """What the next lock is to be: for how many tokens, on which nodes; None for any."""

    units: int
    among: frozenset[str] | None


def read_wanted(header: str | None, scheme: Scheme) -> WantedLock | None:
    """The header: a number of tokens, then nodes, with a space between two words. Raises InvalidValue."""
    if header is None:
        return None
    if scheme == SDK_SCHEME:
        raise _invalid(f"`{NEXT_LOCK_HEADER}` is not for requests of the scheme `{SDK_SCHEME}`: leave it out.")
    units, *nodes = header.split(" ")
    if not (units.isascii() and units.isdigit() and len(units) <= DIGITS_MAX):
        raise _invalid(f"`{NEXT_LOCK_HEADER}` is a number of tokens, and behind it ids of nodes, if only some will do.")
    check_units(int(units), NEXT_LOCK_HEADER)
    if len(nodes) > NODES_LOCKED_MAX or not all(0 < len(node) <= NODE_CHARS_MAX for node in nodes):
        raise _invalid(
            f"`{NEXT_LOCK_HEADER}` names at most {NODES_LOCKED_MAX} nodes, each of 1 to {NODE_CHARS_MAX} characters, "
            "with one space before each."
        )
    return WantedLock(int(units), frozenset(nodes) if nodes else None)


class LockAhead:
    """At most one lock: opened, then told or dropped."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, Opened]], drop: Callable[[LockTerms], None]) -> None:
        self._opening = opening
        self._drop = drop
        self._task: asyncio.Task[Opened | None] | None = None

    def begin(self) -> None:
        """Open it, beside what is done next."""
        self._task = asyncio.get_running_loop().create_task(self._open())

    def told(self) -> Opened | None:
        """The lock, from now on its caller's. None where it is not there: nobody waits for it."""
        task = self._task
        if task is None or not task.done():
            self.drop()
            return None
        self._task = None
        return task.result()

    def drop(self) -> None:
        """Nobody has heard of it: its money is free again."""
        task, self._task = self._task, None
        if task is None:
            return
        if not task.done():
            task.cancel()
        elif not task.cancelled() and task.exception() is None and (opened := task.result()) is not None:
            self._drop(opened[0])

    async def _open(self) -> Opened | None:
        try:
            return await self._opening()
        except Failure:
            return None  # no money, too many locks, no node: the caller asks again, and is told why


def _invalid(words: str) -> InvalidValue:
    return InvalidValue(words, param=NEXT_LOCK_HEADER)
