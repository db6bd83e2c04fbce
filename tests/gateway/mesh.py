"""A small mesh on loopback: a gateway over a real store, with all of its routes, and real nodes with a scripted engine.

What tests play themselves is the far edge: the engine, which answers by the rule of `tests.flow.world`, and a node that
is written by hand (`Applicant`), which says whatever a test wants said.
"""

import asyncio
import contextlib
import functools
import random
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.fleet.addresses import Lookup, Policy, system_lookup
from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.leftover import Leftover
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.deliver import Done
from embedmesh.flow.leases import Leases
from embedmesh.flow.operation import Operation
from embedmesh.flow.retries import SingleFlight, Unread
from embedmesh.flow.verify import verify
from embedmesh.flow.world import World
from embedmesh.gateway.api.account_api import AccountApi
from embedmesh.gateway.api.accounts_api import AccountsApi
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.audit_api import AuditApi
from embedmesh.gateway.api.batches_api import BatchesApi
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.files_api import FilesApi
from embedmesh.gateway.api.fleet_api import FleetApi
from embedmesh.gateway.api.generation_api import generations
from embedmesh.gateway.api.invites_api import InvitesApi
from embedmesh.gateway.api.jobs_api import JobsApi
from embedmesh.gateway.api.keys_api import KeysApi
from embedmesh.gateway.api.ledger_api import LedgerApi
from embedmesh.gateway.api.nodes_api import NodesApi
from embedmesh.gateway.api.prices_api import PricesApi
from embedmesh.gateway.api.reload_api import ReloadApi, ReloadRequests
from embedmesh.gateway.api.rerank_api import RERANK, RERANK_PATH
from embedmesh.gateway.api.routes import OperatorAccess
from embedmesh.gateway.build import IDENTITY
from embedmesh.gateway.nodes.connected import ConnectedNodes
from embedmesh.gateway.nodes.links import NodeClients
from embedmesh.gateway.nodes.registration import Registrar
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.gateway.nodes.sealed import SealingNodes
from embedmesh.gateway.nodes.sealed_generation import Sidecars
from embedmesh.http.connections import Origins
from embedmesh.http.paths import EMBEDDINGS_PATH
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.jobs.endpoints import world_of_lines
from embedmesh.jobs.files import FileStore
from embedmesh.jobs.runner import Runner
from embedmesh.node.app import CompactDone
from embedmesh.node.member import MemberNode
from embedmesh.node.signed_api import SignedApi
from embedmesh.rules.acts import Actor
from embedmesh.rules.embeddings import Counted, EmbedIds, EmbedVectors, ServedModel, ServedModels, unpack_ids
from embedmesh.rules.forwarding import Part
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.membership import STATEMENT, Greeting, Offer, Registration, Statement, Welcome
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.shares import Shares
from embedmesh.settings import NodeSettings
from embedmesh.signing.certificates import der, make_certificate, server_context
from embedmesh.signing.identity import Identity, fingerprint, node_id
from embedmesh.signing.invites import Invite, make_invite, proof, verifier
from embedmesh.signing.messages import RequestSigner
from embedmesh.signing.nonces import Nonces
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.signing.session import Ephemeral, Sessions, transcript
from embedmesh.storage.books import Books
from embedmesh.storage.secrets.secret import claim_of
from embedmesh.storage.store import Store
from tests.flow.world import CATALOGUE, EMBEDDINGS, MODEL, REPLY_BYTES, Bystander, LetterTokenizer, right_reply
from tests.http.raw import Raw, request, send

SECRET = bytes(range(32))
LOOPBACK = ("127.0.0.0/8",)
BEAT_S = 0.02
ADDING_S = 0.2
WITHIN_S = 5.0  # a few milliseconds; the rest is for a busy machine
IDS = [[1, 2], [3]]
BY = Actor("user:tests", "here")
ON_EACH_STORE = pytest.mark.parametrize("gw", ["sqlite", "postgres"], indirect=True, scope="module")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where that can be: many stores are made, and syncing a disk is not what is tested here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="embedmesh-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


