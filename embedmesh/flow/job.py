"""A request that names a job: its budget pays, once for each key; the same again is computed again, free.

The work and its delivery are those of every request. What differs is the ledger that its bill sees.
"""

from typing import Any, cast

import msgspec

from embedmesh.flow.bill import Bill, set_aside
from embedmesh.flow.deliver import REPLAYED, Done, Request, reply_headers, work_under
from embedmesh.flow.embed import Embedded, EncodingCall
from embedmesh.flow.idempotency import check_key
from embedmesh.flow.operation import CanPay, Operation
from embedmesh.flow.world import World
from embedmesh.rules.errors import InsufficientQuota, InvalidValue, MissingParameter, NotFound
from embedmesh.rules.exchange import JOB_HEADER, Reply, RequestHead
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, HoldState, PriorRequest
from embedmesh.rules.ids import new_id
from embedmesh.rules.jobs import Jobs, KeyedRequest, KeyedStart, job_request_id
from embedmesh.rules.models import Model
from embedmesh.rules.money import bill_nanousd, cost_nanousd, format_usd
from embedmesh.rules.ports import Caller, Clock


class JobLedger:
    """A job as the ledger of one of its requests. Implements `bill.Holds`; no reply is kept."""

    def __init__(self, jobs: Jobs, job_id: str, texts: int, tokens: int, clock: Clock) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._texts = texts
        self._tokens = tokens
        self._clock = clock
        self._request: KeyedRequest
        self.start: KeyedStart | None = None  # what has begun

    def spend(self, hold: Hold) -> Hold | None:
        """What a job has is in the store alone."""
        return None

    async def hold(self, hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        """See `Jobs.begin`; the attempt that runs is returned."""
        assert claim is not None
        part = msgspec.structs.replace(hold, tab_id=self._job_id)
        self._request = KeyedRequest(new_id("try", self._clock), part, claim, self._texts, self._tokens)
        self.start = await self._jobs.begin(self._request)
        return _running(hold, claim) if self.start is KeyedStart.RUNNING else None

    async def prior_request(self, hold: Hold, claim: Claim) -> PriorRequest | None:
        """The attempt that has the key, while it runs."""
        return _running(hold, claim) if await self._jobs.runs(self._request) else None

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        """What has begun was delivered."""
        assert self.start is not None
        self._jobs.end(self._request, self.start, charge)

    def release(self, hold: Hold, why: HoldEnd) -> None:
        """It was not."""
        assert self.start is not None
        self._jobs.end(self._request, self.start, None)


def check_job(world: World, operation: Operation, head: RequestHead) -> None:
    """Raise a CallerFailure for a request that no job can have."""
    if operation.result is not Embedded:
        raise InvalidValue(
            f"Only embeddings and reranking can be charged to a job: leave {JOB_HEADER} out.", param=JOB_HEADER
        )
    if head.idempotency_key is None:
        raise MissingParameter(
            f"A request with {JOB_HEADER} needs an Idempotency-Key: each key of a job is charged once.",
            param="Idempotency-Key",
        )
    check_key(head.idempotency_key)
    _jobs_of(world)


async def can_pay(
    world: World, operation: Operation, head: RequestHead, caller: Caller, body: bytes, model: Model | None
) -> CanPay | None:
    """What the job can pay, asked before work that is large; None for a key that was charged before."""
    assert head.job is not None and head.idempotency_key is not None
    claim = await world.turns.call(caller.account_id, world.claim_of, head.idempotency_key, body)
    left = await _jobs_of(world).left_nanousd(caller, head.job, claim)
    if left is None:
        return None
    price, most = operation.price_min(world, caller.account_id, model), max(0, left)

    def check(tokens: int) -> None:
        if (cost := cost_nanousd(tokens, price)) > most:
            raise InsufficientQuota(
                f"The job's budget does not cover this request: it needs at least {format_usd(cost)}, and "
                f"{format_usd(most)} is left. Open another job."
            )

    return check


async def under_job(world: World, request: Request, tokens: int) -> Done:
    """Set money of the job aside, have the work done and render the reply. Raises a Failure."""
    caller, call, head = request.caller, request.call, request.head
    assert head.job is not None and head.idempotency_key is not None
    bound = call.bound(world, caller, claimed=False)
    if isinstance(bound.free, Embedded):  # no node, no debt
        return Done(call.render(bound.free, reply_headers(world, request.began, 0)))
    claim = world.claim_of(head.idempotency_key, request.body)
    texts = len(cast(EncodingCall[Any], call).counted.lengths)  # or around one: see `check_job`
    ledger = JobLedger(_jobs_of(world), head.job, texts, tokens, world.clock)
    bill = await set_aside(
        ledger,
        caller,
        bill_nanousd(bound.metered),
        bound.within_s,
        world.clock,
        claim,
        world.waiting,
        slots=world.slots,
        request_id=job_request_id(head.job, claim.key_hash),
    )
    assert isinstance(bill, Bill), "a job keeps no reply"
    bill.free = ledger.start is KeyedStart.AGAIN
    done = await work_under(world, request, bill)
    assert isinstance(done.reply, Reply)
    headers = done.reply.headers | (REPLAYED if bill.free else {})
    return Done(msgspec.structs.replace(done.reply, headers=headers), bill)


def _jobs_of(world: World) -> Jobs:
    if world.jobs is None:
        raise NotFound("This gateway has no jobs.")
    return world.jobs


def _running(hold: Hold, claim: Claim) -> PriorRequest:
    return PriorRequest(claim.body_hash, hold.hold_id, HoldState.OPEN.value, None)
