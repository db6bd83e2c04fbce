"""Chat, completions and images: what is asked of nodes, and what they answer. Nodes of other makes compute it."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Modality, Model

Generating = Literal["chat", "completions", "images"]
"""The modalities of generation."""

PATHS: dict[Modality, str] = {
    "chat": "chat/completions",
    "completions": "completions",
    "images": "images/generations",
}
"""By modality: the path at a node, below its `/v1/`."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One valid request to generate.

    `body` is what a node gets, written anew from what was validated, but for the model's name, the output limit and the
    members of streams. `texts` are all strings that reach the model's template; `messages` and `images` count those in
    it. `choices` counts the answers that are kept, `generated` those that are made. `limits` names the members of the
    body that hold the output limit, the caller's own word first.
    """

    modality: Generating
    model: str  # as sent
    body: dict[str, Any]
    texts: tuple[str, ...] = ()
    ids: int = 0  # token ids that the caller sent instead of text
    messages: int = 0
    images: int = 0  # image parts of the input; of an images request: how many are to be made
    choices: int = 1
    generated: int = 1
    output_max: int | None = None  # tokens of one answer, as the caller limits them
    limits: tuple[str, ...] = ("max_tokens",)
    stream: bool = False
    wants_usage: bool = False  # whether a stream's caller has asked for `usage`
    size: str | None = None  # of images, as "1024x1024"
    reply_form: str | None = None  # the form of the answer that its caller wants, in words of the dialect
    user: str | None = None
    ignored: tuple[str, ...] = ()  # names of members that change nothing


class TokenCounts(msgspec.Struct, frozen=True):
    """What a node says it has used, in tokens. Not believed yet: see `flow.usage`."""

    input: int
    output: int
    cached: int = 0  # of the input
    reasoning: int = 0  # of the output


class Piece(msgspec.Struct, frozen=True):
    """One event of a node's stream, as the caller may have it. `data` is JSON; None if nothing of it is for the caller.

    `text` is what it delivers: content, reasoning, names and arguments of tools. `usage` is the node's word, all of it
    until now; `data` does not hold it, so that a caller is told once, and what it pays: see `usage_event`.
    """

    data: bytes | None
    text: str = ""
    usage: TokenCounts | None = None
    finished: bool = False  # whether it ends an answer


class Whole(msgspec.Struct, frozen=True):
    """A node's whole reply, as the caller may have it: JSON. The other members are those of a `Piece`."""

    data: bytes
    text: str = ""
    usage: TokenCounts | None = None
    images: int = 0  # that it holds


class GenerationDialect(Protocol):
    """How requests and replies are written. Knows the rules only."""

    def parse(self, body: bytes, find: Callable[[str], Model]) -> tuple[Prompt, Model]:
        """The request, and the catalogue's model for it. `find` raises ModelNotFound. Raises a CallerFailure."""
        ...

    def whole(self, prompt: Prompt, model: Model, reply: bytes, request_id: str, created: int) -> Whole:
        """A node's reply by an allow-list. Raises NodeBroke for an error instead of a reply, WrongAnswer."""
        ...

    def piece(self, prompt: Prompt, model: Model, data: bytes, state: "StreamState") -> Piece:
        """One event of a node's stream by an allow-list. Raises NodeBroke for an error event, WrongAnswer."""
        ...

    def usage_event(self, prompt: Prompt, model: Model, usage: TokenCounts, state: "StreamState") -> bytes:
        """The last data event of a stream whose caller wants `usage`: JSON."""
        ...

    def with_usage(self, whole: Whole, usage: TokenCounts) -> bytes:
        """The same reply with this usage: JSON."""
        ...


class ToolCall(msgspec.Struct):
    """A call of a tool that a stream has begun. `index` is its place among those of its answer, as the caller has it.

    `node_index` and `id` are the node's words for it, None where it has said none.
    """

    index: int
    node_index: int | None
    id: str | None
    name: str = ""  # as far as it has come


class StreamState(msgspec.Struct):
    """What one stream's events share: the same id and time for all, and how far each of its answers has come."""

    request_id: str
    created: int  # Unix time in seconds
    tools: dict[int, list[ToolCall]] = {}  # by answer, in the order in which they have begun
    begun: set[int] = set()  # answers of which something was sent
    ended: set[int] = set()  # answers whose node has said why they ended
    events: int = 0


class GenerationRequest(msgspec.Struct, frozen=True):
    """What one attempt asks of a node: the body without the model's name, and how much may come back."""

    modality: Generating
    body: dict[str, Any]
    reply_bytes_max: int  # of a whole reply, or of all of a stream
    stream: bool = False


StreamEnd = Literal["done", "whole", "closed"]
"""What ended a stream: its own `[DONE]`; the end of its HTTP body; or only the connection's end, which may be a cut."""


class NodeStream(Protocol):
    """A stream of a node, whose status was a success. Closed once; it holds little of what was not asked for."""

    @property
    def end(self) -> StreamEnd | None:
        """What has ended it; None until `next` has given None."""
        ...

    async def next(self) -> bytes | None:
        """The data of the next event; None after the last.

        Raises a NodeFailure, also where the stream was cut, and for an error event: UpstreamRefused says what it says.
        """
        ...

    def close(self) -> None:
        """No more is wanted: the node can stop. Wakes who waits for `next` with NodeBroke."""
        ...


class GeneratingClient(Protocol):
    """One exchange with one node. `request_id` is our own."""

    async def generate(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> bytes:
        """The node's whole reply. Raises a NodeFailure; UpstreamRefused says what the node says."""
        ...

    async def stream(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> NodeStream:
        """The node's stream, once its head has come. Raises a NodeFailure."""
        ...
