"""Where connections come from, and which one is closed when there are too many."""

import heapq
import itertools
import resource
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Protocol

from aiohttp import web

from embedmesh.rules.limits import CONNECTIONS_MAX
from embedmesh.rules.shares import ACCOUNT_SHARE

FILES_SHARE_MAX = 0.75  # of the files that the process may open: the store and nodes need some, too
BUSY_SKIPPED_MAX = 256  # connections that turn out to be busy, before a new one is refused
IPV6_PREFIX_BITS = 64  # one customer has all addresses of such a network
LOCAL_ORIGIN = "here"  # of a request without an address: over a Unix socket


class Origins:
    """The origin of a connection or request: its IPv4 address, its IPv6 network, or what a `trusted` proxy names."""

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        """Raises ValueError for a malformed network."""
        self._trusted = [ip_network(each) for each in trusted]

    def become(self, other: "Origins") -> None:
        """Trust what the other one trusts. Connections that are open keep the origin that they have."""
        self._trusted = other._trusted

    def of_peer(self, peer: object) -> str | None:
        """The origin of a socket's peer; None for a trusted proxy or a Unix socket, which many may be behind."""
        address = _address(peer[0]) if isinstance(peer, tuple) else None
        if address is None or any(address in network for network in self._trusted):
            return None
        return _named(address)

    def of_request(self, request: web.BaseRequest) -> str:
        return self.of(_peer(request), request.headers.get("X-Forwarded-For"))

    def address_of(self, request: web.BaseRequest) -> str:
        """The address itself that a request comes from, as far as it is known."""
        peer = _peer(request)
        direct = _address(peer[0]) if isinstance(peer, tuple) else None
        behind = None if self.of_peer(peer) is not None else _address(_last(request.headers.get("X-Forwarded-For")))
        return str(behind or direct or LOCAL_ORIGIN)

    def of(self, peer: object, forwarded: str | None) -> str:
        """The origin of a request from `peer`, with that `X-Forwarded-For` header or none.

        A proxy appends the address that it saw; anybody may have written what stands before that.
        """
        origin = self.of_peer(peer)
        if origin is not None:
            return origin
        seen = _address(_last(forwarded))
        return _named(seen) if seen is not None else LOCAL_ORIGIN


def _peer(request: web.BaseRequest) -> Any:
    return request.transport.get_extra_info("peername") if request.transport is not None else None


def _last(forwarded: str | None) -> str:
    """What the nearest proxy has written into `X-Forwarded-For`."""
    return (forwarded or "").rpartition(",")[2].strip()


def _address(text: object) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(str(text))
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _named(address: IPv4Address | IPv6Address) -> str:
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((int(address), IPV6_PREFIX_BITS), strict=False))


class Closable(Protocol):
    """A connection that may be closed while it is idle."""

    def idle_since(self) -> float | None:
        """When its last request ended; None during one."""

    def force_close(self) -> None: ...


class Connections:
    """All open connections. Over the bound, the one that has been idle longest is closed for a new one.

    One origin may have ACCOUNT_SHARE times what is free, as in a room for requests; over that, one of its own is
    closed. Connections in the middle of a request stay: if all are, the new one is refused.
    """

    def __init__(self, connections_max: int | None = None) -> None:
        """By default CONNECTIONS_MAX, or fewer if the process may not open enough files."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        possible = (
            CONNECTIONS_MAX if files == resource.RLIM_INFINITY else min(CONNECTIONS_MAX, int(files * FILES_SHARE_MAX))
        )
        self._max = possible if connections_max is None else connections_max
        self._all = _Idle()
        self._of: dict[str, _Idle] = {}
        self._origins: dict[Closable, str | None] = {}

    def made(self, connection: Closable, origin: str | None, now: float) -> bool:
        """Add a new one. Returns whether it may stay. Those without an origin may have all there are."""
        free = self._max - len(self._origins)
        own = self._of.get(origin) if origin is not None else None
        over_share = own is not None and len(own) >= ACCOUNT_SHARE * (free + 1)
        if over_share or free <= 0:
            idle = (own if own is not None and over_share else self._all).longest(now)
            if idle is None:
                return False
            self.lost(idle)
            idle.force_close()
        self._origins[connection] = origin
        self._all.add(connection, now)
        if origin is not None:
            self._of.setdefault(origin, _Idle()).add(connection, now)
        return True

    def lost(self, connection: Closable) -> None:
        """Remove one that was closed. Does nothing for one that is not here."""
        if connection not in self._origins:
            return
        origin = self._origins.pop(connection)
        self._all.remove(connection)
        if origin is not None:
            self._of[origin].remove(connection)
            if not len(self._of[origin]):
                del self._of[origin]


class _Idle:
    """Finds the connection that has been idle longest: a heap by when each was last known to be busy."""

    def __init__(self) -> None:
        self._open: set[Closable] = set()
        self._heap: list[tuple[float, int, Closable]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Closable, now: float) -> None:
        self._open.add(connection)
        self._push(now, connection)

    def remove(self, connection: Closable) -> None:
        self._open.discard(connection)
        if len(self._heap) > 2 * len(self._open) + 16:  # most of it is closed by now
            self._heap = [entry for entry in self._heap if entry[2] in self._open]
            heapq.heapify(self._heap)

    def longest(self, now: float) -> Closable | None:
        """None if the connections that could be it are busy."""
        for _ in range(BUSY_SKIPPED_MAX):
            while self._heap and self._heap[0][2] not in self._open:
                heapq.heappop(self._heap)
            if not self._heap:
                return None
            known_since, _, connection = heapq.heappop(self._heap)
            since = connection.idle_since()
            self._push(now if since is None else since, connection)
            if since is not None and since <= known_since:
                return connection
            if known_since >= now:  # so are all others
                return None
        return None

    def _push(self, since: float, connection: Closable) -> None:
        heapq.heappush(self._heap, (since, next(self._numbers), connection))
