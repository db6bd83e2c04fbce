"""The node itself: our API, joining and signatures, around a scripted model and a mode."""

import asyncio
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
from aiohttp import web

from bench.faultnode.acts import State, Turn
from bench.faultnode.modes import MODES, Mode
from bench.faultnode.scripted import Pace, vectors
from bench.rig.http import Vectors
from bench.rig.processes import HOST
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.fleet.addresses import parse
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.server import HttpServer
from embedmesh.node.app import NodeApp
from embedmesh.node.dialling import DialOut
from embedmesh.node.joining import AdvertisedAddress, Joining, find_gateway
from embedmesh.node.signed_api import SignedApi
from embedmesh.process import bind
from embedmesh.rules import errors
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import COMPACT, EmbedIds, EmbedVectors, ServedModel, ServedModels, unpack_ids
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from embedmesh.rules.membership import Heartbeat, Offer
from embedmesh.rules.models import Model
from embedmesh.signing.certificates import der, make_certificate, server_context
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.invites import Invite
from embedmesh.signing.messages import CheckedRequest, Mac
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.signing.session import Session

DRAIN_S = 8.0  # a node's own
BODIES_BYTES_MAX = 64 * 1024 * 1024


@dataclass
class Faults:
    """Which mode is on, and for how many of the requests. Counts the requests."""

    state: State
    mode: Mode = MODES["honest"]
    share: float = 1.0
    spared: Sequence[list[int]] = ()  # inputs that are answered right in any mode
    requests: int = 0
    wrong: int = 0

    def order(self, mode: str, share: float = 1.0) -> None:
        """From now on this mode, by dice for that share of the requests."""
        self.mode, self.share = MODES[mode], share
        self.state.since, self.state.seen, self.state.first = time.monotonic(), 0, None

    def draw(self, ids: list[list[int]]) -> Mode:
        """How the next request is answered."""
        self.requests += 1
        spared = len(ids) == 1 and ids[0] in self.spared
        if self.mode is MODES["honest"] or spared or self.state.dice.random() >= self.share:
            return MODES["honest"]
        self.state.seen += 1
        self.wrong += 1
        return self.mode


class Scripted:
    """The models that it claims to serve, with one worker for all."""

    def __init__(self, models: Sequence[Model], pace: Pace, faults: Faults) -> None:
        """Reads the tokenizers, for how many special tokens each model adds."""
        self.models = {model.id: model for model in models}
        self.tokenizers = {model.id: ModelTokenizer(Path(model.folder), model.max_tokens) for model in models}
        self.pace = pace
        self.faults = faults

    def list_bytes(self) -> bytes:
        """`GET /v1/models`."""
        offers = [ServedModel(m.id, m.width, m.max_tokens, m.digest, m.tier) for m in self.models.values()]
        return msgspec.json.encode(ServedModels(offers))

    def find(self, name: str) -> Model:
        """By id or alias. Raises ModelNotFound."""
        for model in self.models.values():
            if name == model.id or name in model.aliases:
                return model
        raise errors.ModelNotFound("This node does not serve that model.", param="model")

    async def embed(self, model: Model, ids: list[list[int]], mode: Mode) -> tuple[Vectors, int]:
        """The right rows, and the tokens, after the time that they take."""
        tokens = sum(map(len, ids)) + self.tokenizers[model.id].specials * len(ids)
        await self.pace.work(tokens, mode.slowness(self.faults.state))
        return vectors(ids, width=model.width), tokens


class FaultReceipts(ReceiptLog):
    """A log whose receipts may claim more than was embedded."""

    extra_tokens = 0

    def add(self, request_id: str, request_digest: bytes, reply_digest: bytes, tokens: int, time_ms: int) -> int:
        return super().add(request_id, request_digest, reply_digest, tokens + self.extra_tokens, time_ms)