async def until(what: str, look: Callable[[], Any], within_s: float = WITHIN_S) -> Any:
    """The first true value of `look`; AssertionError naming `what` when it takes too long."""
    ends = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < ends, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.002)
    return found


def says(reply: Raw, status: int, words: str) -> None:
    """The refusal, in the error envelope, says what is wrong."""
    assert (reply.status, set(reply.error)) == (status, {"message", "type", "param", "code"}), reply.body
    assert words in str(reply.error["message"])


class Clock:
    """The machine's clock, `ahead_s` before it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return int((time.time() + self.ahead_s) * 1000)


# -- the gateway -------------------------------------------------------------------------------------------------------


class Gateway:
    """One gateway, as `embedmesh.gateway` puts it together, on a port of its own."""

    port: int

    def __init__(
        self,
        store: Store,
        files_place: Path | str,
        books: Books,
        open_books: Callable[[], Books],
        clock: Clock,
        policy: Policy,
        lookup: Lookup,
        beat_s: float,
        origins: Origins,
        access: OperatorAccess | None = None,
        catalogue: Catalogue = CATALOGUE,
    ) -> None:
        """`books` are the test's own; the gateway opens its own with `open_books`."""
        self.store = store
        self.books_thread = BooksThread(open_books)
        self.reloads = ReloadRequests()
        self.callers_thread = BooksThread(open_books, first=self.books_thread)
        self.checks_thread = BooksThread(open_books)
        self.clock = clock
        self.identity = Identity.from_seed(SECRET, IDENTITY)
        self.fingerprint = fingerprint(self.identity.public_key)
        self.registry = Registry(clock)
        self.clients = NodeClients()
        self.nonces = Nonces(SECRET)
        tokenizers = {model.id: LetterTokenizer() for model in catalogue.models if not model.foreign}
        examiner = Examiner(self.registry, self.clients, catalogue, tokenizers, clock, verify)
        self.connected = ConnectedNodes(examiner, self.clients, self.fingerprint)
        self.roster = Roster(store.nodes, self.connected, self.registry, clock, store.changes)
        bodies = BodyBudget(10**8)
        registrar = Registrar(
            self.identity, self.nonces, store.nodes, self.roster, policy, lookup, clock, heartbeat_s=beat_s
        )
        self.registrar = registrar
        self.nodes_api = nodes_api = NodesApi(
            registrar, self.roster, self.registry, store.nodes, clock, origins, reports_a_minute_max=10**6
        )
        operators = (
            FleetApi(self.roster, self.registry, bodies, clock, catalogue, adding_s=ADDING_S),
            InvitesApi(store.nodes, bodies, clock, self.identity.public_key),
            AccountsApi(self.books_thread, bodies),
            KeysApi(self.books_thread, bodies, clock, catalogue),
            PricesApi(self.books_thread, bodies, catalogue),
            LedgerApi(self.books_thread, self.checks_thread, bodies),
            ReloadApi(self.reloads, bodies),
            AuditApi(self.books_thread),
        )
        self.account_api = account_api = AccountApi(self.callers_thread, bodies, clock, catalogue)
        call_later = asyncio.get_running_loop().call_later
        scheduler = Scheduler(self.registry, clock, random.Random(7), call_later)
        replies = Shares(REPLY_BYTES)
        world = World(
            keys=store.keys,
            rate_limits=store.rate_limits,
            slots=store.slots,
            prices=store.prices,
            catalogue=catalogue,
            tokenizers=tokenizers,
            cl100k=None,
            ledger=store,
            fleet=scheduler,
            client=self.clients,
            observer=Bystander(),
            clock=clock,
            single_flight=SingleFlight(Done.close, replies),
            unread=Unread(call_later),
            replies=replies,
            cache=VectorCache(10**6, self.registry.generation),
            hash_user=lambda user: "hash",
            claim_of=functools.partial(claim_of, SECRET),
            jobs=store.jobs,
        )
        sealing, leases = SealingNodes(self.registry, self.clients, clock, random.Random(7)), Leases(store, clock)
        leftover = Leftover(scheduler, clock, call_later)
        endpoints: dict[str, Operation] = {
            EMBEDDINGS_PATH: EMBEDDINGS,
            RERANK_PATH: RERANK,
            **generations(self.clients, leases),
        }
        self.files = FileStore(files_place, store.files, store.batches, SECRET, clock)
        self.runner = Runner(store.batches, self.files, world_of_lines(world, leftover), endpoints, leftover)
        batches = (
            FilesApi(self.files, store.files, lambda account: 1, bodies),
            BatchesApi(store.batches, self.files, store.files, self.runner, world, endpoints, bodies),
            JobsApi(store.jobs, bodies, clock),
        )
        self.app = GatewayApp(
            world,
            self.registry,
            in_flight_max=1_000,
            bodies=bodies,
            gauges=dict,
            more=[nodes_api, account_api, *operators, *batches],
            origins=origins,
            confidential=(store.locks, sealing),
            generating=(self.clients, leases),
            sidecars=(store.locks, Sidecars(sealing, self.clients), leases),
            operators=access,
        )
        self.books = books
        self.keys: dict[str, str] = {}
        self._ended = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def key(self, *scopes: str) -> str:
        """A key with these scopes."""
        name = " ".join(scopes)
        if name not in self.keys:
            self.keys[name] = self.books.keys.create("a", scopes)[1]
        return self.keys[name]

    async def invite(self, *, lasts_s: float = 3_600) -> Invite:
        """A join token."""
        made = make_invite(self.identity.public_key)
        expires_ms = self.clock.unix_ms() + int(lasts_s * 1000)
        await self.store.nodes.add_invite(made.invite_id, verifier(made.secret), "", expires_ms, BY)
        return made

    async def ask(self, method: str, path: str, body: object = None, *, key: str | None, **headers: str) -> Raw:
        """Ask anything, with a key or without."""
        encoded = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        return await send(self.port, request(method, path, encoded, key=key, **headers))

    async def admin(self, method: str, path: str, body: object = None) -> Raw:
        """Ask the admin API."""
        return await self.ask(method, f"/v1/admin{path}", body, key=self.key("admin"))

    async def act(self, name: str, action: str) -> dict[str, Any]:
        """Say something of a node; it must be done."""
        reply = await self.admin("POST", f"/nodes/{name}/{action}")
        assert reply.status == 200, reply.body
        return msgspec.json.decode(reply.body, type=dict[str, Any])

    def strangers_asked(self) -> int:
        """How often in this minute."""
        return self.registrar._strangers._room.taken

    def node(self, name: str) -> Node | None:
        return self.registry.find(name)

    async def until_ready(self, name: str) -> Node:
        """The node, once it gets work."""

        def ready() -> Node | None:
            node = self.node(name)
            return node if node is not None and node.state is NodeState.READY else None

        found: Node = await until(f"{name} is ready", ready)
        return found

    async def embed(self, name: str, ids: list[list[int]] = IDS, *, request_id: str = "req_1") -> EmbedVectors:
        """One call of that node, as the scheduler would make it."""
        lengths = [len(each) + 2 for each in ids]
        part = Part(name, tuple(range(len(ids))), sum(lengths), 0.1)
        return await self.clients.embed(part, MODEL, Counted(lengths=lengths, ids=ids), request_id)

    async def answers_rightly(self, name: str) -> None:
        """It embeds what it is asked for."""
        assert await self.embed(name) == right_reply(IDS)

    async def end(self, *, within_s: float = 0.1) -> None:
        """Let what runs end for so long, then close everything. No bug may have been met."""
        if self._ended:
            return
        self._ended = True
        bugs = self.app.metrics.internal_errors._value.get(), self.connected.broken.done()
        self.clients.close()
        await self.app.server.drain(within_s)
        await self.connected.stop()
        await self.roster.stop()
        await self.files.close()
        await asyncio.gather(*(one.close() for one in (self.books_thread, self.callers_thread, self.checks_thread)))
        await self.store.close()
        assert bugs == (0, False)


