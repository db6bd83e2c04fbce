"""Which requests may enter the queue. An early refusal with a Retry-After is better than a wait in vain.

If an account's backlog exceeds what its share of the fleet can serve soon, the request is refused (503). The length of
the whole queue does not matter, so an account that asks for less than its share is not refused. A share is the fleet
divided by the accounts in the queue; no request waits longer than the whole queue takes.
"""

from collections.abc import Sequence

from embedmesh.fleet.candidates import Candidate
from embedmesh.fleet.fair_queue import FairQueue
from embedmesh.rules.errors import Overloaded

QUEUE_WAIT_S = 4.0  # callers with a short text give up after that; the queue of a rush ends with it
STRETCH = 32.0  # a large request may wait this multiple of its own time: callers with several threads do
QUEUE_WAIT_MAX_S = 200.0  # a third of the longest time of any request
OVERLOADED_RETRY_MAX_S = 30.0  # twice as much with jitter: SDKs ignore a longer Retry-After and retry at once


def check_admission(
    queue: FairQueue, account_id: str, tokens: int, candidates: Sequence[Candidate], nodes: int
) -> None:
    """Raises Overloaded where a request would wait too long. `candidates` are all `nodes`, or a sample of very many."""
    sampled = nodes / len(candidates)
    alone_s = _fleet_s(candidates, 1, tokens) / sampled
    wait_max_s = min(max(QUEUE_WAIT_S, STRETCH * alone_s), QUEUE_WAIT_MAX_S)
    ahead = queue.ahead_of(account_id, tokens)
    own_s = _fleet_s(candidates, ahead.remainders + 1, ahead.tokens + tokens) / sampled
    all_s = _fleet_s(candidates, queue.remainders + 1, queue.tokens + tokens) / sampled
    if min(own_s * queue.accounts_with(account_id), all_s) > wait_max_s + alone_s:
        raise Overloaded(
            "More of this account's work is waiting than can be done soon. Try again when some of it is done.",
            retry_after_s=min(wait_max_s, OVERLOADED_RETRY_MAX_S),
        )


def _fleet_s(candidates: Sequence[Candidate], parts: int, tokens: int) -> float:
    """How long all of them together work on some parts."""
    return 1.0 / sum(1.0 / candidate.work_s(parts, tokens) for candidate in candidates)
