"""A sidecar on a Unix socket beside a small server, and a gateway's link to it: all real but the process."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from embedmesh.catalogue import Catalogue
from embedmesh.confidential.documents import read_keys
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.gateway.nodes.sealed_generation import Sidecars
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.http.unix_socket import bind_unix
from embedmesh.node.confidential import LateOpener
from embedmesh.node.key_sets import KeySets
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.opener import Opener
from embedmesh.node.sidecar_api import SidecarApp
from embedmesh.node.sidecar_calls import SidecarCalls
from embedmesh.node.sidecar_models import SidecarModels
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.confidential import LockTerms, Scheme, SealedCall, SignedKeys
from embedmesh.rules.generation import Generating
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.sealed_generation import SealedBounds, operation_of
from embedmesh.signing.identity import Identity
from embedmesh.upstream.generating import UpstreamGeneration
from embedmesh.upstream.pools import unix_pool
from embedmesh.upstream.server import UpstreamServer, parse_url
from tests.little_server import LittleServer
from tests.node.sealing import SealedBy, seal

NODE = Identity(bytes(range(32)))
CHAT = Model(
    id="acme/chat",
    width=0,
    max_tokens=8_192,
    price=1_000_000,
    modalities=("chat", "completions"),
    output_price=3_000_000,
    output_max=256,
    template_tokens=16,
)
PAINTER = Model(
    id="acme/painter", width=0, max_tokens=300, price=0, modalities=("images",), image_prices={"1x1": 70, "2x2": 90}
)
UNITS = 1_000
BOUNDS = SealedBounds(UNITS, UNITS, 8 * 1024 * 1024, ("1x1", "2x2"))


class Direct:
    """The links to nodes, for one node."""

    def __init__(self, link: OwnLink) -> None:
        self._link = link

    def is_here(self, terms: LockTerms) -> bool:
        return True

    async def generate_sealed(
        self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str
    ) -> bytes:
        return await self._link.generate_sealed(modality, body, limit, request_id)

    async def stream_sealed(self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str) -> Any:
        return await self._link.stream_sealed(modality, body, limit, request_id)


class LittleSidecar:
    """`sidecars` is the gateway's side."""

    def __init__(self, server: LittleServer, socket: Path) -> None:
        clock = SystemClock()
        offers = {
            model.id: Offer(model.id, 0, model.max_tokens, "", "exact", name="theirs") for model in (CHAT, PAINTER)
        }
        upstream = UpstreamGeneration(UpstreamServer(parse_url(server.url), ""), offers)
        self.keys = KeySets(NODE, clock)
        self.opener = LateOpener(lambda: Opener(NODE, self.keys, clock))
        self.models = SidecarModels((CHAT, PAINTER), upstream, clock)
        metrics, bodies = NodeMetrics(), BodyBudget(10**8)
        self.app = SidecarApp(self.models, metrics, self.opener.signed_keys)
        self.calls = SidecarCalls(
            upstream, self.models, Catalogue((CHAT, PAINTER)), self.opener, metrics, bodies, clock
        )
        self.bugs = 0
        self.server = HttpServer({**self.app.routes(), **self.calls.routes()}, on_internal_error=self._bug)
        self.pool = unix_pool(str(socket))
        self.link = OwnLink(self.pool, clock)
        self.client = Direct(self.link)
        self.sidecars = Sidecars(self.client, self.client)
        self.asking: asyncio.Task[None]

    def _bug(self) -> None:
        self.bugs += 1

    @property
    def signed(self) -> SignedKeys:
        return self.keys.signed({CHAT.id: "", PAINTER.id: ""})

    def seal(
        self, scheme: Scheme, modality: Generating, body: dict[str, Any], *, stream: bool = False, units: int = UNITS
    ) -> SealedBy:
        """A request for it."""
        model = body["model"]
        raw = json.dumps(body).encode()
        operation = operation_of(modality, stream)
        return seal(self.signed, scheme, raw, model=model, name=model, units=units, operation=operation)


def terms_of(call: SealedCall, units: int = UNITS) -> LockTerms:
    """What a gateway knows of the lock."""
    return LockTerms(
        call.lock, "a", "k", "req_1", "n0", NODE.public_key, call.node_key, call.scheme, call.model, units, 1, 10**13
    )


@asynccontextmanager
async def little_sidecar(server: LittleServer, folder: Path) -> AsyncIterator[LittleSidecar]:
    socket = folder / "s.sock"
    made = LittleSidecar(server, socket)
    await made.opener.make()
    await made.server.start(bind_unix(socket))
    made.asking = asyncio.create_task(made.models.load_all(()))
    await made.models.some.wait()
    assert read_keys(made.signed).models == {CHAT.id: "", PAINTER.id: ""}
    try:
        yield made
        assert made.bugs == 0
    finally:
        made.asking.cancel()
        await made.server.drain(0.1)
        made.pool.close()
