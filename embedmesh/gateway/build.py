"""The parts of a gateway, and how they are put together: whatever a part needs it gets when it is constructed."""

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec

from embedmesh.engine.cl100k import Cl100k
from embedmesh.fleet.addresses import Policy, system_lookup
from embedmesh.fleet.canary import Canaries
from embedmesh.fleet.choose import POLICIES
from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.leftover import Leftover
from embedmesh.fleet.load import Load
from embedmesh.fleet.probe import Prober
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.cache import VectorCache
from embedmesh.flow.deliver import Done
from embedmesh.flow.expire import expire
from embedmesh.flow.leases import Leases
from embedmesh.flow.operation import Operation
from embedmesh.flow.retries import SingleFlight, Unread
from embedmesh.flow.traced import TracedBatchOperation
from embedmesh.flow.traced_nodes import RequestTracing, TracedNode
from embedmesh.flow.verify import verify
from embedmesh.flow.world import World
from embedmesh.gateway.api.account_api import AccountApi
from embedmesh.gateway.api.accounts_api import AccountsApi
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.audit_api import AuditApi
from embedmesh.gateway.api.batches_api import BatchesApi
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.embeddings_api import EMBEDDINGS
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
from embedmesh.gateway.api.routes import Api, OperatorAccess
from embedmesh.gateway.api.worker_metrics import WorkerMetrics
from embedmesh.gateway.models import Models
from embedmesh.gateway.network import UNIX, node_sockets, parsed, sign_in
from embedmesh.gateway.nodes.coalesce import CoalescingLink
from embedmesh.gateway.nodes.connected import ConnectedNodes
from embedmesh.gateway.nodes.links import NodeClients
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.gateway.nodes.registration import Registrar
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.gateway.nodes.sealed import SealingNodes
from embedmesh.gateway.nodes.sealed_generation import Sidecars
from embedmesh.gateway.nodes.traced import TracedOwnLink, TracedServer
from embedmesh.gateway.parts import Adjustable, BooksThreads, FleetParts, Gateway, JobParts
from embedmesh.http.bodies import SMALL_BODIES_BYTES_TOTAL_MAX
from embedmesh.http.connections import Origins
from embedmesh.http.cors import Cors
from embedmesh.http.paths import EMBEDDINGS_PATH
from embedmesh.http.receive import BodyBudget
from embedmesh.http.tls import Certificate
from embedmesh.jobs.endpoints import prices_now, token_price, world_of_lines
from embedmesh.jobs.files import FileBounds, FileStore
from embedmesh.jobs.runner import Runner
from embedmesh.jobs.validate import BatchTerms
from embedmesh.jobs.work import as_it_is
from embedmesh.logs.access import access_log
from embedmesh.logs.setup import dropped_lines
from embedmesh.logs.writer import LogWriter
from embedmesh.otlp import tracing_of
from embedmesh.provision.assets import find_cl100k
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.limits import LEDGER_CHECK_S, LEDGER_CHECKS_MAX
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.rules.served import ParseTerms
from embedmesh.rules.shares import Shares
from embedmesh.rules.traces import Tracing
from embedmesh.settings import GatewaySettings, files_place, store_dsn
from embedmesh.signing.identity import Identity, fingerprint
from embedmesh.signing.nonces import Nonces
from embedmesh.storage.secrets.secret import claim_of, hash_user
from embedmesh.storage.store import Store
from embedmesh.upstream.pools import unix_pool
from embedmesh.upstream.server import UpstreamServer

IDENTITY = b"embedmesh gateway identity"  # derives the gateway's identity from the key secret


