"""A node's side of confidential requests: opened, treated as ordinary ones, answered so that only the caller can read.

What could not be opened gets one answer, whatever was wrong with it: an unknown key, a wrong length, a bad tag or hash,
a request that came before. It leaves REFUSAL_S after the request came, so that its time says nothing either. What is
wrong with a request that was opened is said to its caller alone, sealed.
"""

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from embedmesh.engine.served import Served
from embedmesh.flow.count import CanPay, CanPayFor
from embedmesh.http.failures import envelope
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.routing import Routes
from embedmesh.node.app import SELF, SOON_BYTES_MAX, CompactDone, NodeApp, queue_full
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.refusals import Refusals
from embedmesh.rules import errors
from embedmesh.rules.confidential import SealedCall, SignedKeys
from embedmesh.rules.embeddings import COMPACT, Call, Counted, numbers_of
from embedmesh.rules.forwarding import Answer, Share
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, SEALED_CALL_BYTES_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Clock

if TYPE_CHECKING:
    from embedmesh.node.key_sets import HeldKey  # these bring a TLS library along
    from embedmesh.node.opener import Opener, SeenCall

T = TypeVar("T")

CONFIDENTIAL_PATH = "/v1/confidential/embeddings"
THREADS = 2  # for what would hold up the event loop; most of it lets the interpreter go on
RENDER = "embedmesh.dialects.openai.render"  # brings numpy: 15 MB that a node without such calls does not need
SOON_COMPONENTS_MAX = 4_096  # of a reply: printed and sealed in 1 ms
REPLIES_BYTES_MAX = 512 * 1024 * 1024  # of all replies that are awaited or being written, as they will be at most
REPLY_BYTES_MAX = 224 * 1024 * 1024  # of one: what a SealedAnswer takes, padded
FORGET_LOOK_S = 60.0  # between two looks whether keys are over
DECODE = msgspec.msgpack.Decoder(SealedCall).decode


class LateOpener:
    """The opener of this node, once it is made: that loads a TLS library, while the models load."""

    def __init__(self, make: "Callable[[], Opener]") -> None:
        self._make = make
        self._made: Opener | None = None

    async def make(self) -> None:
        """Raises SetupError."""
        self._made = await asyncio.to_thread(self._make)

    async def keep(self) -> None:
        """Forget old keys in time, until cancelled."""
        while True:
            await asyncio.sleep(FORGET_LOOK_S)
            self.get().forget_old()

    def get(self) -> "Opener":
        """Raises NoNodeAvailable before it is made."""
        if self._made is None:
            raise errors.NoNodeAvailable("This node is starting.")
        return self._made

    def signed_keys(self, models: Mapping[str, str]) -> SignedKeys | msgspec.UnsetType:
        """The key document for these models, if there are keys already."""
        return msgspec.UNSET if self._made is None else self._made.signed_keys(models)


class _Asked(NamedTuple):
    """What was in a sealed request."""

    call: Call
    served: Served
    counted: Counted
    reply_bytes: int  # at most


