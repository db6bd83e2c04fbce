"""Who may still stand in line. To be refused at once, and told when to come again, is better than to wait in vain.

What counts is how long a request would have to wait behind its own account's, not how long the line is: whoever asks
for more than its share is refused, and whoever asks for less is not. An account's share is the fleet, divided by those
in line; but nobody waits longer than the whole line takes.
"""

from collections.abc import Sequence

from embedmesh.fleet.candidates import Candidate
from embedmesh.fleet.fair_queue import FairQueue
from embedmesh.rules.errors import Overloaded

QUEUE_WAIT_S = 4.0  # who asks for a short text and waits longer has gone; when a rush is over, so is its line
STRETCH = 32.0  # large work may wait so many times as long as the fleet takes for it: callers of several threads do
QUEUE_WAIT_MAX_S = 200.0  # a third of the longest that any request may take
AGAIN_MAX_S = 30.0  # with jitter twice as much: SDKs do not wait longer, and come at once instead


def check_admission(
    waiting: FairQueue, account_id: str, tokens: int, candidates: Sequence[Candidate], nodes: int
) -> None:
    """Raises Overloaded where a request would wait too long. `candidates` are all `nodes`, or some of very many."""
    sampled = nodes / len(candidates)
    alone_s = _fleet_s(candidates, 1, tokens) / sampled
    patience_s = min(max(QUEUE_WAIT_S, STRETCH * alone_s), QUEUE_WAIT_MAX_S)
    ahead = waiting.ahead_of(account_id, tokens)
    own_s = _fleet_s(candidates, ahead.rests + 1, ahead.tokens + tokens) / sampled
    all_s = _fleet_s(candidates, waiting.rests + 1, waiting.tokens + tokens) / sampled
    if min(own_s * waiting.accounts_with(account_id), all_s) > patience_s + alone_s:
        raise Overloaded(
            "More of this account's work is waiting than can be done soon. Try again when some of it is done.",
            retry_after_s=min(patience_s, AGAIN_MAX_S),
        )


def _fleet_s(candidates: Sequence[Candidate], parts: int, tokens: int) -> float:
    """How long all of them together work on that."""
    return 1.0 / sum(1.0 / candidate.work_s(parts, tokens) for candidate in candidates)
