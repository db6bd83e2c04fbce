"""Nodes that speak by a script, and a caller that reads: the edges of the flow of generation. The dialects are real."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from embedmesh.catalogue import Catalogue
from embedmesh.dialects.openai.chat import Chat
from embedmesh.dialects.openai.images import Images
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.expected import ExpectedOutput
from embedmesh.flow.generate import Generation
from embedmesh.flow.leases import Leases
from embedmesh.flow.paid import serve
from embedmesh.http.failures import envelope
from embedmesh.rules.errors import NodeBroke
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Part
from embedmesh.rules.generation import GenerationRequest, StreamEnd
from embedmesh.rules.models import Model
from tests.flow.world import CATALOGUE, GOOD_KEY, ScriptedWorld, make_world

CHAT = Model(
    id="acme/chat",
    width=0,
    max_tokens=1_000,
    price=1_000_000,  # a nano-USD a token
    modalities=("chat", "completions"),
    output_price=3_000_000,
    cached_price=500_000,
    output_max=20,
    template_tokens=10,
)
PAINTER = Model(
    id="acme/painter", width=0, max_tokens=300, price=0, modalities=("images",), image_prices={"1x1": 70, "2x2": 90}
)
HELLO = {"model": CHAT.id, "messages": [{"role": "user", "content": "Say something."}]}
INPUT_BOUND = len("Say something.") + 2 * CHAT.template_tokens
HELD = INPUT_BOUND * 1 + CHAT.output_max * 3

Step = bytes | BaseException | Callable[[], Any]


def event(text: str = "", usage: dict[str, int] | None = None, finish: str | None = None) -> bytes:
    """One event of a chat's stream."""
    choices: list[Any] = [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "/secret/path", "choices": choices}
    return json.dumps(chunk if usage is None else chunk | {"usage": usage}).encode()


def usage_event(prompt: int, completion: int) -> bytes:
    """The last event of a server that tells usage."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": usage}).encode()


def answer(text: str, **usage: int) -> bytes:
    """A whole reply to a chat."""
    message = {"role": "assistant", "content": text}
    reply = {"id": "x", "model": "/secret/path", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return json.dumps(reply | ({"usage": usage} if usage else {})).encode()


WORDS = (event("Well,"), event(" this"), event(" is."), event(finish="stop"))


class ScriptedStream:
    """Events one after another; a function is awaited, and an exception raised, in their place."""

    def __init__(self, steps: Sequence[Step], end: StreamEnd = "done") -> None:
        self._steps = list(steps)
        self._end: StreamEnd = end
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.end: StreamEnd | None = None
        self.read = 0

    async def next(self) -> bytes | None:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, bytes):
                self.read += 1
                return step
            waiting = asyncio.ensure_future(step())
            await asyncio.wait({waiting, self._closed}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self._closed.done():
                raise NodeBroke("closed")
        self.end = self._end
        return None

    def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    @property
    def closed(self) -> bool:
        return self._closed.done()


class Speakers:
    """Implements the port `GeneratingClient`: each attempt takes the next of the script."""

    def __init__(self, *script: bytes | BaseException | Sequence[Step]) -> None:
        self._script = list(script)
        self.asked: list[tuple[str, GenerationRequest]] = []
        self.streams: list[ScriptedStream] = []
        self.ends: StreamEnd = "done"

    async def generate(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> bytes:
        step = self._next(part, asked)
        assert isinstance(step, bytes)
        return step

    async def stream(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> ScriptedStream:
        step = self._next(part, asked)
        assert not isinstance(step, bytes)
        self.streams.append(ScriptedStream(step, self.ends))
        return self.streams[-1]

    def _next(self, part: Part, asked: GenerationRequest) -> bytes | Sequence[Step]:
        self.asked.append((part.node_id, asked))
        step = self._script.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step


def speaking_world(nodes: int = 1, models: Sequence[Model] = (CHAT, PAINTER)) -> ScriptedWorld:
    """A world whose nodes generate."""
    world = make_world(nodes=nodes)
    registry = world.fleet.registry
    for node in list(registry):
        node.reads_ids = False
        registry.answered_right(node, [model.id for model in models])
    return msgspec.structs.replace(world, catalogue=Catalogue((*CATALOGUE.models, *models)))


class Reader:
    """A caller that reads a reply: `parts` of a stream, at most `parts_max` of them, or the `body`."""

    def __init__(self, parts_max: int = 10_000) -> None:
        self.parts: list[bytes] = []
        self.body = b""
        self.headers: dict[str, str] = {}
        self.reply: StreamedReply | None = None
        self._parts_max = parts_max

    async def __call__(self, reply: Reply | StreamedReply) -> Delivery:
        self.headers = reply.headers
        if isinstance(reply, Reply):
            self.body = reply.body
            return Delivery.WHOLE
        self.reply = reply
        if not self._parts_max:
            raise ConnectionResetError
        async for part in reply.parts:
            self.parts.append(part)
            if len(self.parts) == self._parts_max:
                return Delivery.BROKEN_OFF
        return Delivery.WHOLE

    @property
    def events(self) -> list[Any]:
        """The JSON of all data events, and the bytes of the others."""
        return [json.loads(part[6:]) if part.startswith(b"data: {") else part for part in self.parts]

    @property
    def text(self) -> str:
        """All content."""
        choices = [choice for each in self.events if isinstance(each, dict) for choice in each.get("choices", ())]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


async def ask(
    world: ScriptedWorld,
    client: Speakers,
    body: dict[str, Any],
    reader: Reader,
    *,
    key: str = GOOD_KEY,
    leases: Leases | None = None,
) -> Outcome:
    """One request through the spine."""
    dialect = Images() if body["model"] == PAINTER.id else Chat()
    leases = leases or Leases(world.ledger, world.clock)
    operation = Generation(dialect, client, leases, ExpectedOutput(), envelope)

    async def receive(account_id: str) -> bytes:
        return json.dumps(body).encode()

    return await serve(world, operation, RequestHead(f"Bearer {key}"), receive, reader)