class SealedCalls:
    """Answers sealed calls by the node's application."""

    def __init__(
        self,
        app: NodeApp,
        opener: LateOpener,
        metrics: NodeMetrics,
        bodies: BodyBudget,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._app = app
        self._opener = opener
        self._metrics = metrics
        self._bodies = bodies
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="seal")  # bodies and replies bound what waits
        self._can_render = False
        self._refusals = Refusals(clock, sleep)
        self._reply_bytes = 0

    def routes(self) -> Routes:
        """Routes for a socket that only the node's owner may open."""
        return {CONFIDENTIAL_PATH: {"POST": self.embeddings}}

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """Unsigned, as the socket is private."""
        body = await self.read_body(request)
        try:
            reply, _ = await self.answer(body)
            return web.Response(body=reply, headers={"Content-Type": COMPACT})
        except errors.Overloaded as failure:
            return queue_full(failure)
        finally:
            self.give_back(body)

    async def read_body(self, request: web.BaseRequest) -> bytes:
        """The body of a request; for `give_back`. Raises as `receive.read_body`."""
        return await read_body(request, SEALED_CALL_BYTES_MAX, self._bodies, content_type=COMPACT)

    def give_back(self, body: bytes) -> None:
        """A body is done with."""
        self._bodies.give_back("", len(body))

    def begin(self, body: bytes, done: CompactDone) -> Callable[[], object]:
        """Answer a call, later; returns what drops it if its caller goes."""
        return asyncio.get_running_loop().create_task(self._answer_to(body, done)).cancel

    async def answer(self, body: bytes) -> tuple[bytes, int]:
        """The answer to a body that has just come, and the tokens that were embedded for it.

        Raises Overloaded, InvalidType for what is no sealed call, NoNodeAvailable, DeadlineExceeded, NodeFailure.
        """
        arrived, arrived_ms = self._clock.monotonic(), self._clock.unix_ms()
        self._refusals.check_room()
        try:
            call = DECODE(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise errors.InvalidType("The body is not a sealed call of the node protocol.") from None
        opener = self._opener.get()
        held = opener.find(call)
        seen = await self._look(opener, call, held)
        if held is None or seen.body is None or held.of.has_seen(seen.replay):
            return await self._refuse(seen, arrived, arrived_ms)
        try:
            asked = await self._read(call, seen.body)
        except errors.CallerFailure as failure:
            self._metrics.confidential("refused")
            return seen.seal(envelope(failure), status=400, tokens=0, time_ms=self._clock.unix_ms()), 0
        if held.of.has_seen(seen.replay):  # meanwhile
            return await self._refuse(seen, arrived, arrived_ms)
        held.of.remember(seen.replay)
        try:
            reply = await self._embed(seen, asked)
        except errors.Overloaded:
            # Nothing of it was embedded, and the gateway may send it again. After any other failure it stays: somebody
            # who gets no answer for it could else have it embedded again and again.
            held.of.forget(seen.replay)
            raise
        self._metrics.confidential("answered")
        return reply, asked.counted.tokens

    async def _answer_to(self, body: bytes, done: CompactDone) -> None:
        try:
            reply, tokens = await self.answer(body)
        except Exception as error:  # noqa: BLE001 - `done` explains it, and counts a bug of ours
            done(error, 0)
        else:
            done(reply, tokens)

    async def _look(self, opener: "Opener", call: SealedCall, held: "HeldKey | None") -> "SeenCall":
        key = None if held is None else held.key
        if len(call.ciphertext) <= SOON_BYTES_MAX:
            return opener.look(call, key)
        return await self._in_thread(opener.look, call, key)

    async def _refuse(self, seen: "SeenCall", arrived: float, arrived_ms: int) -> tuple[bytes, int]:
        """The one refusal. Neither what it says nor when depends on what was wrong."""
        self._metrics.confidential("refused")
        reply = seen.refuse(arrived_ms)
        await self._refusals.wait(arrived)
        return reply, 0

    async def _read(self, call: SealedCall, body: bytes) -> _Asked:
        """What is asked, held to the words of the call around it. Raises a CallerFailure, and Overloaded."""
        if not self._can_render:
            await self._in_thread(importlib.import_module, RENDER)
            self._can_render = True
        from embedmesh.dialects.openai.render import reply_bytes_max

        if len(body) > REQUEST_BODY_BYTES_MAX:
            raise errors.BodyTooLarge(f"The sealed request has more than {REQUEST_BODY_BYTES_MAX:,} bytes. Split it.")
        asked, served, counted = await self._app.read(body, can_pay_for=_covered_by(call.units))
        if asked.model != call.model_name or served.model.id != call.model:
            raise errors.InvalidValue("The sealed request names another model than was locked.", param="model")
        if counted.tokens > call.units:
            raise _not_covered(f"{counted.tokens:,}", call.units)
        reply_bytes = reply_bytes_max(asked, served.model.width)
        if reply_bytes > REPLY_BYTES_MAX:
            raise errors.TooManyInputs('The reply would be too large. Split the inputs, or ask for "base64".')
        return _Asked(asked, served, counted, reply_bytes)

    async def _embed(self, seen: "SeenCall", asked: _Asked) -> bytes:
        """The answer with vectors. Raises Overloaded, DeadlineExceeded, NodeFailure."""
        model, counted = asked.served.model, asked.counted
        if self._reply_bytes and self._reply_bytes + asked.reply_bytes > REPLIES_BYTES_MAX:
            raise errors.Overloaded("This node is making as many sealed replies as it may at one time.")
        begun = self._clock.monotonic()
        self._reply_bytes += asked.reply_bytes
        try:
            assert counted.ids is not None  # there was a tokenizer
            data = await asked.served.embed(list(map(numbers_of, counted.ids)), alone=True)
            self._metrics.answered(model.id, len(counted.ids), counted.tokens, self._clock.monotonic() - begun)
            if len(counted.ids) * model.width <= SOON_COMPONENTS_MAX:
                return self._write(seen, asked, data)
            return await self._in_thread(self._write, seen, asked, data)
        except errors.Overloaded:
            self._metrics.refused(model.id)
            raise
        finally:
            self._reply_bytes -= asked.reply_bytes

    def _write(self, seen: "SeenCall", asked: _Asked, data: bytes) -> bytes:
        """The ordinary reply, sealed."""
        from embedmesh.dialects.openai.render import render

        tokens = asked.counted.tokens
        answer = Answer(data, asked.served.model.width, tokens, (Share(SELF, tokens),))
        body = render(asked.call, asked.counted.truncated, answer, {}).body
        return seen.seal(body, status=200, tokens=tokens, time_ms=self._clock.unix_ms())

    async def _in_thread(self, function: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *given)


def _covered_by(units: int) -> CanPayFor:
    """For `NodeApp.read`: no more is counted than was locked."""

    def check(tokens: int) -> None:
        if tokens > units:
            raise _not_covered(f"{tokens:,} or more", units)

    async def of_model(_model: Model) -> CanPay:
        return check

    return of_model


def _not_covered(tokens: str, units: int) -> errors.MaxTokensPerRequest:
    words = f"The inputs have {tokens} tokens, and the lock covers {units:,}. Lock more, or split."
    return errors.MaxTokensPerRequest(words, param="input")
