"""Composition root of a gateway: `build` makes its parts, `run` serves with them, `stop` closes them."""

import asyncio
import contextlib
import functools
import logging
import random
import socket
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import uvloop

from embedmesh.engine.cl100k import Cl100k
from embedmesh.fleet.addresses import system_lookup
from embedmesh.fleet.canary import Canaries
from embedmesh.fleet.choose import POLICIES
from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.load import Load
from embedmesh.fleet.probe import Prober
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.again import SingleFlight, Unread
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.expire import expire
from embedmesh.flow.handle import World, give_up
from embedmesh.flow.validate import Terms
from embedmesh.flow.verify import verify
from embedmesh.gateway.api.account_api import AccountApi
from embedmesh.gateway.api.admin_api import AdminApi
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.callers import for_admins
from embedmesh.gateway.api.keys_api import KeysApi
from embedmesh.gateway.api.money_api import CHECK_S, CHECKS_MAX, MoneyApi
from embedmesh.gateway.api.nodes_api import NodesApi
from embedmesh.gateway.api.worker_metrics import WorkerMetrics
from embedmesh.gateway.models import Models, load_models
from embedmesh.gateway.network import allowed_origins, listening_socket, node_policy, socket_path, trusted_origins
from embedmesh.gateway.nodes.coalesce import CoalescingLink
from embedmesh.gateway.nodes.connected import ConnectedNodes
from embedmesh.gateway.nodes.own import NodeClients, OwnLink
from embedmesh.gateway.nodes.pools import unix_pool
from embedmesh.gateway.nodes.registration import Registrar
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.http.bodies import SMALL_BYTES_TOTAL_MAX
from embedmesh.http.connections import Origins
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import Routes
from embedmesh.process import (
    EXIT_AGAIN,
    EXIT_OK,
    EXIT_SETUP,
    beyond_loopback,
    give_memory_back,
    log_to_stderr,
    quieten_gc,
    raise_file_limit,
    stop_event,
)
from embedmesh.provision.assets import find_cl100k
from embedmesh.provision.bootstrap import key_defaults, open_books
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError, StoreAway, StoreUnavailable
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Clock
from embedmesh.rules.shares import Shares
from embedmesh.settings import GatewaySettings, secret_path, store_place
from embedmesh.signing.identity import Identity, fingerprint
from embedmesh.signing.nonces import Nonces
from embedmesh.storage.books.new_keys import NewKeys
from embedmesh.storage.secrets.secret import claim_of, hash_user, load_secret
from embedmesh.storage.store import Store
from embedmesh.storage.upkeep import Retention

log = logging.getLogger("embedmesh.gateway")

IDENTITY = b"embedmesh gateway identity"  # derives the gateway's identity from the key secret
FIRST_NODE_S, FIRST_NODE_LOOK_S = 1.0, 0.01  # a running node answers its first probe within milliseconds
GATEWAY_DRAIN_S = 30.0  # as long as an ordinary request may take
EXIT_SOFTWARE = 70  # EX_SOFTWARE: an fsync failed, or a bug of ours: start anew and verify


