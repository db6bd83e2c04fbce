"""A request at low priority that is too large for one turn: each turn gives out as many of its inputs as it is for.

Nothing else of it waits in the scheduler meanwhile. So a line of a batch with two thousand inputs delays others no
longer than a line with one.
"""

from embedmesh.fleet.leftover import Leftover, NodeTurn, PatientFleet
from embedmesh.fleet.spread import cut
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.forwarding import Asker, Part, Ticket
from embedmesh.rules.models import Model


class FleetOfTurn(PatientFleet):
    """The nodes for work that has this turn."""

    def __init__(self, leftover: Leftover, turn: NodeTurn) -> None:
        super().__init__(leftover)
        self._turn = turn

    def enter(
        self,
        model: Model,
        counted: Counted,
        account_id: str,
        asker: Asker,
        only: str | None = None,
        beginning: bytes | None = None,
    ) -> Ticket:
        if len(counted.lengths) == 1 or counted.tokens <= self._turn.given:
            return super().enter(model, counted, account_id, asker, only, beginning)
        self._leftover.entered()
        return Slices(self._leftover, self._turn, counted, asker)


class Slices:
    """Implements the port `Ticket`. A turn is over when all of its inputs are done."""

    def __init__(self, leftover: Leftover, turn: NodeTurn, counted: Counted, asker: Asker) -> None:
        """The first `turn` is there."""
        self._leftover = leftover
        self._scheduler = leftover.scheduler
        self._first = turn
        self._request = self._scheduler.open(turn.model, counted, turn.account_id, asker)
        self._rows = self._request.remainders.pop().rows
        self._waits: NodeTurn | None = None
        self._turn_of: dict[int, NodeTurn] = {}  # of inputs that were given out and are not done
        self._inputs: dict[NodeTurn, int] = {}  # how many that are, by turn
        self.may_ask_another, self.hedge_after_s = self._request.may_ask_another, self._request.hedge_after_s
        self.hedge = self._request.hedge
        self._give_out(turn)

    def ended(self, part: Part, failure: NodeFailure | None) -> bool:
        again = self._request.ended(part, failure)
        if not again:
            self._done(part)
        return again

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        self._request.abandoned(part, late=late)
        self._done(part)

    def leave(self) -> None:
        self._request.leave()
        self._rows = ()
        if self._waits is not None:
            self._waits.over()
        self._turn_of.clear()
        for turn in list(self._inputs):
            turn.over()
        self._inputs.clear()

    def _give_out(self, turn: NodeTurn) -> None:
        """As many inputs as a turn is for; the others wait for the next one, which comes before all others."""
        self._waits = None
        lengths = self._request.lengths
        taken = cut(lengths, self._rows, turn.given, len(self._rows))
        rows, self._rows = self._rows[: taken.inputs], self._rows[taken.inputs :]
        self._turn_of.update(dict.fromkeys(rows, turn))
        self._inputs[turn] = len(rows)
        self._scheduler.more(self._request, rows, taken.tokens)
        if self._rows and not self._request.left:
            tokens = sum(lengths[row] for row in self._rows)
            first = self._first
            self._waits = waits = NodeTurn(
                self._leftover, first.account_id, first.model, tokens, lambda: self._give_out(waits)
            )
            self._leftover.join(waits, again=True)

    def _done(self, part: Part) -> None:
        for row in part.rows:
            turn = self._turn_of.pop(row, None)  # none: both nodes of a hedge have ended
            if turn is None:
                continue
            self._inputs[turn] -= 1
            if not self._inputs[turn]:
                del self._inputs[turn]
                turn.over()
