"""Locks that came with replies, for the calls that follow: those have one exchange instead of two.

What a gateway has handed out is checked when it is used, as any lock is. There are never more than calls that run at
one time, and none where calls are rare: each keeps money set aside until it is used or expires.
"""

import threading
from typing import NamedTuple

from embedmesh.rules.limits import LOCK_S, LOCKS_OF_KEY_MAX

RESERVES_MAX = LOCKS_OF_KEY_MAX // 4  # of one model: other programs may have the same key
MODELS_MAX = 64  # that a client keeps locks for; it asks for none for any other
GOOD_MS = (LOCK_S - 5) * 1000  # from when it was asked for: the request that uses it must arrive in time


class Reserve(NamedTuple):
    """The gateway's words for a lock of `units` tokens. `asked_ms` is by the clock of this machine (Unix time)."""

    lock: bytes
    units: int
    asked_ms: int

    def is_good(self, now_ms: int) -> bool:
        """Whether there is time enough to use it."""
        return 0 <= now_ms - self.asked_ms < GOOD_MS


class _OfModel:
    def __init__(self) -> None:
        self.kept: list[Reserve] = []
        self.running = 0  # calls
        self.coming = 0  # locks, with the replies of some of them
        self.began_ms: int | None = None  # the last of them


class Reserves:
    """The locks of one client. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, _OfModel] = {}

    def begin(self, model: str, units: int, now_ms: int) -> "CallReserve":
        """A call for up to `units` tokens begins: what it may use, and whether it asks for another lock. End it."""
        with self._lock:
            if model not in self._of and len(self._of) >= MODELS_MAX:
                return CallReserve(self, None, None)
            of = self._of.setdefault(model, _OfModel())
            of.running += 1
            of.kept = [one for one in of.kept if one.is_good(now_ms)]
            reserve = next((one for one in reversed(of.kept) if one.units >= units), None)
            if reserve is not None:
                of.kept.remove(reserve)
            often = of.began_ms is not None and 0 <= now_ms - of.began_ms < GOOD_MS
            of.began_ms = now_ms
            asks = often and len(of.kept) + of.coming < min(of.running, RESERVES_MAX)
            of.coming += asks
            return CallReserve(self, of, reserve, asks=asks)

    def _end(self, of: _OfModel, came: Reserve | None, *, asked: bool, refused: bool) -> None:
        with self._lock:
            of.running -= 1
            of.coming -= asked
            if refused:
                of.kept.clear()  # they are of the same node, or as old
            if came is not None:
                of.kept.append(came)


class CallReserve:
    """What one call has of the reserves: one, or None. `asks`: whether it asks for a lock for the next call."""

    def __init__(self, reserves: Reserves, of: _OfModel | None, reserve: Reserve | None, *, asks: bool = False) -> None:
        self._reserves = reserves
        self._of = of
        self.reserve = reserve
        self._refused = False
        self._came: Reserve | None = None
        self.asks = asks

    def refused(self) -> None:
        """The lock was of no use, and so will be others of that time."""
        self._refused = True

    def keep(self, lock: bytes, units: int, asked_ms: int) -> None:
        """The lock that came with the reply."""
        if self.asks:
            self._came = Reserve(lock, units, asked_ms)

    def end(self) -> None:
        """The call is over, however it ended."""
        of, self._of = self._of, None
        if of is not None:
            self._reserves._end(of, self._came, asked=self.asks, refused=self._refused)
