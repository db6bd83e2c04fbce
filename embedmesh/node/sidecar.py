"""Composition of a sidecar: a node without an engine, beside a server of another make, for sealed requests."""

import ipaddress
from functools import partial

from embedmesh.catalogue import Catalogue
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.node.compact_path import CompactPath
from embedmesh.node.confidential import LateOpener
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.sidecar_api import SidecarApp, SignedSidecarApi
from embedmesh.node.sidecar_calls import SidecarCalls
from embedmesh.node.sidecar_models import SidecarModels
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import InvalidValue, SetupError
from embedmesh.rules.limits import UPSTREAM_TOKEN_CHARS_MAX
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.request_record import AccessLog
from embedmesh.settings import NodeSettings
from embedmesh.upstream.generating import UpstreamGeneration
from embedmesh.upstream.server import UpstreamServer, UpstreamUrl, parse_url


class SidecarParts:
    """What `node.main` needs of a sidecar."""

    def __init__(self, settings: NodeSettings, catalogue: Catalogue, opener: LateOpener, bodies: BodyBudget) -> None:
        """Raises SetupError."""
        self.offers = choose_offers(settings, catalogue)
        self.chosen = [model for model in catalogue.models if model.id in self.offers]
        metrics, clock = NodeMetrics(), SystemClock()
        upstream = UpstreamGeneration(UpstreamServer(_url(settings.upstream), _token(settings)), self.offers)
        self.models = SidecarModels(self.chosen, upstream, clock)
        self.app = SidecarApp(self.models, metrics, opener.signed_keys)
        self.calls = SidecarCalls(upstream, self.models, Catalogue(tuple(self.chosen)), opener, metrics, bodies, clock)
        self.on_internal_error = metrics.internal_error
        self.door = partial(SignedSidecarApi, calls=self.calls)
        self._bodies = bodies

    def socket_server(self, access: AccessLog | None) -> HttpServer:
        """For gateways on this machine."""
        return HttpServer(
            {**self.app.routes(), **self.calls.routes()},
            on_internal_error=self.on_internal_error,
            fast_path=CompactPath(self.app, self._bodies, access=access),
            access=access,
        )


def choose_offers(settings: NodeSettings, catalogue: Catalogue) -> dict[str, Offer]:
    """By id: the models of --model, or all of the catalogue that generate. Raises SetupError."""
    named = [text.partition("=")[::2] for text in settings.model]
    if not named:
        named = [(model.id, "") for model in catalogue.models if not model.encodes]
    offers = {}
    for name, theirs in named:
        model = catalogue.find(name)
        if model is None:
            known = ", ".join(model.id for model in catalogue.models if not model.encodes)
            raise SetupError(f"There is no model {name!r} in the catalogue that generates; it has {known or 'none'}.")
        if model.encodes:
            if model.reranks:
                raise SetupError(f"{name!r} reranks: no sealed request does that. Mend --model.")
            raise SetupError(f"{name!r} makes vectors: a node without --upstream seals those. Mend --model.")
        offers[model.id] = _offer(model, theirs)
    if not offers:
        raise SetupError(
            "The catalogue has no model that generates. Say with --catalogue which models the server runs."
        )
    return offers


def _offer(model: Model, theirs: str) -> Offer:
    return Offer(model.id, model.width, model.max_tokens, model.digest, model.tier, name=theirs)


def _url(text: str) -> UpstreamUrl:
    """The server's. Over plain HTTP only on this machine: the texts are in the clear between node and server."""
    try:
        url = parse_url(text)
    except InvalidValue as wrong:
        raise SetupError(f"{wrong.message} Mend --upstream.") from None
    if not url.tls and not _is_here(url.host):
        raise SetupError("Over http the server must be on this machine, as 127.0.0.1: texts go there in the clear.")
    return url


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(settings: NodeSettings) -> str:
    if settings.token_file is None:
        return ""
    try:
        token = settings.token_file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise SetupError(f"The file {settings.token_file} cannot be read, or is no token. Mend --token-file.") from None
    if not 0 < len(token) <= UPSTREAM_TOKEN_CHARS_MAX or not token.isprintable() or " " in token:
        raise SetupError(f"{settings.token_file} holds no bearer token. Mend --token-file.")
    return token
