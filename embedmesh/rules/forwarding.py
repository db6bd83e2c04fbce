"""What the flow and the fleet need of each other to have a request's inputs embedded: parts, tickets, answers."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.models import Model


class Part(msgspec.Struct, frozen=True, eq=False):
    """Some inputs of a request, for one node: what one attempt asks for.

    `places` says which inputs; `tokens` counts theirs; `expected_s` is when the node should be done, in seconds from
    when the part was given to it; `ask` is what the node wants for it, in nano-USD per million tokens.
    """

    node_id: str
    places: tuple[int, ...]
    tokens: int
    expected_s: float
    ask: int = 0


class Asker(Protocol):
    """Who waits in line for nodes. Called back at once or later; must not wait."""

    def take(self, part: Part) -> None:
        """These inputs are to be asked of that node now. Whoever takes a part says how it `ended`."""
        ...

    def give_up(self, last: NodeFailure | None) -> None:
        """No node is left for some of the inputs; `last` is why the last one failed, if any was asked."""
        ...


class Ticket(Protocol):
    """A request's place in line."""

    def ended(self, part: Part, failure: NodeFailure | None) -> bool:
        """A part was answered right, or failed. Whether what failed waits in line again, for another node."""
        ...

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        """A part was given up for a reason that says no ill of the node. In place of `ended`.

        With `late` the request's time was over: that says how slow the node is at least.
        """
        ...

    def may_ask_another(self, part: Part) -> bool:
        """Whether another node would be asked for a part that is late, if it ended now."""
        ...

    def hedge_after_s(self, part: Part) -> float | None:
        """How long to wait for a part before another node is asked, too; None to wait for this one only."""
        ...

    def hedge(self, part: Part) -> None:
        """A part is late: perhaps another node gets it, too."""
        ...

    def leave(self) -> None:
        """Want no more parts. Those that were taken still end."""
        ...


class Fleet(Protocol):
    """Which nodes there are, how loaded they are, and which to ask."""

    def serves(self, model: Model) -> bool:
        """Whether a live node serves the model now."""
        ...

    def may_come(self, model: Model) -> bool:
        """Whether waiting for a node may help: one has served the model, or has yet to say what it serves."""
        ...

    def may_wait(self, model: Model, tokens: int, account_id: str) -> None:
        """Raises Overloaded where too much of the account's is waiting already."""
        ...

    def expected_s(self, model: Model, tokens: int) -> float | None:
        """Seconds until a request of so many tokens would be done, behind all that waits; None without a node."""
        ...

    def enter(self, model: Model, counted: Counted, account_id: str, asker: Asker) -> Ticket:
        """Stand in line. Parts come at once where a node has room. Raises Overloaded. End by leaving the ticket."""
        ...


class NodeClient(Protocol):
    """One exchange with one node."""

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        """What the node says of a part of what was counted, not yet checked. Raises a NodeFailure.

        `request_id` is our own, the hold's; it is the same for all parts and attempts of a request.
        """
        ...


class Share(msgspec.Struct, frozen=True):
    """What one node did of a request, and what it wants for it, in nano-USD per million tokens."""

    node_id: str
    tokens: int
    ask: int = 0


class Observer(Protocol):
    """Sees what nodes answer to callers."""

    def answered(self, model: Model, counted: Counted, part: Part, reply: EmbedVectors) -> None:
        """A right answer, as far as one can tell by itself. Must not wait."""
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