@asynccontextmanager
async def gateway(
    folder: Path,
    *,
    networks: Sequence[str] = LOOPBACK,
    lookup: Lookup = system_lookup,
    port: int = 0,
    beat_s: float = BEAT_S,
    store_url: str | None = None,
    trusted: Sequence[str] = (),
    operators: Callable[[Store], OperatorAccess] = lambda store: OperatorAccess(),
    files_place: Path | str | None = None,
    catalogue: Catalogue = CATALOGUE,
) -> AsyncIterator[Gateway]:
    """A gateway on the store in `folder`, or on a new one at a `postgresql://` address; its files in `folder`, too."""
    clock, path = Clock(), store_url or folder / "embedmesh.db"
    first = isinstance(path, str) or not path.exists()

    def open_books(*, for_others: bool = True) -> Books:
        return Books.open(path, clock=clock, secret=lambda engine: SECRET, for_others=for_others)

    with open_books(for_others=False) as books:
        if first:
            books.accounts.create("a")
            books.accounts.credit("a", 10**12, "test")
        store = await Store.open(path, folder=folder, clock=clock, secret=lambda engine: SECRET)
        policy, origins = Policy(networks), Origins(trusted)
        access = operators(store)
        place = files_place or folder / "files"
        made = Gateway(store, place, books, open_books, clock, policy, lookup, beat_s, origins, access, catalogue)
        sock = socket.create_server(("127.0.0.1", port))
        sock.setblocking(False)
        made.port = sock.getsockname()[1]
        await made.roster.reload()
        await made.files.open()
        watching = asyncio.ensure_future(store.changes.watch())
        await made.app.server.start(sock)
        try:
            yield made
        finally:
            watching.cancel()
            await made.end()


