"""The node itself: our doors, our way to join and to sign, around a scripted model and a mode."""

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, cast

import msgspec
from aiohttp import web

from bench.faultnode.acts import AFTER, State, Turn
from bench.faultnode.modes import MODES, Mode
from bench.faultnode.scripted import Pace, Vectors, vectors
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.fleet.addresses import parse
from embedmesh.fleet.probe import PROBE_TEXT
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.server import HttpServer
from embedmesh.node.app import NodeApp
from embedmesh.node.dialling import DialOut
from embedmesh.node.joining import Joining, NodeAddress, find_gateway
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


class Settings(NamedTuple):
    """What a node is told at its start. Without an address it dials out."""

    data_dir: Path
    gateway: str = ""
    join: str = ""
    address: str = ""
    mode: str = "honest"
    share: float = 1.0
    seed: int = 1
    tokens_per_s: float = 0.0
    fixed_s: float = 0.0
    fifo: bool = False
    slow_factor: float = 10.0
    after: int = AFTER
    spare_probes: bool = False


@dataclass
class Faults:
    """Which mode is on, and for how many of the requests. Counts what came."""

    state: State
    mode: Mode = MODES["honest"]
    share: float = 1.0
    spared: Sequence[list[int]] = ()  # what is answered right in any mode
    asked: int = 0
    wrong: int = 0

    def order(self, mode: str, share: float = 1.0) -> None:
        """From now on this mode, by dice for that share of the requests."""
        self.mode, self.share = MODES[mode], share
        self.state.since, self.state.seen, self.state.first = time.monotonic(), 0, None

    def draw(self, ids: list[list[int]]) -> Mode:
        """How the next request is answered."""
        self.asked += 1
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

    def listed(self) -> web.Response:
        """`GET /v1/models`."""
        said = [ServedModel(m.id, m.width, m.max_tokens, m.digest, m.tier) for m in self.models.values()]
        return web.Response(body=msgspec.json.encode(ServedModels(said)), content_type="application/json")

    def find(self, name: str) -> Model:
        """By id or alias. Raises ModelNotFound."""
        for model in self.models.values():
            if name == model.id or name in model.aliases:
                return model
        raise errors.ModelNotFound("This node does not serve that model.", param="model")

    async def embed(self, model: Model, ids: list[list[int]], mode: Mode) -> tuple[Vectors, int]:
        """The right rows, and the tokens, when it is time."""
        tokens = sum(map(len, ids)) + self.tokenizers[model.id].specials * len(ids)
        await self.pace.work(tokens, mode.slowness(self.faults.state))
        return vectors(ids, width=model.width), tokens


class FaultReceipts(ReceiptLog):
    """A log whose receipts may claim more than was embedded."""

    extra_tokens = 0

    def add(self, request_id: str, request_digest: bytes, reply_digest: bytes, tokens: int, time_ms: int) -> int:
        return super().add(request_id, request_digest, reply_digest, tokens + self.extra_tokens, time_ms)


class FaultDoor(SignedApi):
    """Our node's door, with a scripted model and its faults behind it."""

    def __init__(self, scripted: Scripted, bodies: BodyBudget, receipts: FaultReceipts, **rest: object) -> None:
        app = cast(NodeApp, scripted)  # of which the door asks `listed` and, where we do not, `embed_compact`
        super().__init__(app=app, bodies=bodies, receipts=receipts, **rest)  # type: ignore[arg-type]
        self._scripted = scripted
        self._decode = msgspec.msgpack.Decoder(EmbedIds).decode

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """The compact form, signed both ways, with a receipt: right, or as the mode has it."""
        checked = self._check(request)
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self.bodies, content_type=COMPACT)
        self.bodies.give_back("", len(body))
        self._check_body(checked, body)
        asked = self._decode(body)
        model, ids = self._scripted.find(asked.model), unpack_ids(asked)
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
            forged._mac = Mac(session)
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

    def __init__(self, settings: Settings, models: Sequence[Model]) -> None:
        """Reads or makes its files. Raises SetupError."""
        self._settings = settings
        state = State(Random(settings.seed), after=settings.after, slow_factor=settings.slow_factor)
        self.faults = Faults(state)
        pace = Pace(settings.tokens_per_s, settings.fixed_s, fifo=settings.fifo)
        self.scripted = Scripted(models, pace, self.faults)
        if settings.spare_probes:
            self.faults.spared = [each.ids([PROBE_TEXT])[0] for each in self.scripted.tokenizers.values()]
        self.faults.order(settings.mode, settings.share)
        if settings.gateway:
            self._prepare()

    def _prepare(self) -> None:
        settings, folder = self._settings, self._settings.data_dir
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        invite = Invite.parse(settings.join) if settings.join else None
        known = find_gateway(folder / "gateway.json", settings.gateway, invite)
        identity = Identity.load(folder / "node.identity")
        clock = SystemClock()
        self.node_id = node_id(identity.public_key)
        self.receipts = FaultReceipts(folder / "receipts.log")
        self._tls, certificate = None, b""
        if settings.address and parse(settings.address).tls:
            make_certificate(folder / "node.key", folder / "node.cert")
            certificate = der(folder / "node.cert")
            self._tls = server_context(folder / "node.cert", folder / "node.key")
        self.door = FaultDoor(
            self.scripted,
            BodyBudget(BODIES_BYTES_MAX),
            self.receipts,
            identity=identity,
            gateway=known.fingerprint,
            address=settings.address,
            clock=clock,
        )
        self.server = HttpServer(self.door.routes())
        self._joining = Joining(
            known=known,
            file=folder / "gateway.json",
            invite=invite,
            identity=identity,
            address=NodeAddress(settings.address, certificate, ""),
            dial_out=None if settings.address else DialOut(known.url, self.server),
            on_session=self.door.new_session,
            receipts=self.receipts,
            clock=clock,
            offers=self._offers,
            report=self._report,
        )

    async def listen(self) -> None:
        """Open its door, where it has an address."""
        if self._settings.address:
            await self.server.start(bind("127.0.0.1", parse(self._settings.address).port), self._tls)

    async def run(self) -> None:
        """Be a member, until cancelled."""
        await self._joining.run()

    async def stop(self) -> None:
        """Say farewell, answer what is running, close the doors."""
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
