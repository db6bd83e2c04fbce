"""What a node that belongs to a gateway has besides its models: identity, certificate, receipts, and its two doors.

Only a node with `--gateway` imports this: it brings a TLS library and an HTTP client along.
"""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from embedmesh.engine.loaded import LoadedModels
from embedmesh.fleet.addresses import NodeAddress, parse
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.node.app import NodeApp
from embedmesh.node.joining import Joining, Place, Report, find_gateway
from embedmesh.node.signed_api import NodeDoor
from embedmesh.process import bind
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError
from embedmesh.rules.membership import Offer
from embedmesh.settings import NodeSettings
from embedmesh.signing.certificates import der, make_certificate, server_context
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.invites import Invite
from embedmesh.signing.receipt_log import ReceiptLog

EVERYWHERE = "0.0.0.0"  # noqa: S104 - who gives an address wants to be reached; all that comes in is authenticated


class Files(NamedTuple):
    """What a node keeps in its data directory."""

    identity: Path
    key: Path
    certificate: Path
    gateway: Path
    receipts: Path


class MemberNode:
    """A node's membership at one gateway, from `start` to `stop`."""

    def __init__(
        self,
        settings: NodeSettings,
        models: LoadedModels,
        app: NodeApp,
        bodies: BodyBudget,
        on_internal_error: Callable[[], None],
    ) -> None:
        """Reads or makes the node's files. Raises SetupError."""
        files = _files(settings.data_dir)
        invite = _invite(settings.join)
        known = find_gateway(files.gateway, settings.gateway, invite, settings.gateway_key)
        identity = Identity.load(files.identity)
        clock = SystemClock()
        self._settings = settings
        self._models = models
        self._tls: ssl.SSLContext | None = None
        certificate = b""
        if settings.address:
            self._listen = _listen(settings)
            if _parse(settings.address).tls:
                make_certificate(files.key, files.certificate)
                certificate = der(files.certificate)
                self._tls = server_context(files.certificate, files.key)
        self._receipts = ReceiptLog(files.receipts)
        name = node_id(identity.public_key)
        door = NodeDoor(app, bodies, identity, name, known.fingerprint, settings.address, self._receipts, clock)
        self._server = HttpServer(door.routes(), on_internal_error=on_internal_error)
        self._joining = Joining(
            known,
            files.gateway,
            invite,
            identity,
            name,
            Place(settings.address, certificate, settings.country.upper()),
            door,
            self._server,
            self._receipts,
            clock,
            self._offers,
            self._report,
        )

    async def listen(self) -> None:
        """Open the door, where the node has an address. Raises SetupError."""
        if self._settings.address:
            await self._server.start(bind(*self._listen), self._tls)

    async def run(self) -> None:
        """Be a member, until cancelled. Raises SetupError for what a person has to mend."""
        await self._joining.run()

    async def stop(self, drain_s: float) -> None:
        """Say farewell, answer what is running, close the doors."""
        await self._joining.leave()
        self._joining.dial_no_more()
        await self._server.drain(drain_s)
        await self._joining.hang_up()
        self._receipts.close()

    def _offers(self) -> tuple[Offer, ...]:
        return tuple(
            Offer(model.id, model.width, model.max_tokens, model.digest, model.tier, self._settings.price)
            for model in (served.model for served in self._models.up())
        )

    def _report(self) -> Report:
        served = list(self._models)
        fastest = max((one.tokens_per_s for one in served), default=0.0)
        return Report(sum(one.waiting_tokens for one in served), fastest)


def _files(data_dir: Path) -> Files:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"Cannot use the folder {data_dir} ({error.strerror}). Choose another --data-dir.") from None
    names = ("node.identity", "node.key", "node.cert", "gateway.json", "receipts.log")
    return Files(*(data_dir / name for name in names))


def _invite(text: str) -> Invite | None:
    if not text:
        return None
    try:
        return Invite.parse(text)
    except ValueError as error:
        raise SetupError(f"{error} Mend --join.") from None


def _parse(address: str) -> NodeAddress:
    try:
        return parse(address)
    except ValueError as error:
        raise SetupError(f"{error} Mend --address.") from None


def _listen(settings: NodeSettings) -> tuple[str, int]:
    """Host and port to listen on."""
    if not settings.listen:
        place = _parse(settings.address)
        return "::" if ":" in place.host else EVERYWHERE, place.port
    host, _, port = settings.listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65_535:
        raise SetupError("Give --listen as HOST:PORT, such as 0.0.0.0:8443.")
    return host.strip("[]"), int(port)
