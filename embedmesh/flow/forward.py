"""Ask a node; when it fails, ask another. The caller's hold covers all attempts, and is charged once."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from embedmesh.rules.deadlines import ATTEMPTS_MAX, attempt_s, request_s
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import (
    BadNodeResponse,
    DeadlineExceeded,
    Failure,
    NodeBusy,
    NodeFailure,
    NodeRefused,
    NodeTooSlow,
    NoNodeAvailable,
    Overloaded,
    WrongAnswer,
)
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Answer, Candidate, Clock, Fleet, NodeClient, Verify


def time_allowed_s(model: Model, tokens: int, fleet: Fleet) -> float:
    """Seconds that a request may take from now on, all attempts together. Decided once: its hold lasts as long.

    Raises NoNodeAvailable: with nobody to ask there is nothing to hold money for.
    """
    candidate = fleet.pick(model, tokens, ())
    if candidate is None:
        raise _told_to_caller(None)
    return request_s(candidate.expected_s)


async def forward(
    model: Model, counted: Counted, within_s: float, fleet: Fleet, client: NodeClient, clock: Clock, verify: Verify
) -> Answer:
    """A right answer from the node that would be done first, or from the next.

    Raises NoNodeAvailable, Overloaded, BadNodeResponse or DeadlineExceeded.
    """
    tried: list[str] = []
    last: NodeFailure | None = None
    try:
        async with asyncio.timeout(within_s):
            while len(tried) < ATTEMPTS_MAX:
                candidate = fleet.pick(model, counted.tokens, tried)
                if candidate is None:
                    break
                tried.append(candidate.node_id)
                try:
                    with _watched(fleet, candidate.node_id, counted.tokens, clock):
                        return await _attempt(candidate, model, counted, client, verify)
                except NodeFailure as failure:
                    last = failure
    except TimeoutError:
        raise DeadlineExceeded("The request took longer than it may. Send fewer or shorter inputs at once.") from None
    raise _told_to_caller(last)


async def _attempt(candidate: Candidate, model: Model, counted: Counted, client: NodeClient, verify: Verify) -> Answer:
    """One attempt on one node. Raises a NodeFailure."""
    try:
        async with asyncio.timeout(attempt_s(candidate.expected_s)):
            reply = await client.embed(candidate, model, counted.ids)
    except TimeoutError:
        raise NodeTooSlow("the attempt's deadline passed") from None
    verify(reply, model, counted)
    return Answer(data=reply.data, width=model.width, node_id=candidate.node_id)


@contextmanager
def _watched(fleet: Fleet, node_id: str, tokens: int, clock: Clock) -> Iterator[None]:
    """The fleet learns that an attempt began and how it ended, whatever happens."""
    began = clock.monotonic()
    fleet.began(node_id, tokens)
    try:
        yield
    except NodeFailure as failure:
        fleet.ended(node_id, tokens, clock.monotonic() - began, failure)
        raise
    except BaseException:
        fleet.abandoned(node_id, tokens)  # the caller went, or the request's own deadline passed
        raise
    fleet.ended(node_id, tokens, clock.monotonic() - began, None)


def _told_to_caller(last: NodeFailure | None) -> Failure:
    """What the caller hears when no attempt succeeded."""
    match last:
        case NodeBusy():
            return Overloaded("Every node is full of work. Try again shortly.")
        case NodeTooSlow():
            return DeadlineExceeded("No node answered in time. Try again.")
        case WrongAnswer() | NodeRefused():
            return BadNodeResponse("No node gave a right answer, so none was delivered. Try again.")
        case _:
            return NoNodeAvailable("No node serves this model right now. Try again shortly.")