class Ending:
    """Why the gateway ends: `exit_code` is set before `told` is."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.exit_code = EXIT_OK
        self.told = stop_event(settings.lifeline_fd)

    def store_lost(self, reason: str) -> None:
        """The disk can no longer be trusted."""
        log.critical("the store is lost (%s): nothing more is acknowledged; starting anew", reason)
        self.exit_code = EXIT_SOFTWARE
        self.told.set()


@dataclass(frozen=True)
class FleetParts:
    """The nodes of a gateway."""

    registry: Registry
    scheduler: Scheduler
    clients: NodeClients
    examiner: Examiner
    canaries: Canaries
    connected: ConnectedNodes
    roster: Roster
    identity: Identity


@dataclass(frozen=True)
class BooksThreads:
    """Threads for the operators' and accounts' queries of the store."""

    operators: BooksThread
    accounts: BooksThread
    checks: BooksThread


@dataclass(frozen=True)
class Gateway:
    """All parts of a gateway."""

    store: Store
    fleet: FleetParts
    books: BooksThreads
    world: World
    app: GatewayApp
    background: Sequence[Awaitable[Any]]  # run as long as the gateway does; none of them ends by itself


def main(settings: GatewaySettings) -> int:
    """Run a gateway until it is told to stop. Returns the exit code."""
    log_to_stderr()
    raise_file_limit()
    give_memory_back()
    try:
        return uvloop.run(_live(settings))
    except SetupError as error:
        print(f"embedmesh gateway: {error}", file=sys.stderr)  # noqa: T201 - a line for the person who started us
        return EXIT_AGAIN if isinstance(error, StoreAway) else EXIT_SETUP


async def _live(settings: GatewaySettings) -> int:
    clock = SystemClock()
    ending = Ending(settings)
    listener = listening_socket(settings)
    new_keys = NewKeys(key_defaults(settings), beyond_loopback(listener.getsockname()[0]))
    models = load_models(settings.catalogue)
    store = await open_store(settings, clock, ending)
    if store is None:
        return EXIT_OK
    gateway = build(settings, models, store, clock)
    tasks = await run(gateway, listener, new_keys, ending, local_nodes=bool(settings.nodes))
    await stop(gateway, tasks, drain_s=GATEWAY_DRAIN_S if ending.exit_code == EXIT_OK else 0.0)
    return ending.exit_code


async def open_store(settings: GatewaySettings, clock: Clock, ending: Ending) -> Store | None:
    """The store; None if told to stop while another gateway holds it. Raises SetupError."""
    opening = asyncio.create_task(
        Store.open(
            store_place(settings),
            folder=settings.data_dir,
            clock=clock,
            secret=functools.partial(load_secret, secret_path(settings.data_dir)),
            retention=Retention(usage_days=settings.keep_usage_days),
            on_fatal=ending.store_lost,
        )
    )
    told = asyncio.create_task(ending.told.wait())
    await asyncio.wait([opening, told], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if opening.done():
        return opening.result()
    opening.cancel()
    await asyncio.gather(opening, told, return_exceptions=True)
    return None


# -- build


def build(settings: GatewaySettings, models: Models, store: Store, clock: Clock) -> Gateway:
    """Make all parts, on the running event loop. Raises SetupError."""
    origins = trusted_origins(settings.trusted_proxies)
    fleet = _fleet(settings, models, store, clock)
    probers = _local_nodes(settings, fleet, clock)
    world = _world(settings, models, store, fleet, clock)
    opening = functools.partial(open_books, settings.data_dir, store_place(settings))
    operators = BooksThread(opening)
    books = BooksThreads(
        operators,
        accounts=BooksThread(opening, first=operators),
        checks=BooksThread(opening, answer_s=CHECK_S, waiting_max=CHECKS_MAX),
    )
    workers = WorkerMetrics(settings.metrics_file) if settings.metrics_file else None
    app = GatewayApp(
        world,
        fleet.registry,
        in_flight_max=settings.in_flight_max,
        bodies=BodyBudget(settings.body_bytes_total_max),
        gauges=lambda: _gauges(store, fleet.scheduler, world),
        more=_apis(settings, models, store, fleet, books, origins, clock),
        workers=workers,
        cors=allowed_origins(settings.cors_origin),
        origins=origins,
    )
    background = [expire(store, clock), *store.background(), fleet.canaries.run(), fleet.connected.broken]
    background += [prober.run() for prober in probers]
    if workers is not None:
        background.append(workers.keep(app.metrics.registry))
    return Gateway(store, fleet, books, world, app, background)


def _fleet(settings: GatewaySettings, models: Models, store: Store, clock: Clock) -> FleetParts:
    registry = Registry(clock)
    scheduler = Scheduler(
        registry,
        clock,
        random.Random(),
        asyncio.get_running_loop().call_later,
        policy=POLICIES[settings.policy],
        hedge=settings.hedge,
    )
    clients = NodeClients()
    identity = Identity.from_seed(store.key_secret, IDENTITY)
    examiner = Examiner(registry, clients, models.catalogue, models.tokenizers, clock, verify)
    canaries = Canaries(examiner, scheduler, random.Random())
    connected = ConnectedNodes(
        examiner,
        clients,
        fingerprint(identity.public_key),
        canaries.prove,
        normalizing=models.normalizing,
        upstream_probe_s=settings.upstream_probe_s,
    )
    roster = Roster(store.nodes, connected, registry, clock, store.topics)
    return FleetParts(registry, scheduler, clients, examiner, canaries, connected, roster, identity)


def _local_nodes(settings: GatewaySettings, fleet: FleetParts, clock: Clock) -> list[Prober]:
    """Add the nodes of --nodes. Raises SetupError."""
    probers = []
    for number, address in enumerate(settings.nodes):
        node_id = "local" if len(settings.nodes) == 1 else f"local-{number}"
        fleet.clients.add(node_id, CoalescingLink(OwnLink(unix_pool(socket_path(address)), clock)))
        node = fleet.registry.add(Node(node_id, address, trusted=True, load=Load(interleaves=True)))
        probers.append(Prober(node, fleet.examiner))
    return probers


def _world(settings: GatewaySettings, models: Models, store: Store, fleet: FleetParts, clock: Clock) -> World:
    ranks = find_cl100k()
    replies = Shares(settings.reply_bytes_total_max)
    return World(
        keys=store.keys,
        rate_limits=store.rate_limits,
        prices=store.prices,
        catalogue=models.catalogue,
        tokenizers=models.tokenizers,
        cl100k=Cl100k(ranks) if ranks is not None else None,
        ledger=store,
        fleet=fleet.scheduler,
        client=fleet.clients,
        observer=fleet.canaries,
        clock=clock,
        single_flight=SingleFlight(give_up, replies),
        unread=Unread(asyncio.get_running_loop().call_later),
        replies=replies,
        cache=VectorCache(settings.cache_bytes_max, fleet.registry.generation),
        hash_user=functools.partial(hash_user, store.key_secret),
        claim_of=functools.partial(claim_of, store.key_secret),
        terms=Terms(
            lambda model: bool(fleet.registry.ready(model.id)),
            models.normalizing,
            ignore_unknown=settings.unknown_members == "ignore",
        ),
        ask_max=settings.ask_max,
    )


def _apis(
    settings: GatewaySettings,
    models: Models,
    store: Store,
    fleet: FleetParts,
    books: BooksThreads,
    origins: Origins,
    clock: Clock,
) -> list[Routes]:
    """The routes of nodes, accounts and operators."""
    roster, registry, catalogue = fleet.roster, fleet.registry, models.catalogue
    policy, nonces = node_policy(settings.node_networks), Nonces(store.key_secret)
    registrar = Registrar(fleet.identity, nonces, store.nodes, roster, policy, system_lookup, clock)
    bodies, account_bodies = BodyBudget(SMALL_BYTES_TOTAL_MAX), BodyBudget(SMALL_BYTES_TOTAL_MAX)
    operators = (
        AdminApi(roster, registry, store.nodes, bodies, clock, catalogue, fleet.identity.public_key),
        KeysApi(books.operators, bodies, clock, catalogue),
        MoneyApi(books.operators, books.checks, bodies, catalogue),
    )
    return [
        NodesApi(registrar, roster, registry, store.nodes, clock, origins).routes(),
        AccountApi(store.keys, store.rate_limits, books.accounts, account_bodies, clock, catalogue).routes(),
        *(for_admins(store.keys, api.routes()) for api in operators),
    ]


def _gauges(store: Store, scheduler: Scheduler, world: World) -> dict[str, float]:
    """What /metrics shows of the store, the nodes, the cache and the replies."""
    values = {f"store_{name}": float(value) for name, value in msgspec.structs.asdict(store.stats).items()}
    values["nodes_ready"] = sum(node.state is NodeState.READY for node in scheduler.registry)
    values["tokens_outstanding"] = sum(node.load.tokens for node in scheduler.registry)
    values["tokens_waiting"] = scheduler.queued_tokens
    values |= {"cache_bytes": world.cache.bytes, "cache_hits": world.cache.hits, "cache_misses": world.cache.misses}
    return values | {"reply_bytes": world.replies.taken}


# -- run


async def run(
    gateway: Gateway, listener: socket.socket, new_keys: NewKeys, ending: Ending, *, local_nodes: bool
) -> list[asyncio.Future[Any]]:
    """Serve until told to stop, or until a background task ends. Returns all background tasks. Raises StoreAway."""
    told = asyncio.create_task(ending.told.wait())
    background = [asyncio.ensure_future(each) for each in gateway.background]
    try:
        await gateway.books.operators.ask(lambda books: books.new_keys.write(new_keys))
        await gateway.fleet.roster.reload()
    except StoreUnavailable as error:
        raise StoreAway(error.message) from None
    if local_nodes:
        await until_ready(gateway.fleet.registry)
    await gateway.app.server.start(listener)
    quieten_gc()
    log.info("gateway listens on port %d", listener.getsockname()[1])
    await asyncio.wait([told, *background], return_when=asyncio.FIRST_COMPLETED)
    if not told.done():
        broken = next(task for task in background if task.done())
        log.critical("a background task ended (%s); starting anew", type(broken.exception()).__name__)
        ending.exit_code = EXIT_SOFTWARE
    return [told, *background]


async def until_ready(registry: Registry) -> None:
    """Wait a moment for a node: callers' connections wait, too, instead of getting a 503."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_NODE_S):
            while not any(node.state is NodeState.READY for node in registry):  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(FIRST_NODE_LOOK_S)


# -- stop


async def stop(gateway: Gateway, tasks: list[asyncio.Future[Any]], *, drain_s: float) -> None:
    """Drain the server, end the background tasks, and close all parts."""
    log.info("gateway drains")
    await gateway.app.server.drain(drain_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await gateway.world.single_flight.stop()
    await gateway.fleet.canaries.stop()
    await gateway.fleet.connected.stop()
    await gateway.fleet.roster.stop()
    books = gateway.books
    await asyncio.gather(books.operators.close(), books.accounts.close(), books.checks.close())
    await gateway.store.close()
    gateway.fleet.clients.close()