class FaultDoor(SignedApi):
    """Our node's signed API, with a scripted model and its faults behind it."""

    def __init__(self, scripted: Scripted, bodies: BodyBudget, receipts: FaultReceipts, **options: object) -> None:
        app = cast(NodeApp, scripted)  # the API calls its `list_bytes` only
        super().__init__(app=app, bodies=bodies, receipts=receipts, **options)  # type: ignore[arg-type]
        self._scripted = scripted
        self._decode = msgspec.msgpack.Decoder(EmbedIds).decode

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """The compact form, signed both ways, with a receipt: right, or as the mode says."""
        checked = self._check(request)
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self.bodies, content_type=COMPACT)
        self.bodies.give_back("", len(body))
        self.check_body(checked, body)
        call = self._decode(body)
        model, ids = self._scripted.find(call.model), unpack_ids(call)
        mode = self._scripted.faults.draw(ids)

        async def answer(mode: Mode) -> web.Response:
            try:
                rows, tokens = mode.rows(turn, *await self._scripted.embed(model, ids, mode))
            except errors.Overloaded:
                return web.Response(status=429, headers={"Retry-After": "1"})
            packed = msgspec.msgpack.encode(EmbedVectors(tokens, rows.tobytes()))
            response = web.Response(body=packed, headers={"Content-Type": COMPACT})
            return self._sign(checked, response, tokens, mode.receipt_tokens)

        def resign(response: web.Response, session: Session) -> None:
            assert isinstance(response.body, bytes)
            forged = copy(checked)
            forged._session = forged._session._replace(mac=Mac(session))
            response.headers.update(forged.sign_reply(200, response.body, self.receipts.count, self._now_s()))

        turn = Turn(request, ids, self._scripted.faults.state, lambda: answer(MODES["honest"]), resign)
        if mode.instead is not None and (instead := await mode.instead(turn)) is not None:
            return instead
        response = await answer(mode)
        if mode.signed is not None and response.status == 200:
            mode.signed(turn, response)
        return response

    def _sign(self, checked: CheckedRequest, response: web.Response, tokens: int, extra: int) -> web.Response:
        receipts = self.receipts
        assert isinstance(receipts, FaultReceipts)
        receipts.extra_tokens = extra
        try:
            return self._signed(checked, response, tokens=tokens)
        finally:
            receipts.extra_tokens = 0


class FaultNode:
    """One node, from `listen` to `stop`."""

    def __init__(self, scripted: Scripted, folder: Path, gateway: str, join: str, address: str) -> None:
        """Reads or makes its files. Without an address it dials out. Raises SetupError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.scripted, self._address = scripted, address
        invite, file = Invite.parse(join) if join else None, folder / "gateway.json"
        known = find_gateway(file, gateway, invite)
        identity, clock = Identity.load(folder / "node.identity"), SystemClock()
        self.node_id = node_id(identity.public_key)
        self.receipts = FaultReceipts(folder / "receipts.log")
        self._tls, certificate = None, b""
        if address and parse(address).tls:
            make_certificate(folder / "node.key", folder / "node.cert")
            certificate = der(folder / "node.cert")
            self._tls = server_context(folder / "node.cert", folder / "node.key")
        self.door = FaultDoor(
            scripted,
            BodyBudget(BODIES_BYTES_MAX),
            self.receipts,
            identity=identity,
            gateway=known.fingerprint,
            address=address,
            clock=clock,
        )
        self.server = HttpServer(self.door.routes())
        self._joining = Joining(
            known=known,
            file=file,
            invite=invite,
            identity=identity,
            address=AdvertisedAddress(address, certificate, ""),
            dial_out=None if address else DialOut(known.url, self.server),
            on_session=self.door.new_session,
            receipts=self.receipts,
            clock=clock,
            offers=self._offers,
            report=self._report,
        )

    async def listen(self) -> None:
        """Listen, where it has an address."""
        if self._address:
            await self.server.start(bind(HOST, parse(self._address).port), self._tls)

    async def run(self, joining: asyncio.Event) -> None:
        """Be a member from that event on, until cancelled."""
        await joining.wait()
        await self._joining.run()

    async def stop(self) -> None:
        """Say farewell, answer what is running, close the connections."""
        await self._joining.leave()
        await self.server.drain(DRAIN_S)
        await self._joining.hang_up()
        self.receipts.close()

    def _offers(self) -> tuple[Offer, ...]:
        models = self.scripted.models.values()
        return tuple(Offer(m.id, m.width, m.max_tokens, m.digest, m.tier) for m in models)

    def _report(self) -> Heartbeat:
        pace = self.scripted.pace
        return Heartbeat(pace.waiting_tokens, pace.tokens_per_s)
