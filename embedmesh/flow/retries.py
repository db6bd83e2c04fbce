"""The same request again without an `Idempotency-Key`: an SDK's retry, known by its API key and its body.

A retry attaches to the first request while that is under way in this gateway. The work goes on for LINGER_S after its
caller has left, so that a client that was cut off finds it again; it is charged once, when a reply is handed over. If
the caller broke the delivery off, the reply was paid and not read: a retry within UNREAD_S gets it again, unpaid.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Generic, NamedTuple, Protocol, TypeVar

from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import RequestHead
from embedmesh.rules.limits import UNREAD_S
from embedmesh.rules.ports import Caller
from embedmesh.rules.shares import Shares

LINGER_S = 2.0  # SDKs try again after half a second, one, two
LINGERING_MAX = 256  # each may keep a node busy in vain
LINGERING_ACCOUNT_MAX = 16  # as many as one client has under way when its connection breaks
UNREAD_BYTES_MAX = 64 * 1024 * 1024  # of all accounts: sixteen replies of the largest request at 512 components
UNREAD_ENTRY_BYTES = 1_024  # of one beside its vectors

R = TypeVar("R")
K = TypeVar("K")

RetryId = tuple[str, bytes]
"""An API key's id and the hash of a body: they identify a retry."""


class Timer(Protocol):
    """Cancels a call that is to be made later."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


def _retry_id(caller: Caller, body: bytes) -> RetryId:
    return caller.key_id, hashlib.blake2b(body, digest_size=16).digest()


class _Unread(NamedTuple, Generic[K]):
    kept: K
    size: int
    timer: Timer


class Unread(Generic[K]):
    """Replies that were paid and whose delivery the caller broke off, in this process's memory for UNREAD_S.

    At most `bytes_max`, of which each account has a share; its oldest reply goes first.
    """

    def __init__(self, call_later: CallLater, bytes_max: int = UNREAD_BYTES_MAX) -> None:
        self._call_later = call_later
        self._shares = Shares(bytes_max)
        self._accounts: dict[str, dict[RetryId, _Unread[K]]] = {}
        self.accounts: Collection[str] = self._accounts.keys()
        """Those of which any is kept."""

    def keep(self, caller: Caller, body: bytes, kept: K, reply_bytes: int) -> None:
        """Keep a reply of that size for a retry of this request. Only a paid one."""
        retry_id, account_id = _retry_id(caller, body), caller.account_id
        self._drop(account_id, retry_id)
        size = reply_bytes + UNREAD_ENTRY_BYTES
        while not self._shares.take(account_id, size):
            if not (mine := self._accounts.get(account_id)):
                return  # it would not fit even alone
            self._drop(account_id, next(iter(mine)))
        timer = self._call_later(UNREAD_S, lambda: self._drop(account_id, retry_id))
        self._accounts.setdefault(account_id, {})[retry_id] = _Unread(kept, size, timer)

    def find(self, caller: Caller, body: bytes) -> K | None:
        """The reply to the same request, if it is kept."""
        if not (mine := self._accounts.get(caller.account_id)):
            return None
        found = mine.get(_retry_id(caller, body))
        return found.kept if found is not None else None

    def forget(self, caller: Caller, body: bytes) -> None:
        """The reply was read to its end."""
        if caller.account_id in self.accounts:
            self._drop(caller.account_id, _retry_id(caller, body))

    def _drop(self, account_id: str, retry_id: RetryId) -> None:
        mine = self._accounts.get(account_id, {})
        if (dropped := mine.pop(retry_id, None)) is None:
            return
        dropped.timer.cancel()
        self._shares.give_back(account_id, dropped.size)
        if not mine:
            del self._accounts[account_id]


class Unshared(Protocol):
    """A request that goes straight."""

    head: RequestHead
    caller: Caller
    body: bytes

    def share(self) -> None:
        """Let it go on as a shared work."""
        ...


class Shared(Generic[R]):
    """One work and those who wait for it."""

    task: "asyncio.Task[R]"

    def __init__(self, retry_id: RetryId, account_id: str, reply_bytes: int) -> None:
        self.retry_id = retry_id
        self.account_id = account_id
        self.reply_bytes = reply_bytes
        self.waiting = 0
        self.begun = False
        self.unwanted = False  # by anybody, from now on
        self.delivered = False
        self.refused = False  # a waiter got a failure instead of the result, which can be delivered no more


class SingleFlight(Generic[R]):
    """Works under way, by API key and body. `give_up` is called with a result that nobody took in the end."""

    def __init__(self, give_up: Callable[[R], None], replies: Shares) -> None:
        """`replies` bounds the bytes of replies that wait for a reader."""
        self._give_up = give_up
        self._replies = replies
        self.straight: dict[Unshared, None] = {}  # what nobody can join yet; bounded by the requests under way
        self._shared: dict[RetryId, Shared[R]] = {}
        self._lingering: dict[Shared[R], asyncio.TimerHandle] = {}
        self._lingering_of: Counter[str] = Counter()  # by account

    def join(
        self, caller: Caller, body: bytes, *, reply_bytes: int, again: bool, begin: Callable[[], Awaitable[R]]
    ) -> "Shared[R]":
        """Begin the work, or join it if this is the same request `again`; then `take` its result, or `leave`.

        The reply has at most `reply_bytes`.
        """
        retry_id = _retry_id(caller, body)
        if again:
            self._go_on(caller, body)
        shared = self._shared.get(retry_id) if again else None
        if shared is None or _failed(shared.task):  # a failure is reported once; the next request starts anew
            shared = self._shared[retry_id] = Shared(retry_id, caller.account_id, reply_bytes)
            shared.task = asyncio.ensure_future(self._work(shared, begin))
            shared.task.add_done_callback(_heard)
        elif shared in self._lingering:
            self._found(shared)
        shared.waiting += 1
        return shared

    async def take(self, shared: "Shared[R]", deliver: Callable[[R], Awaitable[None]]) -> R:
        """Deliver the result of the work. Raises what either raises."""
        try:
            result = await asyncio.shield(shared.task)
            await deliver(result)
            shared.delivered = True
            return result
        except Failure:
            shared.refused = True
            self._forget(shared)
            raise
        finally:
            self.leave(shared)

    def leave(self, shared: "Shared[R]") -> None:
        """Its caller has gone, or was answered. The work goes on for a while, if nobody else waits."""
        shared.waiting -= 1
        if not shared.waiting:
            self._left(shared)

    def under_way(self, caller: Caller, body: bytes) -> bool:
        """Whether the same request is under way, or its reply waits for a reader."""
        self._go_on(caller, body)
        if not self._shared:
            return False
        return _retry_id(caller, body) in self._shared

    def _go_on(self, caller: Caller, body: bytes) -> None:
        """If the same request goes straight, it can be joined from now on."""
        for each in self.straight:
            if each.body == body and each.caller.key_id == caller.key_id and each.head.retries is not None:
                each.share()
                return

    async def stop(self) -> None:
        """Give up all works that wait for a retry."""
        for shared in list(self._lingering):
            self._found(shared)
            self._end(shared)
        await asyncio.sleep(0)

    async def _work(self, shared: Shared[R], begin: Callable[[], Awaitable[R]]) -> R:
        """What is unwanted before it begins begins all the same, for it may have to give back what it has."""
        shared.begun = True
        if shared.unwanted:
            shared.task.cancel()
        result = await begin()
        if shared.unwanted:
            self._give_up(result)
        return result

    def _left(self, shared: Shared[R]) -> None:
        if shared.delivered or shared.refused or _failed(shared.task) or not self._may_linger(shared):
            self._forget(shared)
            self._end(shared)
            return

        def nobody_came() -> None:
            self._found(shared)
            self._forget(shared)
            self._end(shared)

        self._lingering_of[shared.account_id] += 1
        self._lingering[shared] = asyncio.get_running_loop().call_later(LINGER_S, nobody_came)

    def _may_linger(self, shared: Shared[R]) -> bool:
        """Take room to wait for a retry, if there is any."""
        return (
            len(self._lingering) < LINGERING_MAX
            and self._lingering_of[shared.account_id] < LINGERING_ACCOUNT_MAX
            and self._replies.take(shared.account_id, shared.reply_bytes)
        )

    def _found(self, shared: Shared[R]) -> None:
        """A retry has come, or its time is over."""
        self._lingering.pop(shared).cancel()
        self._replies.give_back(shared.account_id, shared.reply_bytes)
        self._lingering_of[shared.account_id] -= 1
        if not self._lingering_of[shared.account_id]:
            del self._lingering_of[shared.account_id]

    def _forget(self, shared: Shared[R]) -> None:
        if self._shared.get(shared.retry_id) is shared:
            del self._shared[shared.retry_id]

    def _end(self, shared: Shared[R]) -> None:
        """Nobody will take it any more."""
        if shared.delivered:
            return
        if not shared.task.done():
            shared.unwanted = True
            if shared.begun:
                shared.task.cancel()
        elif not shared.task.cancelled() and shared.task.exception() is None:
            self._give_up(shared.task.result())


def _failed(task: "asyncio.Task[R]") -> bool:
    """Whether the task ended without a result."""
    return task.done() and (task.cancelled() or task.exception() is not None)


def _heard(task: "asyncio.Task[R]") -> None:
    """Retrieve its exception, which asyncio would otherwise report as never retrieved if nobody waits."""
    if not task.cancelled():
        task.exception()
