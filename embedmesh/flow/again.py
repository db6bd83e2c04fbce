"""The same request again: with an `Idempotency-Key`, or as a retry of an SDK whose first try is still under way.

With a key the ledger remembers who came first, and its reply is kept: see `hold`. Without one, a retry by the same API
key with the same body attaches to its twin in this gateway. Its work goes on for LINGER_S after its caller has gone, so
that a client that was cut off finds it again; it is charged once, when somebody has got the reply.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

import msgspec

from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import InvalidValue, RateLimited
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Answer, Caller

KEY_CHARS_MAX = 255
KEPT_REPLY_BYTES_MAX = 8 * 1024 * 1024  # of vectors: 2,048 of 1,024 components
KEPT_ACCOUNT_BYTES_MAX = 256 * 1024 * 1024
FULL_AGAIN_S = 3_600.0  # replies are forgotten after a day
LINGER_S = 2.0  # SDKs try again after half a second, one, two
LINGERING_MAX = 256  # each may keep a node busy for nobody

R = TypeVar("R")


class Asked(NamedTuple):
    """What a request's headers say, apart from its body. `retries` is None where no SDK says how often it has tried."""

    authorization: str | None = None
    idempotency_key: str | None = None
    retries: int | None = None


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a reply that was delivered: enough to make the same bytes again."""

    answer: Answer
    cost: int
    truncated: int


def check_key(key: str) -> None:
    """Raise InvalidValue for an `Idempotency-Key` that is none."""
    if not 0 < len(key) <= KEY_CHARS_MAX:
        raise InvalidValue(f"An Idempotency-Key has 1 to {KEY_CHARS_MAX} characters.")


def check_room(model: Model, counted: Counted, kept_bytes: int) -> None:
    """Raise InvalidValue or RateLimited where the reply could not be kept, so that it could not be given again."""
    size = len(counted.lengths) * model.width * 4
    if size > KEPT_REPLY_BYTES_MAX:
        raise InvalidValue(
            f"A reply with so many vectors is not kept for an Idempotency-Key: at most {KEPT_REPLY_BYTES_MAX:,} bytes "
            "of vectors are. Split the inputs, or leave the key out."
        )
    if kept_bytes + size > KEPT_ACCOUNT_BYTES_MAX:
        raise RateLimited(
            "This account has as many replies kept for Idempotency-Keys as it may. They are kept for a day: wait, or "
            "leave the key out.",
            retry_after_s=FULL_AGAIN_S,
        )


def pack(kept: Kept) -> bytes:
    """For the ledger."""
    return msgspec.msgpack.encode(kept)


def unpack(data: bytes) -> Kept:
    """From the ledger."""
    return msgspec.msgpack.decode(data, type=Kept)


class _Shared(Generic[R]):
    """One work and those who wait for it."""

    def __init__(self, task: "asyncio.Task[R]") -> None:
        self.task = task
        self.waiting = 0
        self.delivered = False


class Twins(Generic[R]):
    """Works that are under way, by API key and body. `give_up` is called with what nobody got in the end."""

    def __init__(self, give_up: Callable[[R], None]) -> None:
        self._give_up = give_up
        self._shared: dict[tuple[str, bytes], _Shared[R]] = {}
        self._lingering: dict[_Shared[R], asyncio.TimerHandle] = {}

    async def work(
        self,
        key_id: str,
        body: bytes,
        *,
        again: bool,
        begin: Callable[[], Awaitable[R]],
        deliver: Callable[[R], Awaitable[None]],
    ) -> R:
        """What `begin` makes of a request, delivered; or what its twin makes, where this is the same request `again`.

        Raises what either raises.
        """
        place = key_id, hashlib.blake2b(body, digest_size=16).digest()
        shared = self._shared.get(place) if again else None
        if shared is None or _failed(shared.task):  # a failure is told once: what comes after it is tried anew
            shared = self._shared[place] = _Shared(asyncio.ensure_future(begin()))
            shared.task.add_done_callback(_heard)
        elif (timer := self._lingering.pop(shared, None)) is not None:
            timer.cancel()
        shared.waiting += 1
        try:
            result = await asyncio.shield(shared.task)
            await deliver(result)
            shared.delivered = True
            return result
        finally:
            shared.waiting -= 1
            if not shared.waiting:
                self._left(place, shared)

    def under_way(self, caller: Caller, body: bytes) -> bool:
        """Whether a request of the same key with the same body is, or its reply waits for somebody."""
        if not self._shared:
            return False
        return (caller.key_id, hashlib.blake2b(body, digest_size=16).digest()) in self._shared

    async def stop(self) -> None:
        """Wait for nobody any more."""
        for shared, timer in list(self._lingering.items()):
            timer.cancel()
            self._end(shared)
        await asyncio.sleep(0)

    def _left(self, place: tuple[str, bytes], shared: _Shared[R]) -> None:
        if shared.delivered or _failed(shared.task) or len(self._lingering) >= LINGERING_MAX:
            self._forget(place, shared)
            self._end(shared)
            return

        def nobody_came() -> None:
            self._lingering.pop(shared, None)
            self._forget(place, shared)
            self._end(shared)

        self._lingering[shared] = asyncio.get_running_loop().call_later(LINGER_S, nobody_came)

    def _forget(self, place: tuple[str, bytes], shared: _Shared[R]) -> None:
        if self._shared.get(place) is shared:
            del self._shared[place]

    def _end(self, shared: _Shared[R]) -> None:
        """Nobody will get it any more."""
        if shared.delivered:
            return
        if not shared.task.done():
            shared.task.cancel()
        elif not shared.task.cancelled() and shared.task.exception() is None:
            self._give_up(shared.task.result())


def _failed(task: "asyncio.Task[R]") -> bool:
    """Whether it has ended without a result."""
    return task.done() and (task.cancelled() or task.exception() is not None)


def _heard(task: "asyncio.Task[R]") -> None:
    """Its exception is told to those who wait; where nobody does, it is not to be told as forgotten."""
    if not task.cancelled():
        task.exception()
