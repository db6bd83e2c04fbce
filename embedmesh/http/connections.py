"""Where connections come from, and which one goes when there are too many."""

import heapq
import itertools
import resource
from collections import defaultdict
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol

from aiohttp import web

from embedmesh.rules.shares import ACCOUNT_SHARE

CONNECTIONS_MAX = 8_192  # about 20 kB each when idle
OF_FILES = 0.75  # of those that the process may have open: the store and nodes need some, too
LOOKS_MAX = 256  # at connections that turn out to be busy, before a new one is refused
PREFIX_V6 = 64  # bits: who has an IPv6 address has all of these
HERE = "here"  # where it comes from has no address: a Unix socket


class Origins:
    """Who is behind a connection: an address, or its network where one person has all of that.

    Behind proxies that are `trusted` it is whom they name.
    """

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        """Raises ValueError for what is no network."""
        self._trusted = [ip_network(each) for each in trusted]

    def of_peer(self, peer: object) -> str | None:
        """Of a socket's other end; None where many people may be behind it."""
        address = _address(peer[0]) if isinstance(peer, tuple) else None
        if address is None or any(address in network for network in self._trusted):
            return None
        return _named(address)

    def of_request(self, request: web.BaseRequest) -> str:
        """Whose request it is."""
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        return self.of(peer, request.headers.get("X-Forwarded-For"))

    def of(self, peer: object, forwarded: str | None) -> str:
        """Of what came from there, with an `X-Forwarded-For` or none.

        A proxy adds to the end of it whom it saw; what stands before that anybody may have written.
        """
        origin = self.of_peer(peer)
        if origin is not None:
            return origin
        seen = _address((forwarded or "").rpartition(",")[2].strip())
        return _named(seen) if seen is not None else HERE


def _address(text: object) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(str(text))
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _named(address: IPv4Address | IPv6Address) -> str:
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((int(address), PREFIX_V6), strict=False))


class Connection(Protocol):
    """One that may be closed while it is idle."""

    def idle_since(self) -> float | None:
        """When it was last in the middle of a request; None while it is."""
        ...

    def force_close(self) -> None: ...


class Connections:
    """All that are open. Over the bound the one that has been idle longest is closed for a new one.

    One origin may have ACCOUNT_SHARE times what is free, as in a room for requests; for more, one of its own is closed.
    Those in the middle of a request stay: where all are, the new one is refused.
    """

    def __init__(self, connections_max: int | None = None) -> None:
        """By default CONNECTIONS_MAX, or as many as there may be files for them."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        possible = CONNECTIONS_MAX if files == resource.RLIM_INFINITY else min(CONNECTIONS_MAX, int(files * OF_FILES))
        self._max = possible if connections_max is None else connections_max
        self._all = _Idle()
        self._of: defaultdict[str, _Idle] = defaultdict(_Idle)
        self._origins: dict[Connection, str | None] = {}

    def made(self, connection: Connection, origin: str | None, now: float) -> bool:
        """A new one; whether it may stay. One without an origin has no share but all."""
        free = self._max - len(self._origins)
        over_share = origin is not None and len(self._of[origin]) >= ACCOUNT_SHARE * (free + 1)
        among = self._of[origin] if origin is not None and over_share else self._all
        if among is not self._all or free <= 0:
            idle = among.longest(now)
            if idle is None:
                self._tidy(origin)
                return False
            self.lost(idle)
            idle.force_close()
        self._origins[connection] = origin
        self._all.add(connection, now)
        if origin is not None:
            self._of[origin].add(connection, now)
        return True

    def lost(self, connection: Connection) -> None:
        """It is closed. Harmless for one that was refused, or lost before."""
        if connection not in self._origins:
            return
        origin = self._origins.pop(connection)
        self._all.remove(connection)
        if origin is not None:
            self._of[origin].remove(connection)
            self._tidy(origin)

    def _tidy(self, origin: str | None) -> None:
        if origin is not None and not len(self._of[origin]):
            del self._of[origin]


class _Idle:
    """Finds the one that has been idle longest: a heap by when each was last known to be busy, which only grows."""

    def __init__(self) -> None:
        self._open: set[Connection] = set()
        self._heap: list[tuple[float, int, Connection]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection, now: float) -> None:
        self._open.add(connection)
        self._push(now, connection)

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        if len(self._heap) > 2 * len(self._open) + 16:  # most of it is closed by now
            self._heap = [entry for entry in self._heap if entry[2] in self._open]
            heapq.heapify(self._heap)

    def longest(self, now: float) -> Connection | None:
        """None where those that could be it are busy."""
        for _ in range(LOOKS_MAX):
            while self._heap and self._heap[0][2] not in self._open:
                heapq.heappop(self._heap)
            if not self._heap:
                return None
            known, _, connection = heapq.heappop(self._heap)
            since = connection.idle_since()
            self._push(now if since is None else since, connection)
            if since is not None and since <= known:
                return connection
            if known >= now:  # so are all others
                return None
        return None

    def _push(self, since: float, connection: Connection) -> None:
        heapq.heappush(self._heap, (since, next(self._numbers), connection))