# -- nodes -------------------------------------------------------------------------------------------------------------


def begin_compact(app: Any, body: bytes, done: CompactDone) -> Callable[[], object]:
    """As a node's application begins its work, where a scripted one has a coroutine for it."""

    async def run() -> None:
        try:
            said = await app.embed_compact(body)
        except Exception as error:  # noqa: BLE001 - told to whom it concerns
            said = error, 0
        done(*said)

    return asyncio.ensure_future(run()).cancel


class Engine:
    """In place of a node's models and its application: right answers by rule, held back while `open` is not set."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.asked: list[list[list[int]]] = []
        self.running = 0
        self.dropped = 0

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return iter(
            [SimpleNamespace(model=model, up=True, waiting_tokens=7, tokens_per_s=1e4) for model in CATALOGUE.models]
        )

    def up(self) -> list[SimpleNamespace]:
        return list(self)

    async def embed_compact(self, body: bytes) -> tuple[bytes, int]:
        asked = unpack_ids(msgspec.msgpack.decode(body, type=EmbedIds))
        self.asked.append(asked)
        self.running += 1
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.running -= 1
        answer = right_reply(asked)
        return msgspec.msgpack.encode(answer), answer.tokens

    def begin_compact(self, body: bytes, done: CompactDone) -> Callable[[], object]:
        return begin_compact(self, body, done)

    def list_bytes(self) -> bytes:
        described = [ServedModel(one.id, one.width, one.max_tokens, one.digest, one.tier) for one in CATALOGUE.models]
        return msgspec.json.encode(ServedModels(described))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class RealNode:
    """A member node: all of it but its engine."""

    def __init__(self, member: MemberNode, engine: Engine, folder: Path, address: str) -> None:
        self.member = member
        self.engine = engine
        self.folder = folder
        self.address = address
        self.running: asyncio.Task[None]

    @property
    def name(self) -> str:
        return node_id(Identity.load(self.folder / "node.identity").public_key)


@asynccontextmanager
async def real_node(
    folder: Path,
    to: Gateway | str,
    invite: Invite | None = None,
    *,
    address: str = "",
    farewell: bool = True,
    listen: bool = True,
) -> AsyncIterator[RealNode]:
    """A node of `folder`, running. With an `address` of `https` or `http` it listens on a port of its own.

    Where it is not told to `listen` there, it does as it does by default.
    """
    engine = Engine()
    if address in ("https", "http"):
        address = f"{address}://127.0.0.1:{free_port()}"
    settings = NodeSettings(
        gateway=to if isinstance(to, str) else to.url,
        join=invite.text if invite else "",
        address=address,
        listen=address.partition("://")[2] if listen else "",
        country="de",
        price=5,
        data_dir=folder,
    )
    member = MemberNode(settings, engine, engine, BodyBudget(10**8), lambda: None)  # type: ignore[arg-type]
    await member.listen()
    node = RealNode(member, engine, folder, address)
    node.running = asyncio.create_task(member.run())
    try:
        yield node
    finally:
        node.running.cancel()
        await asyncio.gather(node.running, return_exceptions=True)
        if not farewell:
            member._joining._signer = None
        await member.stop(0.1)


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def somebody(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Somebody on a port, who says what the script says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            await script(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on what comes, until its end."""
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()


