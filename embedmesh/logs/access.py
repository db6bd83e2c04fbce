"""The access log: a line for each request that was paid, and for as many others as nobody can fill a disk with."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from embedmesh.logs.lines import ACCESS_LOGGER, NO_ROUTE, NO_STATUS
from embedmesh.logs.writer import LogWriter
from embedmesh.rules.request_record import RequestRecord

AccessLogKind = Literal["off", "on", "addresses"]

log = logging.getLogger(ACCESS_LOGGER)

UNPAID_WINDOW_S = 10.0
UNPAID_LINES = {"strangers": 50, "account": 50, "accounts": 500}
"""Lines of requests that cost nothing, in a window: of all strangers, of one account, of all accounts. At 400 bytes a
line that is 2 GB a day at the very most; a flood from strangers writes 170 MB a day."""
QUIET_ROUTES = frozenset(("/health", "/readyz", "/metrics"))  # asked by machines every few seconds
TOLD_MAX = 20  # kinds of uncounted requests that are named at the end of a window
REQUEST_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
OTHER_METHOD = "_OTHER"  # a method is any word that a caller likes


class WrittenAccessLog:
    """Implements the port `AccessLog`, on an event loop.

    Paid requests have a budget by themselves. Of others, the first in a window get a line, the rest are counted by
    route and status and told when the window ends: a refused request stays cheap.
    """

    def __init__(self, writer: LogWriter, client_of: Callable[[object, str | None], str]) -> None:
        """`client_of` tells a client's address by its socket's peer and its `X-Forwarded-For`."""
        self.client_of = client_of
        self._put = writer.put_request
        self._until = 0.0
        self._written: Counter[str] = Counter()  # by account, "" for strangers
        self._of_accounts = 0
        self._more: Counter[tuple[str, int]] = Counter()  # by route and status: as many as there are of these

    def ended(self, record: RequestRecord) -> None:
        """Note a request."""
        record.ended_at = time.time()
        if record.tokens or self._may(record):
            self._put(record)

    def _may(self, record: RequestRecord) -> bool:
        if record.nanousd:
            return True
        if record.status == 200 and record.route in QUIET_ROUTES:
            return False
        if record.method not in REQUEST_METHODS:
            record.method = OTHER_METHOD
        if (
            record.ended_at >= self._until or record.ended_at < self._until - UNPAID_WINDOW_S
        ):  # or the clock was put back
            self._until = record.ended_at + UNPAID_WINDOW_S
            self._written.clear()
            self._of_accounts = 0
        name = record.account
        if self._written[name] < UNPAID_LINES["account" if name else "strangers"] and (
            not name or self._of_accounts < UNPAID_LINES["accounts"]
        ):
            self._written[name] += 1
            self._of_accounts += bool(name)
            return True
        if not self._more:
            asyncio.get_running_loop().call_later(UNPAID_WINDOW_S, self._tell)
        self._more[record.route, record.status] += 1
        return False

    def _tell(self) -> None:
        told = self._more.most_common(TOLD_MAX)
        rest = self._more.total() - sum(count for _, count in told)
        self._more.clear()
        for (route, status), count in told:
            log.info("%d more requests to %s ended with %s", count, route or NO_ROUTE, status or NO_STATUS)
        if rest:
            log.info("%d more requests ended otherwise", rest)


def access_log(
    kind: AccessLogKind, writer: LogWriter | None, client_of: Callable[[object, str | None], str]
) -> WrittenAccessLog | None:
    """The access log that the settings ask for, if any."""
    if kind == "off" or writer is None:
        return None
    return WrittenAccessLog(writer, client_of if kind == "addresses" else _nobody)


def _nobody(peer: object, forwarded: str | None) -> str:
    return ""
