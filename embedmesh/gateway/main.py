"""Composition root of a gateway: the only place that builds its things and knows them all."""

import asyncio
import contextlib
import functools
import logging
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from embedmesh.catalogue import Catalogue, load_catalogue
from embedmesh.engine.cl100k import Cl100k
from embedmesh.engine.folder import read_folder
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.fleet.addresses import Policy, system_lookup
from embedmesh.fleet.canary import Canaries
from embedmesh.fleet.choose import POLICIES
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
from embedmesh.gateway.api.accounts_api import AccountsApi
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.fleet_api import FleetApi
from embedmesh.gateway.api.invites_api import InvitesApi
from embedmesh.gateway.api.keys_api import KeysApi
from embedmesh.gateway.api.ledger_api import LedgerApi
from embedmesh.gateway.api.nodes_api import NodesApi
from embedmesh.gateway.api.prices_api import PricesApi
from embedmesh.gateway.api.worker_metrics import WorkerMetrics
from embedmesh.gateway.nodes.coalesce import CoalescingLink
from embedmesh.gateway.nodes.http1 import unix_dialler
from embedmesh.gateway.nodes.own import NodeClients, OwnLink
from embedmesh.gateway.nodes.registration import Registrar
from embedmesh.gateway.nodes.roster import Members
from embedmesh.http.bodies import SMALL_BODIES_BYTES_TOTAL_MAX
from embedmesh.http.connections import Origins
from embedmesh.http.cors import Cors
from embedmesh.http.receive import BodyBudget
from embedmesh.process import (
    EXIT_AGAIN,
    EXIT_OK,
    EXIT_SETUP,
    beyond_loopback,
    bind,
    give_memory_back,
    log_to_stderr,
    quieten_gc,
    raise_file_limit,
    stop_event,
)
from embedmesh.provision.assets import assets_dir, find_cl100k
from embedmesh.provision.bootstrap import key_defaults, open_books
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError, StoreAway, StoreUnavailable
from embedmesh.rules.limits import LEDGER_CHECK_S, LEDGER_CHECKS_MAX
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Tokenizer
from embedmesh.rules.shares import Shares
from embedmesh.settings import GatewaySettings, secret_path, store_place
from embedmesh.signing.identity import Identity, fingerprint
from embedmesh.signing.nonces import Nonces
from embedmesh.storage.books.new_keys import NewKeys
from embedmesh.storage.cached.changes import NODES
from embedmesh.storage.secrets.secret import claim_of, hash_user, load_secret
from embedmesh.storage.store import Store
from embedmesh.storage.upkeep import Retention

log = logging.getLogger("embedmesh.gateway")

UNIX = "unix:"
IDENTITY = b"embedmesh gateway identity"  # what of the key secret the gateway's identity is
READY_S, READY_LOOK_S = 1.0, 0.01  # a node that runs answers its first probe within milliseconds
DRAIN_S = 30.0  # as long as an ordinary request may take
EXIT_SOFTWARE = 70  # EX_SOFTWARE: an fsync failed, or a bug of ours: start anew and verify


def main(settings: GatewaySettings) -> int:
    """Run a gateway until it is told to stop. Returns the exit code."""
    log_to_stderr()
    raise_file_limit()
    give_memory_back()
    try:
        return uvloop.run(_run(settings))
    except SetupError as error:
        print(f"embedmesh gateway: {error}", file=sys.stderr)  # noqa: T201 - a line for the person who started us
        return EXIT_AGAIN if isinstance(error, StoreAway) else EXIT_SETUP