def relay_to(address: str, *, after: asyncio.Event | None = None, reached: asyncio.Event | None = None) -> Script:
    """Hand everything on to an address, `after` that was set."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if reached is not None:
            reached.set()
        if after is not None:
            await after.wait()
        there, to_there = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        await asyncio.gather(pipe(reader, to_there), pipe(there, writer))

    return script


class Applicant:
    """A node written by hand. It has an identity, a certificate, and what was agreed when it was last admitted."""

    def __init__(self, at: Gateway, folder: Path, name: str = "applicant") -> None:
        self.gateway = at
        self.identity = Identity.load(folder / f"{name}.identity")
        self.node_id = node_id(self.identity.public_key)
        files = folder / f"{name}.key", folder / f"{name}.cert"
        make_certificate(*files)
        self.certificate = der(files[1])
        self.tls = server_context(files[1], files[0])
        self.receipts = ReceiptLog(folder / f"{name}.receipts")
        self.engine = Engine()
        self.welcome: Welcome
        self.sessions: Sessions
        self.signer: RequestSigner
        self.door: SignedApi
        self.address = ""  # where its door is

    async def greeting(self) -> Greeting:
        reply = await send(self.gateway.port, request("GET", "/v1/nodes", key=None, content_type=None))
        return msgspec.json.decode(reply.body, type=Greeting)

    def statement(self, half: Ephemeral | None = None, /, **changes: Any) -> Statement:
        """A good one, but for the changes."""
        members: dict[str, Any] = {
            "version": 1,
            "public_key": self.identity.public_key,
            "address": "",
            "certificate": b"",
            "country": "DE",
            "offers": tuple(
                Offer(one.id, one.width, one.max_tokens, one.digest, one.tier, 5) for one in CATALOGUE.models
            ),
            "inputs_max": REQUEST_INPUTS_MAX,
            "ephemeral": (half or Ephemeral()).public,
            "nonce": self.gateway.nonces.make(self.gateway.clock.unix_ms() // 1000),
            "time_ms": self.gateway.clock.unix_ms(),
        }
        return Statement(**members | changes)

    def signed_by_it(self, statement: bytes, invite: Invite | None, by: Identity | None = None) -> Registration:
        """A registration of this statement, whatever it says; `by` may be another identity."""
        return Registration(
            statement,
            (by or self.identity).sign(STATEMENT, statement),
            invite.invite_id if invite else None,
            proof(invite.secret, statement) if invite else None,
        )

    async def registration(
        self,
        invite: Invite | None = None,
        *,
        signed_by: Identity | None = None,
        statement: bytes | None = None,
        **changes: Any,
    ) -> tuple[Registration, Ephemeral]:
        """A good registration, but for the changes."""
        ephemeral = Ephemeral()
        nonce = {"nonce": (await self.greeting()).nonce}
        statement = statement or msgspec.json.encode(self.statement(ephemeral, **nonce | changes))
        return self.signed_by_it(statement, invite, signed_by), ephemeral

    async def post(self, asked: Registration) -> Raw:
        return await send(self.gateway.port, request("POST", "/v1/nodes", msgspec.json.encode(asked), key=None))

    async def ask(self, invite: Invite | None = None, **changes: Any) -> Raw:
        """The gateway's answer to a registration."""
        return await self.post((await self.registration(invite, **changes))[0])

    async def join(self, invite: Invite | None = None, *, tell_door: bool = True, **changes: Any) -> Welcome:
        """Be admitted. Where `tell_door` is not set the door does not know of the new session yet."""
        asked, ephemeral = await self.registration(invite, **changes)
        reply = await self.post(asked)
        assert reply.status == 200, reply.body
        self.welcome = msgspec.json.decode(reply.body, type=Welcome)
        if self.welcome.standing == "admitted":
            agreed = transcript(
                node_public=ephemeral.public,
                gateway_public=self.welcome.ephemeral,
                node_id=self.node_id,
                gateway_public_key=self.gateway.identity.public_key,
                nonce=msgspec.json.decode(asked.statement, type=Statement).nonce,
            )
            self.sessions = ephemeral.agree(self.welcome.ephemeral, agreed)
            self.signer = RequestSigner(self.sessions.of_node, self.node_id, "00112233445566ff")
            if tell_door and hasattr(self, "door"):
                self.door.new_session(self.sessions.of_gateway)
        return self.welcome

    def signed(self, method: str, path: str, body: bytes, signer: RequestSigner | None = None) -> bytes:
        """A whole request under the session."""
        now_s = self.gateway.clock.unix_ms() // 1000
        headers = (signer or self.signer).sign(method, path, body, "nrq_1", now_s).headers
        lines = f"{method} {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n".encode()
        return lines + headers + f"Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def say(self, what: str, body: object = None) -> Raw:
        """A heartbeat or a farewell, signed."""
        path = f"/v1/nodes/{self.node_id}/{what}"
        encoded = body if isinstance(body, bytes) else b"{}" if body is None else msgspec.json.encode(body)
        return await send(self.gateway.port, self.signed("POST", path, encoded))

    @asynccontextmanager
    async def listening(
        self, *, plain: bool = False, host: str = "127.0.0.1", port: int = 0, **believes: str
    ) -> AsyncIterator[str]:
        """Its door, open at an address. `believes` may name another address or gateway than the true one."""
        sock = socket.create_server((host, port))
        sock.setblocking(False)
        self.address = address = f"{'http' if plain else 'https'}://{host}:{sock.getsockname()[1]}"
        self.door = SignedApi(
            app=self.engine,  # type: ignore[arg-type]
            bodies=BodyBudget(10**8),
            identity=self.identity,
            gateway=believes.get("gateway", self.gateway.fingerprint),
            address=believes.get("address", address),
            receipts=self.receipts,
            clock=self.gateway.clock,
        )
        server = HttpServer(self.door.routes())
        await server.start(sock, None if plain else self.tls)
        try:
            yield address
        finally:
            await server.drain(0.1)

    @property
    def place(self) -> dict[str, Any]:
        """What it registers of where it is."""
        return {"address": self.address, "certificate": self.certificate if self.address.startswith("https") else b""}

    def believe(self, address: str) -> None:
        """Its door is known by another address from now on."""
        self.address = self.door.address = address

    @asynccontextmanager
    async def member(self) -> AsyncIterator[Node]:
        """It listens at an https address, was invited and admitted, and gets work."""
        async with self.listening():
            await self.join(await self.gateway.invite(), **self.place)
            yield await self.gateway.until_ready(self.node_id)
