"""A gateway over a real store whose replies are larger than a socket takes, and a caller that reads as it likes.

What is played is the far edge: nodes that answer by rule, and a tokenizer of letters.
"""

import asyncio
import contextlib
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embedmesh.catalogue import Catalogue
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.deliver import Done
from embedmesh.flow.retries import SingleFlight, Unread
from embedmesh.flow.world import World
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.forwarding import AttemptOwner, Part
from embedmesh.rules.limits import WRITE_REPLY_S
from embedmesh.rules.models import Model
from embedmesh.rules.shares import Shares
from embedmesh.rules.spending import TabSize
from embedmesh.signing.certificates import der, make_certificate, pinned_context, server_context
from embedmesh.storage.secrets.secret import claim_of
from embedmesh.storage.store import Store
from tests.flow.world import REPLY_BYTES, Bystander, LetterTokenizer, NeverAtOnce
from tests.http.raw import request
from tests.storage.shop import SECRET, Shop

WIDE = Model(
    id="acme/wide", folder="/nowhere", width=384, max_tokens=8, price=1_500_000, digest="0" * 64, aliases=("wide",)
)
CREDIT = 10**9
SMALL_BUFFER_BYTES = 32 * 1024  # of a socket: the kernel doubles it
PATIENCE_S = 20.0  # milliseconds; the rest is for a busy machine
VECTORS = np.random.default_rng(1).standard_normal((2_048, WIDE.width)).astype("<f4")


class Straightway:
    """Whether requests that may go straight do: then there is a tab for the key, and attempts begin at once."""

    wanted = False


class Nodes(NeverAtOnce):
    """The n-th input of a call has the n-th vector. Held back while `open` is not set; `before_answer` may be cruel."""

    def __init__(self) -> None:
        self.at_once = 0
        self.open = asyncio.Event()
        self.open.set()
        self.calls = 0
        self.before_answer: Callable[[], None] = lambda: None

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Any:
        if not Straightway.wanted:
            return None
        self.at_once += 1
        task = asyncio.ensure_future(self.embed(part, model, counted, request_id))

        def done(task: asyncio.Task[EmbedVectors]) -> None:
            if not task.cancelled():
                owner.answered(task.result())

        task.add_done_callback(done)
        return task

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        self.calls += 1
        await self.open.wait()
        self.before_answer()
        return EmbedVectors(tokens=part.tokens, data=VECTORS[list(part.rows)].tobytes())