def build(
    settings: GatewaySettings,
    models: Models,
    store: Store,
    clock: Clock,
    certificate: Certificate | None = None,
    writer: LogWriter | None = None,
) -> Gateway:
    """Make all parts, on the running event loop. The access log, if it is on, goes to `writer`. Raises SetupError."""
    adjustable = Adjustable(
        models,
        parsed(Origins, settings.trusted_proxies, "--trusted-proxies"),
        parsed(Policy, settings.node_networks, "--node-networks"),
        ReloadRequests(),
    )
    origins, requests = adjustable.origins, adjustable.requests
    store.changes.on("settings", requests.knock)
    tracing = tracing_of(settings.traces, settings.traces_a_second, "embedmesh-gateway")
    fleet = _fleet(settings, models, store, clock)
    traced = None if tracing is None else RequestTracing(tracing, functools.partial(_node_of, fleet), clock.monotonic)
    probers = _local_nodes(settings, fleet, clock)
    world = _world(settings, models, store, fleet, clock)
    opening = functools.partial(open_books, settings.data_dir, store_dsn(settings), for_others=True)
    operators = BooksThread(opening)
    books = BooksThreads(
        operators,
        accounts=BooksThread(opening, first=operators),
        checks=BooksThread(opening, answer_s=LEDGER_CHECK_S, waiting_max=LEDGER_CHECKS_MAX),
    )
    leases = Leases(store, clock)
    jobs = _jobs(
        settings, store, fleet, world, leases, models.known, traced, on_bug=lambda: app.metrics.internal_errors.inc()
    )
    sealing = SealingNodes(fleet.registry, fleet.clients, clock, random.Random())
    workers = WorkerMetrics(settings.metrics_file) if settings.metrics_file else None
    operators_access, issuer = _operators(settings, store, clock)
    app = GatewayApp(
        world,
        fleet.registry,
        in_flight_max=settings.in_flight_max,
        bodies=BodyBudget(settings.body_bytes_total_max),
        gauges=lambda: _gauges(store, fleet.scheduler, world, requests, tracing, certificate),
        more=[*_apis(adjustable, store, fleet, books, clock), *jobs.apis],
        workers=workers,
        cors=cors_of(settings),
        origins=origins,
        confidential=(store.locks, sealing),
        generating=(fleet.clients, leases),
        sidecars=(store.locks, Sidecars(sealing, fleet.clients), leases),
        traced=traced,
        operators=operators_access,
        access=access_log(settings.access_log, writer, origins.of),
    )
    background = [expire(store, clock), leases.run(), *store.background(), fleet.canaries.run(), fleet.connected.broken]
    background += [jobs.runner.run(), jobs.files.watch(), *issuer]
    background += [prober.run() for prober in probers]
    if workers is not None:
        background.append(app.metrics.keep(workers))
    return Gateway(store, fleet, books, world, app, jobs.files, tracing, jobs.runner, adjustable, background)


def cors_of(settings: GatewaySettings) -> Cors | None:
    """The rule for pages of other origins; None where there are none. Raises SetupError."""
    return parsed(Cors, settings.cors_origin, "--cors-origin") if settings.cors_origin else None


def batch_terms(settings: GatewaySettings) -> BatchTerms:
    """What a batch may be, and what it costs."""
    return BatchTerms(settings.batch_lines_max, settings.batch_inputs_max, settings.batch_price_percent * 10_000)


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
    examiner = Examiner(registry, clients, models.known, models.tokenizers, clock, verify)
    canaries = Canaries(examiner, scheduler, random.Random())
    connected = ConnectedNodes(
        examiner,
        clients,
        fingerprint(identity.public_key),
        canaries.prove,
        normalizing=models.normalizing,
        upstream_probe_s=settings.upstream_probe_s,
        own_link=TracedOwnLink if settings.traces else OwnLink,
        server=TracedServer if settings.traces else UpstreamServer,
    )
    roster = Roster(store.nodes, connected, registry, clock, store.changes)
    return FleetParts(registry, scheduler, clients, examiner, canaries, connected, roster, identity)


def _local_nodes(settings: GatewaySettings, fleet: FleetParts, clock: Clock) -> list[Prober]:
    """Add the nodes of --nodes. Raises SetupError."""
    own_link = TracedOwnLink if settings.traces else OwnLink
    probers = []
    for number, path in enumerate(node_sockets(settings)):
        node_id = "local" if len(settings.nodes) == 1 else f"local-{number}"
        load = Load(interleaves=True)
        fleet.clients.add(node_id, CoalescingLink(own_link(unix_pool(path), clock), load))
        node = fleet.registry.add(Node(node_id, UNIX + path, trusted=True, load=load))
        probers.append(Prober(node, fleet.examiner))
    return probers


def _world(settings: GatewaySettings, models: Models, store: Store, fleet: FleetParts, clock: Clock) -> World:
    ranks = find_cl100k()
    replies = Shares(settings.reply_bytes_total_max)
    return World(
        keys=store.keys,
        rate_limits=store.rate_limits,
        slots=store.slots,
        prices=store.prices,
        catalogue=models.catalogue,
        tokenizers=models.tokenizers,
        cl100k=Cl100k(ranks) if ranks is not None else None,
        ledger=store,
        fleet=fleet.scheduler,
        client=fleet.clients,
        observer=fleet.canaries,
        clock=clock,
        single_flight=SingleFlight(Done.close, replies),
        unread=Unread(asyncio.get_running_loop().call_later),
        replies=replies,
        cache=VectorCache(settings.cache_bytes_max, fleet.registry.generation),
        hash_user=functools.partial(hash_user, store.key_secret),
        claim_of=functools.partial(claim_of, store.key_secret),
        terms=ParseTerms(
            fleet.scheduler.serves, models.normalizing, ignore_unknown=settings.unknown_members == "ignore"
        ),
        ask_max=settings.ask_max,
        jobs=store.jobs,
    )


