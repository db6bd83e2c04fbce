"""What a node that belongs to a gateway has besides its models: identity, certificate, receipts, connections.

Only a node with `--gateway` imports this: it brings a TLS library and an HTTP client along.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from embedmesh.engine.loaded import LoadedModels
from embedmesh.fleet.addresses import NodeAddress, parse
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.logs.setup import name_node
from embedmesh.node.app import NodeApp
from embedmesh.node.compact_path import BeginTraced, CompactPath
from embedmesh.node.confidential import SealedCalls
from embedmesh.node.dialling import DialOut
from embedmesh.node.joining import AdvertisedAddress, Joining, find_gateway
from embedmesh.node.opener import IDENTITY_FILE
from embedmesh.node.signed_api import SignedApi
from embedmesh.process import bind, host_and_port
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError
from embedmesh.rules.membership import Heartbeat, Offer
from embedmesh.rules.request_record import AccessLog
from embedmesh.settings import NodeSettings
from embedmesh.signing.certificates import der, make_certificate, server_context
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.invites import Invite
from embedmesh.signing.receipt_log import ReceiptLog

if TYPE_CHECKING:
    from embedmesh.node.sidecar_api import SidecarApp
    from embedmesh.node.sidecar_models import SidecarModels

T = TypeVar("T")

EVERYWHERE = "0.0.0.0"  # noqa: S104 - an address is given so that others reach it; all requests are authenticated


class MemberNode:
    """A node's membership at one gateway: `listen`, `run`, `stop`."""

    def __init__(
        self,
        settings: NodeSettings,
        models: "LoadedModels | SidecarModels",
        app: "NodeApp | SidecarApp",
        bodies: BodyBudget,
        on_internal_error: Callable[[], None],
        sealed: SealedCalls | None = None,
        door: Callable[..., SignedApi] = SignedApi,
        begin_traced: BeginTraced | None = None,
        access: AccessLog | None = None,
    ) -> None:
        """Reads or makes the node's files; `door` makes the API over the network. Raises SetupError."""
        folder = _make_folder(settings.data_dir)
        invite = _parse(Invite.parse, settings.join, "--join")
        known = find_gateway(folder / "gateway.json", settings.gateway, invite, settings.gateway_key)
        identity = Identity.load(folder / IDENTITY_FILE)
        endpoint = _parse(parse, settings.address, "--address")
        name_node(node_id(identity.public_key))
        self._listen_on = _parse_listen(settings.listen, endpoint)
        self._tls = None
        certificate = b""
        if endpoint is not None and endpoint.tls:
            key_file, certificate_file = folder / "node.key", folder / "node.cert"
            make_certificate(key_file, certificate_file)
            certificate = der(certificate_file)
            self._tls = server_context(certificate_file, key_file)
        clock = SystemClock()
        self._models: LoadedModels | SidecarModels = models
        self._price = settings.price
        self._receipts = ReceiptLog(folder / "receipts.log")
        api = door(
            app=app,
            bodies=bodies,
            identity=identity,
            gateway=known.fingerprint,
            address=settings.address,
            receipts=self._receipts,
            clock=clock,
            sealed=sealed,
        )
        self._server = HttpServer(
            api.routes(),
            on_internal_error=on_internal_error,
            fast_path=CompactPath(app, bodies, api, sealed, begin_traced, access),
            access=access,
        )
        self._joining = Joining(
            known=known,
            file=folder / "gateway.json",
            invite=invite,
            identity=identity,
            address=AdvertisedAddress(settings.address, certificate, settings.country.upper()),
            dial_out=DialOut(known.url, self._server) if endpoint is None else None,
            on_session=api.new_session,
            receipts=self._receipts,
            clock=clock,
            offers=self._offers,
            report=self._report,
        )

    async def listen(self) -> None:
        """Open the port, if the node has an address. Raises SetupError."""
        if self._listen_on is not None:
            await self._server.start(bind(*self._listen_on), self._tls)

    async def run(self) -> None:
        """Be a member, until cancelled. Raises SetupError for what a person must fix."""
        await self._joining.run()

    async def stop(self, drain_s: float) -> None:
        """Say farewell, answer the requests that are running, close all connections."""
        await self._joining.leave()
        await self._server.drain(drain_s)
        await self._joining.hang_up()
        self._receipts.close()

    def _offers(self) -> tuple[Offer, ...]:
        return tuple(
            Offer(model.id, model.width, model.max_tokens, model.digest, model.tier, self._price)
            for model in (served.model for served in self._models.up())
        )

    def _report(self) -> Heartbeat:
        waiting = sum(one.waiting_tokens for one in self._models)
        return Heartbeat(waiting, max((one.tokens_per_s for one in self._models), default=0.0))


def _make_folder(data_dir: Path) -> Path:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"Cannot use the folder {data_dir} ({error.strerror}). Choose another --data-dir.") from None
    return data_dir


def _parse(kind: Callable[[str], T], text: str, option: str) -> T | None:
    """The setting of that option; None if it is not given. Raises SetupError."""
    try:
        return kind(text) if text else None
    except ValueError as error:
        raise SetupError(f"{error} Mend {option}.") from None


def _parse_listen(text: str, address: NodeAddress | None) -> tuple[str, int] | None:
    """Host and port to listen on; by default the port of the node's address. None if it has no address."""
    if address is None:
        return None
    if not text:
        return "::" if ":" in address.host else EVERYWHERE, address.port
    return host_and_port(text, "--listen")