class Till:
    """The gateway, and what its ledger says. Its account is `a`, with one key."""

    def __init__(self, shop: Shop, store: Store, token: str, write_s: float) -> None:
        registry, replies = Registry(shop.clock), Shares(REPLY_BYTES)
        call_later = asyncio.get_running_loop().call_later
        registry.answered_right(registry.add(Node("n0", "unix:/nowhere")), [WIDE.id])
        self.shop, self.store, self.token, self.nodes = shop, store, token, Nodes()
        self.world = World(
            keys=store.keys,
            rate_limits=store.rate_limits,
            slots=store.slots,
            prices=store.prices,
            catalogue=Catalogue((WIDE,)),
            tokenizers={WIDE.id: LetterTokenizer()},
            cl100k=None,
            ledger=store,
            fleet=Scheduler(registry, shop.clock, random.Random(7), call_later),
            client=self.nodes,
            observer=Bystander(),
            clock=shop.clock,
            single_flight=SingleFlight(Done.close, replies),
            unread=Unread(call_later),
            replies=replies,
            cache=VectorCache(10**7, registry.generation),
            hash_user=lambda user: "hash",
            claim_of=lambda key, body: claim_of(SECRET, key, body),
        )
        self.app = GatewayApp(
            self.world, registry, in_flight_max=1_000, bodies=BodyBudget(10**8), gauges=dict, write_s=write_s
        )
        self.connect: Callable[[], socket.socket]
        self.key_id: str

    def ask(self, texts: Sequence[str], *, fast_path: bool = True, encoding: str = "float", **headers: str) -> bytes:
        """A request, as the fast path takes it or as it does not."""
        body = msgspec.json.encode({"model": "wide", "input": list(texts), "encoding_format": encoding})
        return request(body=body, key=self.token, **headers, **({} if fast_path else {"te": "trailers"}))

    def rows(self, sql: str) -> list[Any]:
        return list(self.shop.books._db.execute(sql).fetchall())

    @property
    def charged(self) -> list[tuple[int, int]]:
        """Tokens and nano-USD of each usage record, the largest first."""
        return self.rows("SELECT tokens, cost FROM usage ORDER BY cost DESC")

    @property
    def set_aside(self) -> int:
        """For how many requests money was set aside until now: in holds of their own, and under tabs."""
        under_tabs = sum(len(tab.flight) for tab in self.store.tabs._tabs.values())
        ((holds, settled),) = self.rows(
            "SELECT (SELECT count(*) FROM holds), (SELECT count(*) FROM usage WHERE tab_id IS NOT NULL)"
        )
        return int(holds + settled) + under_tabs

    @property
    def outcomes(self) -> dict[str, int]:
        """How requests ended, and how many of each."""
        return self.app.metrics.requests()

    def waits(self, fast_path: bool) -> list[bool]:
        """Of each connection, whether a reply on it waits for its socket to take more."""
        protocols: list[Any] = self.app.server._aiohttp.connections
        exchanges = [each._exchange for each in protocols if each._exchange]
        slow = [getattr(each, "_slow", each) for each in exchanges]  # what went straight may have gone on
        sendings = [each._sending for each in slow if each] if fast_path else [each.sending for each in protocols]
        return [sending is not None and sending._emptied is not None for sending in sendings]

    async def ended(self, requests: int) -> None:
        """So many requests have ended."""
        await until(lambda: sum(self.outcomes.values()) >= requests)

    async def settled(self, requests: int) -> None:
        """So many requests have ended, and so have all holds and tabs, and the books are right."""
        await self.ended(requests)
        await until(lambda: not self.store.tabs._opening)
        self.store.tabs.close_these(set(self.store.tabs._tabs))
        await until(lambda: not self.store.tabs._tabs)
        await until(lambda: not self.rows("SELECT 1 FROM holds WHERE state = 'open'"))
        await until(lambda: not self.rows("SELECT 1 FROM tabs WHERE ended_ms IS NULL"))
        assert self.shop.money() == (CREDIT - sum(cost for _, cost in self.charged), 0)
        self.shop.assert_right()
        assert self.world.replies.taken == 0
        assert self.app.metrics.internal_errors._value.get() == 0


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not what():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def till(
    folder: Path,
    wire: str = "tcp",
    *,
    write_s: float = WRITE_REPLY_S,
    small: bool = True,
    cache: CachePolicy = CachePolicy.OFF,
) -> AsyncIterator[Till]:
    """Over `tcp`, `tls` or `unix`; with `small` the gateway's sockets take little at a time."""
    shop = Shop(folder, new=False)
    shop.books.accounts.create("a", cache=cache)
    shop.credit(CREDIT)
    of_caller_key, token = shop.books.keys.create("a", ["embeddings"])
    store = await shop.open()
    made, tls, of_caller = Till(shop, store, token, write_s), None, None
    made.key_id = of_caller_key.key_id
    if wire == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "till.sock"))
        listener.listen()
    else:
        listener = socket.create_server(("127.0.0.1", 0))
    if wire == "tls":
        cert, key = folder / "cert.pem", folder / "key.pem"
        make_certificate(key, cert)
        tls, of_caller = server_context(cert, key), pinned_context(der(cert))
    if small:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)
    listener.setblocking(False)
    made.connect = lambda: _connect(listener.family, address, of_caller)
    address = listener.getsockname()
    await made.app.server.start(listener, tls)
    watching = [asyncio.ensure_future(each) for each in store.background()]
    if Straightway.wanted:
        await until(lambda: store.tabs._watching)
        store.tabs._want("a", made.key_id, TabSize(CREDIT, 10_000))
        await until(lambda: store.tabs._open)
        await store.keys.find(token)
    try:
        yield made
    finally:
        await made.app.server.drain(0.1)
        await made.world.single_flight.stop()
        for each in watching:
            each.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await store.close()
        shop.books.close()


def _connect(family: int, address: Any, tls: ssl.SSLContext | None) -> socket.socket:
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    sock.settimeout(PATIENCE_S)
    sock.connect(address)
    return tls.wrap_socket(sock) if tls is not None else sock


class Customer:
    """A caller on one connection. What waits is done in another thread: the gateway runs in this one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send(self, data: bytes) -> None:
        await asyncio.to_thread(self._sock.sendall, data)

    async def read(self, size: int) -> bytes:
        """So many bytes, or all there are before the end."""
        return await asyncio.to_thread(self._read, size)

    async def reply(self, pause_s: float = 0.0) -> bytes:
        """The body of one reply with a length; with a pause after each piece of it."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = await self.read(1)
            assert byte, head
            head += byte
        self.head = head
        left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        pieces: list[bytes] = []
        while left and (piece := await self.read(min(left, SMALL_BUFFER_BYTES))):
            pieces.append(piece)
            left -= len(piece)
            await asyncio.sleep(pause_s)
        return b"".join(pieces)

    def _read(self, size: int) -> bytes:
        pieces: list[bytes] = []
        while size and (piece := self._sock.recv(min(size, 2**16))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def reset(self) -> None:
        """Close so that the other side is told that nothing more is wanted, and what was not read is thrown away."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self) -> None:
        self._sock.close()

    def half_close(self) -> None:
        """Nothing more will be sent; what comes is still read."""
        self._sock.shutdown(socket.SHUT_WR)


@asynccontextmanager
async def customer(of: Till) -> AsyncIterator[Customer]:
    sock = await asyncio.to_thread(of.connect)
    with contextlib.closing(sock):
        yield Customer(sock)
