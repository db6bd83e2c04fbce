"""The parts of a gateway: what `embedmesh.gateway.build` makes."""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from embedmesh.fleet.addresses import Policy
from embedmesh.fleet.canary import Canaries
from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.registry import Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.world import World
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.reload_api import ReloadRequests
from embedmesh.gateway.api.routes import Api
from embedmesh.gateway.models import Models
from embedmesh.gateway.nodes.connected import ConnectedNodes
from embedmesh.gateway.nodes.links import NodeClients
from embedmesh.gateway.nodes.roster import Roster
from embedmesh.http.connections import Origins
from embedmesh.jobs.files import FileStore
from embedmesh.jobs.runner import Runner
from embedmesh.rules.traces import Tracing
from embedmesh.signing.identity import Identity
from embedmesh.storage.store import Store


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
class Adjustable:
    """What else the settings can change while the gateway runs; see `embedmesh.gateway.reload`."""

    models: Models
    origins: Origins
    policy: Policy
    requests: ReloadRequests


@dataclass(frozen=True)
class BooksThreads:
    """Threads for the operators' and accounts' queries of the store."""

    operators: BooksThread
    accounts: BooksThread
    checks: BooksThread


@dataclass(frozen=True)
class JobParts:
    """Files, batches, and their APIs."""

    files: FileStore
    runner: Runner
    apis: Sequence[Api]


@dataclass(frozen=True)
class Gateway:
    """All parts of a gateway."""

    store: Store
    fleet: FleetParts
    books: BooksThreads
    world: World
    app: GatewayApp
    files: FileStore
    tracing: Tracing | None
    runner: Runner
    adjustable: Adjustable
    background: Sequence[Awaitable[Any]]  # run as long as the gateway does; none of them ends by itself