def _apis(adjustable: Adjustable, store: Store, fleet: FleetParts, books: BooksThreads, clock: Clock) -> list[Api]:
    """The APIs for nodes, accounts and operators."""
    roster, registry, catalogue = fleet.roster, fleet.registry, adjustable.models.catalogue
    nonces = Nonces(store.key_secret)
    registrar = Registrar(fleet.identity, nonces, store.nodes, roster, adjustable.policy, system_lookup, clock)
    bodies, account_bodies = BodyBudget(SMALL_BODIES_BYTES_TOTAL_MAX), BodyBudget(SMALL_BODIES_BYTES_TOTAL_MAX)
    return [
        NodesApi(registrar, roster, registry, store.nodes, clock, adjustable.origins),
        AccountApi(books.accounts, account_bodies, clock, catalogue),
        FleetApi(roster, registry, bodies, clock, catalogue),
        InvitesApi(store.nodes, bodies, clock, fleet.identity.public_key),
        AccountsApi(books.operators, bodies),
        KeysApi(books.operators, bodies, clock, catalogue),
        PricesApi(books.operators, bodies, catalogue),
        LedgerApi(books.operators, books.checks, bodies),
        ReloadApi(adjustable.requests, bodies),
        AuditApi(books.operators),
    ]


def _operators(settings: GatewaySettings, store: Store, clock: Clock) -> tuple[OperatorAccess, list[Awaitable[Any]]]:
    """Who may use the admin API, and what has to run for that. Raises SetupError."""
    access = OperatorAccess(certificate=settings.tls_client_ca is not None)
    terms = sign_in(settings)
    if terms is None:
        return access, []
    from embedmesh.gateway.issuer_keys import IssuerKeys
    from embedmesh.gateway.oidc import SIGN_IN_CHARS_MAX, Operators

    issuer = IssuerKeys(terms.issuer, clock)
    keys = Operators(terms, store.keys, issuer, clock)
    return access._replace(keys=keys, token_chars_max=SIGN_IN_CHARS_MAX), [issuer.run()]


def _jobs(
    settings: GatewaySettings,
    store: Store,
    fleet: FleetParts,
    world: World,
    leases: Leases,
    known: Catalogue,
    traced: RequestTracing | None,
    *,
    on_bug: Callable[[], object],
) -> JobParts:
    """Files and batches. Lines of batches see a world of their own: patient nodes, and no limits of keys."""
    clock = world.clock
    endpoints: dict[str, Operation] = {
        EMBEDDINGS_PATH: EMBEDDINGS,
        RERANK_PATH: RERANK,
        **generations(fleet.clients, leases),
    }
    leftover = Leftover(fleet.scheduler, clock, asyncio.get_running_loop().call_later)
    bounds = FileBounds(of_account=settings.files_bytes_max)
    files = FileStore(files_place(settings), store.files, store.batches, store.key_secret, clock, bounds)
    lines = world_of_lines(world, leftover)
    of_batch = as_it_is if traced is None else functools.partial(_traced_lines, traced)
    terms = batch_terms(settings)
    runner = Runner(store.batches, files, lines, endpoints, leftover, terms, known, of_batch, on_bug)
    bodies = BodyBudget(SMALL_BODIES_BYTES_TOTAL_MAX)

    def price_min(account_id: str) -> int:
        ratio = runner.terms.ratio_ppm
        prices = [(prices_now(world.prices, each, account_id, ratio), each) for each in world.catalogue.models]
        return min(token_price(of_model, each) for of_model, each in prices)

    apis: list[Api] = [
        FilesApi(files, store.files, price_min, bodies),
        BatchesApi(store.batches, files, store.files, runner, world, endpoints, bodies),
        JobsApi(store.jobs, bodies, clock),
    ]
    return JobParts(files, runner, apis)


def _node_of(fleet: FleetParts, node_id: str) -> TracedNode | None:
    node = fleet.registry.find(node_id)
    return None if node is None else TracedNode(node.trusted, node.address)


def _traced_lines(traced: RequestTracing, operation: Operation, batch_id: str) -> Operation:
    return cast(Operation, TracedBatchOperation(operation, traced, batch_id))


def _gauges(
    store: Store,
    scheduler: Scheduler,
    world: World,
    requests: ReloadRequests,
    tracing: Tracing | None,
    certificate: Certificate | None,
) -> dict[str, float]:
    """What /metrics shows of the store, the nodes, the cache, the replies, traces and the port's certificate."""
    values = {f"store_{name}": float(value) for name, value in msgspec.structs.asdict(store.stats).items()}
    values["store_unavailable"] = not store.healthy()
    if certificate is not None:
        values["certificate_expires_timestamp_seconds"] = certificate.expires_s
    values["nodes_ready"] = sum(node.state is NodeState.READY for node in scheduler.registry)
    values["tokens_outstanding"] = sum(node.load.tokens for node in scheduler.registry)
    values["tokens_waiting"] = scheduler.queued_tokens
    values |= {"cache_bytes": world.cache.bytes, "cache_hits": world.cache.hits, "cache_misses": world.cache.misses}
    sent, dropped, over = (0, 0, 0) if tracing is None else (tracing.sink.sent, tracing.sink.dropped, tracing.over_rate)
    values |= {"traces_sent": sent, "traces_dropped": dropped, "traces_over_rate": over}
    values |= {"reply_bytes": world.replies.taken, "log_lines_dropped": dropped_lines()}
    return values | requests.counts()
