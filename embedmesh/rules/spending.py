"""How much a key spends, and how large a tab that is worth. Decides only: time and amounts are arguments.

A tab pays off where it covers several requests: opening and closing one costs the store as much as holding and
capturing two requests one by one. So a key has a tab only while it sends requests, and one of a size that it will
spend soon: what lies in a tab cannot be had elsewhere until it is closed.
"""

from typing import NamedTuple

from embedmesh.rules.limits import HOLD_GRACE_S, REQUEST_MIN_S, WRITE_REPLY_S

TAB_S = 15.0  # how long a tab is spent from; then another takes its place, or its key has become quiet
RENEW_S = 12.0  # when the next one is opened, so that no request finds none
UNUSED_S = 3.0  # without a request, after which a tab is closed: who looks at an account sees all of its money again
RENEW_SHARE = 4  # or when less than this part of it is left: a quarter lasts half a second, opening one some ms
WORTH_MS = 2_000  # a tab is worth what its key spends in this time...
SPAN_MS_MIN = 20  # ... where that can be told: requests that come together say nothing of what follows
REQUESTS_MIN = 16  # the fewest requests, of the mean size, that a tab is made for
REQUESTS_LEAST = 4  # the fewest that it may be cut down to where money is short: with fewer it does not pay off
RECENT_S = 5.0  # two requests within this time are worth a tab: a third of its time
REQUEST_S = REQUEST_MIN_S + WRITE_REPLY_S + HOLD_GRACE_S  # what every request may take; longer ones have exact holds


class TabSize(NamedTuple):
    """What a tab should be, in nano-USD: what is wanted, and the least that is worth opening one."""

    wanted: int
    least: int


class Spending:
    """What exact holds of one key have lately set aside. Times are seconds on the monotonic clock."""

    __slots__ = ("last_s", "nanousd", "not_before_s", "requests", "since_s")

    def __init__(self, now_s: float) -> None:
        self.since_s = self.last_s = now_s
        self.nanousd = self.requests = 0
        self.not_before_s = now_s  # no tab is opened until then

    def note(self, amount: int, now_s: float) -> None:
        """One more request."""
        if now_s - self.since_s > RECENT_S:
            self.since_s, self.nanousd, self.requests = now_s, 0, 0
        self.last_s = now_s
        self.nanousd += amount
        self.requests += 1

    def tab_size(self, now_s: float) -> TabSize | None:
        """The tab that the key should have; None where it is too quiet for one, or was refused one just now."""
        if self.requests < 2 or now_s < self.not_before_s:
            return None
        return tab_size(self.nanousd, self.requests, now_s - self.since_s)


def tab_size(nanousd: int, requests: int, seconds: float) -> TabSize:
    """What a tab of a key should be that has sent `requests`, at least one, for `nanousd` in that time."""
    mean = -(-nanousd // requests)
    soon = nanousd * WORTH_MS // max(int(seconds * 1000), SPAN_MS_MIN)
    return TabSize(max(soon, mean * REQUESTS_MIN, 1), max(mean * REQUESTS_LEAST, 1))


def tab_deadline_ms(now_ms: int) -> int:
    """When a tab that is opened now may be ended by others: no request under it lasts so long."""
    return now_ms + int((TAB_S + REQUEST_S) * 1000)


def is_ordinary(deadline_ms: int, now_ms: int) -> bool:
    """Whether a request with that deadline could be covered by a tab that is opened now."""
    return deadline_ms <= tab_deadline_ms(now_ms)
