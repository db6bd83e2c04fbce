"""What the flow and the fleet need of each other to have a request's inputs embedded: parts, tickets, answers."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.models import Model


class Part(msgspec.Struct, frozen=True, eq=False):
    """Some inputs of a request, for one node: what one attempt asks for.

    `rows` says which inputs; `tokens` counts theirs; `expected_s` is when the node should be done, in seconds from
    when the part was given to it; `ask` is what the node wants for it, in nano-USD per million tokens.
    """

    node_id: str
    rows: tuple[int, ...]
    tokens: int
    expected_s: float
    ask: int = 0


class Asker(Protocol):
    """A request that waits for nodes. It is called back at once or later; the calls must not wait."""

    def take(self, part: Part) -> None:
        """Ask that node for these inputs now, and then say how the part `ended`."""
        ...

    def give_up(self, last: NodeFailure | None) -> None:
        """No node is left for some inputs; `last` is why the last one failed, if any was asked."""
        ...


class Ticket(Protocol):
    """A request's place in the queue."""

    def ended(self, part: Part, failure: NodeFailure | None) -> bool:
        """A part was answered right, or failed. Returns whether the failed part waits for another node."""
        ...

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        """A part was given up, instead of `ended`, for a reason that does not count against the node.

        `late`: the request's time was over, so the node is at least that slow.
        """
        ...

    def may_ask_another(self, part: Part) -> bool:
        """Whether another node would be asked for a late part if it ended now."""
        ...

    def hedge_after_s(self, part: Part) -> float | None:
        """How long to wait before another node is asked for the part, too; None for never."""
        ...

    def hedge(self, part: Part) -> None:
        """A part is late: another node may get it, too."""
        ...

    def leave(self) -> None:
        """Take no more parts. Those that were taken still end."""
        ...


class Fleet(Protocol):
    """The nodes: which there are, how loaded they are, and which to ask."""

    def serves(self, model: Model) -> bool:
        """Whether a live node serves the model now."""
        ...

    def may_come(self, model: Model) -> bool:
        """Whether waiting may help: a node has served the model, or has yet to say what it serves."""
        ...

    def may_wait(self, model: Model, tokens: int, account_id: str) -> None:
        """Raises Overloaded if too much of the account's work is waiting."""
        ...

    def others_wait(self, model: Model, account_id: str) -> bool:
        """Whether any other account waits for a node of the model."""
        ...

    def expected_s(self, model: Model, tokens: int) -> float | None:
        """Seconds until a request of that many tokens would be done, behind all that waits; None without a node."""
        ...

    def enter(
        self,
        model: Model,
        counted: Counted,
        account_id: str,
        asker: Asker,
        only: str | None = None,
        beginning: bytes | None = None,
    ) -> Ticket:
        """Enter the queue; with `only`, for that node. Parts come at once if a node has room. Leave with the ticket.

        Requests with the same `beginning` go to the same node where that has room and is not much slower.

        Raises Overloaded.
        """
        ...

    def try_now(self, model: Model, counted: Counted, now: float) -> Part | None:
        """Give all inputs to a node as one part, if nobody waits and one that reads ids has room; else None.

        It ends by `answered_now` or `abandoned`, or is adopted.
        """
        ...

    def answered_now(self, part: Part, now: float) -> bool:
        """The part of `try_now` was answered right. Returns whether an Observer has to see that: of no trusted node."""
        ...

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        """A part was given up, for a reason that does not count against the node. `late`: see `Ticket`."""
        ...

    def adopt(self, model: Model, counted: Counted, account_id: str, asker: Asker, part: Part) -> Ticket:
        """A ticket for a request whose only part, of `try_now`, is running. The asker takes it at once."""
        ...


class AttemptOwner(Protocol):
    """Who began an attempt. It is told once how that ended. The calls must not wait."""

    def answered(self, vectors: EmbedVectors) -> None:
        """The node's answer, not yet checked."""
        ...

    def failed(self, failure: NodeFailure) -> None:
        """The attempt failed."""
        ...


class Attempt(Protocol):
    """An attempt under way. It has no deadline of its own."""

    def cancel(self) -> None:
        """Break it off, so that the node can stop. Its owner is told nothing more."""
        ...


class NodeLink(Protocol):
    """The link to one node.

    `request_id` is our own, the hold's; it is the same for all parts and attempts of a request.
    """

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        """The node's answer to a part, not yet checked. Raises a NodeFailure."""
        ...

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Attempt | None:
        """Begin an attempt at once. `owner` is told how it ends, never from inside of this call.

        None if it cannot begin at once, as without an idle connection: then `embed` can.
        """
        ...


class NodeClient(Protocol):
    """All nodes, by their ids."""

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        """As the link to the part's node."""
        ...

    @property
    def link_to(self) -> Callable[[str], NodeLink | None]:
        """The link to the node of that id; None if there is none."""
        ...


class Share(msgspec.Struct, frozen=True):
    """One node's share of a request, and its ask in nano-USD per million tokens."""

    node_id: str
    tokens: int
    ask: int = 0


class Observer(Protocol):
    """Sees what nodes answer to callers."""

    def answered(self, model: Model, counted: Counted, part: Part, reply: EmbedVectors) -> None:
        """A node gave an answer that passed all checks. Must not wait."""
        ...


class Answer(msgspec.Struct, frozen=True):
    """A checked answer: little-endian float32, `width` components an input, row after row.

    `tokens` were really embedded; `shares` says by whom, the node that did most first.
    """

    data: bytes
    width: int
    tokens: int
    shares: tuple[Share, ...]


Verify = Callable[[EmbedVectors, Model, Part, bool], None]
"""Answer, model, what was asked, and whether its tokens were counted exactly or are a bound. Raises WrongAnswer."""