async def _run(settings: GatewaySettings) -> int:
    clock = SystemClock()
    stop = stop_event(settings.lifeline_fd)
    listener = listening_socket(settings)
    new_keys = NewKeys(key_defaults(settings), beyond_loopback(listener.getsockname()[0]))
    catalogue = load_catalogue(settings.catalogue, assets=assets_dir())
    tokenizers = tokenizers_of(catalogue)
    exit_code = EXIT_OK

    def store_lost(reason: str) -> None:
        nonlocal exit_code
        log.critical("the store is lost (%s): nothing more is acknowledged; starting anew", reason)
        exit_code = EXIT_SOFTWARE
        stop.set()

    opening = asyncio.create_task(
        Store.open(
            store_place(settings),
            folder=settings.data_dir,
            clock=clock,
            secret=functools.partial(load_secret, secret_path(settings.data_dir)),
            retention=Retention(usage_days=settings.keep_usage_days),
            on_fatal=store_lost,
        )
    )
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([opening, stopped], return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():  # told to stop while another gateway is alone with the store
        opening.cancel()
        stopped.cancel()
        await asyncio.gather(opening, stopped, return_exceptions=True)
        return EXIT_OK
    store = opening.result()
    secret = store.key_secret
    ranks = find_cl100k()
    registry = Registry(clock)
    policy = POLICIES[settings.policy]
    line = Scheduler(
        registry, clock, random.Random(), asyncio.get_running_loop().call_later, policy=policy, hedge=settings.hedge
    )
    clients = NodeClients()
    origins = trusted_origins(settings.trusted_proxies)
    identity = Identity.from_seed(secret, IDENTITY)
    gateway_fingerprint = fingerprint(identity.public_key)
    normal = normalizing_models(catalogue)
    members = Members(
        store.nodes,
        registry,
        clients,
        catalogue,
        tokenizers,
        clock,
        verify,
        gateway_fingerprint,
        normal,
        upstream_probe_s=settings.upstream_probe_s,
    )
    canaries = Canaries(
        registry, line, clients, catalogue, tokenizers, clock, random.Random(), verify, on_readmit=members.readmitted
    )
    members.prove = canaries.prove
    bodies = BodyBudget(settings.body_bytes_total_max)
    registrar = Registrar(
        identity, Nonces(secret), store.nodes, members, node_policy(settings.node_networks), system_lookup, clock
    )
    opening_books = functools.partial(open_books, settings.data_dir, store_place(settings))
    books = BooksThread(opening_books)
    callers_books = BooksThread(opening_books, first=books)
    checks = BooksThread(opening_books, answer_s=LEDGER_CHECK_S, waiting_max=LEDGER_CHECKS_MAX)
    admin_bodies, account_bodies = BodyBudget(SMALL_BODIES_BYTES_TOTAL_MAX), BodyBudget(SMALL_BODIES_BYTES_TOTAL_MAX)
    apis = [
        NodesApi(registrar, members, registry, store.nodes, clock, origins),
        AccountApi(callers_books, account_bodies, clock, catalogue),
        FleetApi(members, registry, admin_bodies, clock, catalogue),
        InvitesApi(store.nodes, admin_bodies, clock, identity.public_key),
        AccountsApi(books, admin_bodies),
        KeysApi(books, admin_bodies, clock, catalogue),
        PricesApi(books, admin_bodies, catalogue),
        LedgerApi(books, checks, admin_bodies),
    ]
    replies = Shares(settings.reply_bytes_total_max)
    world = World(
        keys=store.keys,
        rate_limits=store.rate_limits,
        prices=store.prices,
        catalogue=catalogue,
        tokenizers=tokenizers,
        cl100k=Cl100k(ranks) if ranks is not None else None,
        ledger=store,
        fleet=line,
        client=clients,
        observer=canaries,
        clock=clock,
        single_flight=SingleFlight(give_up, replies),
        unread=Unread(asyncio.get_running_loop().call_later),
        replies=replies,
        cache=VectorCache(settings.cache_bytes_max, registry.generation),
        hash_user=functools.partial(hash_user, secret),
        claim_of=functools.partial(claim_of, secret),
        terms=Terms(
            lambda model: bool(registry.ready(model.id)), normal, ignore_unknown=settings.unknown_members == "ignore"
        ),
        ask_max=settings.ask_max,
    )
    workers = WorkerMetrics(settings.metrics_file) if settings.metrics_file else None
    app = GatewayApp(
        world,
        registry,
        in_flight_max=settings.in_flight_max,
        bodies=bodies,
        gauges=lambda: gauges(store, line, world.cache) | {"reply_bytes": replies.taken},
        more=apis,
        workers=workers,
        cors=allowed_origins(settings.cors_origin),
        origins=origins,
    )
    background: list[asyncio.Future[Any]] = [
        asyncio.create_task(expire(store, clock)),
        *(asyncio.ensure_future(each) for each in store.background()),
        asyncio.create_task(canaries.run()),
        members.broken,
    ]
    if workers is not None:
        background.append(asyncio.create_task(workers.keep(app.metrics.registry)))
    for number, address in enumerate(settings.nodes):
        if not address.startswith(UNIX):
            raise SetupError(f"{address} is no address of a node: use unix:/path/to/socket. Mend --nodes.")
        node_id = "local" if len(settings.nodes) == 1 else f"local-{number}"
        clients.add(node_id, CoalescingLink(OwnLink(unix_dialler(address.removeprefix(UNIX)), clock)))
        node = registry.add(Node(node_id, address, trusted=True, load=Load(interleaves=True)))
        prober = Prober(node, registry, catalogue, tokenizers, clients, clock, verify)
        background.append(asyncio.create_task(prober.run()))
    store.topics.on(NODES, members.changed_elsewhere)
    try:
        await books.ask(lambda books: books.new_keys.write(new_keys))
        await members.start()
    except StoreUnavailable as error:
        raise StoreAway(error.message) from None
    if settings.nodes:
        await until_ready(registry)
    await app.server.start(listener)
    quieten_gc()
    log.info("gateway listens on port %d", listener.getsockname()[1])

    await asyncio.wait([stopped, *background], return_when=asyncio.FIRST_COMPLETED)
    if not stopped.done():  # nothing of these ends by itself
        broken = next(task for task in background if task.done())
        log.critical("a background task ended (%s); starting anew", type(broken.exception()).__name__)
        exit_code = EXIT_SOFTWARE
    log.info("gateway drains")
    await app.server.drain(DRAIN_S if exit_code == EXIT_OK else 0.0)
    for task in (stopped, *background):
        task.cancel()
    await asyncio.gather(stopped, *background, return_exceptions=True)
    await world.single_flight.stop()
    await canaries.stop()
    await members.stop()
    await asyncio.gather(books.close(), callers_books.close(), checks.close())
    await store.close()
    clients.close()
    return exit_code


async def until_ready(registry: Registry) -> None:
    """Callers who wait to be let in are better off than callers who are told that no node is ready; for a moment."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_S):
            while not any(node.state is NodeState.READY for node in registry):  # noqa: ASYNC110 - probes tell nobody
                await asyncio.sleep(READY_LOOK_S)


def node_policy(networks: Sequence[str]) -> Policy:
    """Which addresses nodes may have. Raises SetupError."""
    try:
        return Policy(networks)
    except ValueError as error:
        raise SetupError(f"{error} Mend --node-networks.") from None


def allowed_origins(origins: Sequence[str]) -> Cors | None:
    """Which pages may call the API. Raises SetupError."""
    try:
        return Cors(origins) if origins else None
    except ValueError as error:
        raise SetupError(f"{error} Mend --cors-origin.") from None


def trusted_origins(proxies: Sequence[str]) -> Origins:
    """Who is behind which connection. Raises SetupError."""
    try:
        return Origins(proxies)
    except ValueError as error:
        raise SetupError(f"{error}. Mend --trusted-proxies.") from None


def listening_socket(settings: GatewaySettings) -> socket.socket:
    """The inherited socket, or a new one. Raises SetupError when the port is taken."""
    if settings.listen_fd is not None:
        return socket.socket(fileno=settings.listen_fd)
    return bind(settings.host, settings.port)


def tokenizers_of(catalogue: Catalogue) -> dict[str, Tokenizer]:
    """Each model's own tokenizer, by model id. Raises SetupError for a folder without one and a prompt without end."""
    tokenizers: dict[str, Tokenizer] = {}
    by_folder: dict[tuple[str, int], Tokenizer] = {}  # the tiers of a model share one
    for model in catalogue.models:
        if model.foreign:
            continue
        tokenizer = by_folder.get((model.folder, model.max_tokens))
        if tokenizer is None:
            tokenizer = made = ModelTokenizer(Path(model.folder), model.max_tokens)
            made.prepare()
            by_folder[model.folder, model.max_tokens] = tokenizer
        for role, prompt in model.prompts.items():
            if len(tokenizer.ids([prompt])[0]) + tokenizer.specials >= model.max_tokens:
                raise SetupError(f"The prompt `{role}` of {model.id} leaves no room for a text. Mend the catalogue.")
        tokenizers[model.id] = tokenizer
    return tokenizers


def normalizing_models(catalogue: Catalogue) -> frozenset[str]:
    """The models whose folders say that their vectors have unit length."""
    here = [model for model in catalogue.models if not model.foreign]
    return frozenset(model.id for model in here if read_folder(Path(model.folder)).normalize)


def gauges(store: Store, line: Scheduler, cache: VectorCache) -> dict[str, float]:
    """What /metrics shows of the store, the nodes and the cache."""
    values = {f"store_{name}": float(value) for name, value in msgspec.structs.asdict(store.stats).items()}
    values["nodes_ready"] = sum(node.state.value == "ready" for node in line.registry)
    values["tokens_outstanding"] = sum(node.load.tokens for node in line.registry)
    values["tokens_waiting"] = line.waiting_tokens
    values |= {"cache_bytes": cache.bytes, "cache_hits": cache.hits, "cache_misses": cache.misses}
    return values
