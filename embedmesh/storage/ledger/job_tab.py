"""The money of jobs: a tab of its own for each, its budget; a row for each key, first under way, then charged, once.

A row that is under way is to a job what a hold is to an account: its amount is set aside of the budget until its
attempt ends it, or its deadline passes. All writes about a job lock its account, so that they see each other.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from embedmesh.rules.errors import (
    Failure,
    IdempotencyConflict,
    InsufficientQuota,
    InsufficientScope,
    InternalError,
    NotFound,
    RateLimited,
)
from embedmesh.rules.file_failures import JobOver
from embedmesh.rules.holds import Charge, Hold
from embedmesh.rules.jobs import KeyedRequest, KeyedStart, NewJob, may_recompute
from embedmesh.rules.limits import (
    JOB_GRACE_S,
    JOB_RECOMPUTES_MAX,
    JOB_REQUESTS_MAX,
    JOBS_OF_ACCOUNT_A_DAY_MAX,
    JOBS_OPEN_OF_ACCOUNT_MAX,
)
from embedmesh.rules.money import format_usd
from embedmesh.rules.tabs import TabState
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.charge_holds import REVENUE, node_account
from embedmesh.storage.ledger.open_tab import end_tabs
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.settle_tab import Delivered, SettleTab, settle
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, Write, as_rows, later_ids
from embedmesh.storage.sql import JOBS_SQL

TOO_MANY_AGAIN_S = 60.0  # when to try again while an account has too many jobs

logger = logging.getLogger(__name__)

GiveBack = Callable[[KeyedRequest, KeyedStart], None]
"""Ends what has begun and nobody hears of."""


class JobMet(NamedTuple):
    """A job as a request meets it: a row of `job_of_request`. `under_way` is what other requests have set aside."""

    account_id: str
    key_id: str
    tab_state: str
    expires_ms: int
    budget: int
    charged: int
    under_way: int
    requests: int
    tokens: int
    recomputed_tokens: int


class OpenJob(PlaceHold):
    """Set a job's budget aside. `outcome` becomes None once that is durable, or raises what PlaceHold does."""

    rank = 4  # as OpenTab

    def __init__(self, job_id: str, new: NewJob, since_id: str, give_back: Callable[[Hold], None]) -> None:
        """`since_id`: ids of jobs of the last day follow it."""
        hold = Hold(job_id, new.account_id, new.budget_nanousd, 0, new.key_id)
        super().__init__(hold, job_id, None, give_back)
        self._values = msgspec.structs.asdict(new) | {
            "job_id": job_id,
            "amount": new.budget_nanousd,
            "lasts_ms": new.lasts_s * 1000,
            "grace_ms": int(JOB_GRACE_S * 1000),
            "since_id": since_id,
        }
        self._too_many: Failure | None = None

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[OpenJob]") -> None:  # type: ignore[override]
        for write in writes:
            write._placed_ids, write._placed, write._refusal, write._too_many = None, False, None, None
            if write._is_wanted():
                write._open(db, write._values | {"now_ms": now_ms})

    def _open(self, db: Db, values: dict[str, object]) -> None:
        ((mine, today),) = db.execute(JOBS_SQL["count_jobs"], values).fetchall()
        if mine >= JOBS_OPEN_OF_ACCOUNT_MAX:
            words = f"An account may have {JOBS_OPEN_OF_ACCOUNT_MAX} jobs that are not over. Cancel one."
            self._too_many = RateLimited(words, retry_after_s=TOO_MANY_AGAIN_S)
        elif today >= JOBS_OF_ACCOUNT_A_DAY_MAX:
            words = f"An account may make {JOBS_OF_ACCOUNT_A_DAY_MAX:,} jobs in 24 hours. Put more texts in each."
            self._too_many = RateLimited(words, retry_after_s=TOO_MANY_AGAIN_S)
        else:
            self._placed_ids = later_ids(db, JOBS_SQL["open_job_tab"], values)
            db.execute(JOBS_SQL["create_job"], values)

    def committed(self, stats: Stats) -> None:
        stats.tabs_opened += self._placed
        if self._too_many is not None:
            self._fail(self._too_many)
        elif self.outcome.done():
            if self._placed:
                self._give_back(self.hold)
        elif self._refusal is not None:
            self._fail(self._refusal.failure)
        else:
            self._succeed(None)


class BeginKeyed(WaitedWrite[KeyedStart]):
    """Set money of a job aside for one request. `outcome` becomes what has begun once that is durable, or raises."""

    rank = 3  # as PlaceHold

    def __init__(self, request: KeyedRequest, owner: str, give_back: GiveBack) -> None:
        super().__init__()
        self._request = request
        self._owner = owner
        self._give_back = give_back
        self._start: KeyedStart | None = None
        self._refusal: Failure | None = None

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self._request.hold.account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[BeginKeyed]") -> None:
        for write in writes:
            write._start = write._refusal = None
            if not write.outcome.done():  # else the caller has gone
                try:
                    write._start = write._begin(db, now_ms)
                except Failure as refusal:
                    write._refusal = refusal

    def _begin(self, db: Db, now_ms: int) -> KeyedStart:
        """Raises what becomes of a request that may not begin."""
        request, claim = self._request, self._request.claim
        which = {"job_id": request.job_id, "key_hash": claim.key_hash}
        job = met(db, request.hold, now_ms)
        found = db.execute(JOBS_SQL["find_request"], which).fetchone()
        if found is not None:
            body_hash, attempt, deadline_ms, done_ms = found
            if bytes(body_hash) != claim.body_hash:
                raise IdempotencyConflict(
                    "This Idempotency-Key was used for another body in this job. Use a new key for a new body."
                )
            if done_ms is not None:
                _check_recompute(job, request)
                db.execute(JOBS_SQL["count_recomputed"], which | {"tokens": request.tokens})
                return KeyedStart.AGAIN
            if deadline_ms >= now_ms:
                return KeyedStart.RUNNING
            job = job._replace(under_way=job.under_way - _drop(db, request.job_id, attempt))
        _check_room(job, request)
        values = which | {
            "body_hash": claim.body_hash,
            "request_id": request.hold.hold_id,
            "attempt": request.attempt,
            "owner": self._owner,
            "amount": request.hold.amount_nanousd,
            "texts": request.texts,
            "tokens": request.tokens,
            "deadline_ms": request.hold.deadline_ms,
        }
        db.execute(JOBS_SQL["begin_request"], values)
        return KeyedStart.BEGUN

    def committed(self, stats: Stats) -> None:
        if self._refusal is not None:
            stats.holds_refused += 1
            self._fail(self._refusal)
        elif self._start is not None:
            stats.holds += self._start is KeyedStart.BEGUN
            if self.outcome.done():  # the caller went while the batch was being written
                self.unheard(self._start)
            else:
                self._succeed(self._start)

    def failed(self, reason: str) -> None:
        if self._start is KeyedStart.BEGUN:  # nobody knows whether the store has it
            self._give_back(self._request, self._start)
        super().failed(reason)

    def unheard(self, result: KeyedStart) -> None:
        if result is not KeyedStart.RUNNING:
            self._give_back(self._request, result)

    def refused(self, error: Exception) -> None:
        self._fail(InternalError("The ledger refused to set money of the job aside for this request."))


class EndKeyed(Write):
    """End a request of a job: with its charge, once, or without. Kept until it is durable: nobody waits for it."""

    def __init__(self, request: KeyedRequest, charge: Charge | None) -> None:
        self._request = request
        self._charge = charge
        self._charged = self._late = False

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        if self._charge is None:
            return {self._request.hold.account_id}
        nodes = {node_account(each.node_id) for each in self._charge.payables}
        return {self._request.hold.account_id, REVENUE, *nodes}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[EndKeyed]") -> None:
        charges: dict[tuple[str, str], list[Delivered]] = {}  # by job and account
        jobs = {write._request.job_id for write in writes}
        for write in writes:
            write._charged = write._late = False
            request = write._request
            if write._charge is None:
                _drop(db, request.job_id, request.attempt)
            elif write._finish(db, now_ms, write._charge):
                of_job = charges.setdefault((request.job_id, request.hold.account_id), [])
                of_job.append((request.hold.hold_id, write._charge))
        if charges:
            settle(db, now_ms, [SettleTab(*of_job, delivered) for of_job, delivered in charges.items()])
        end_closed(db, now_ms, sorted(jobs))

    def _finish(self, db: Db, now_ms: int, charge: Charge) -> bool:
        """Mark it done; whether it was not yet."""
        request = self._request
        which = {"job_id": request.job_id, "key_hash": request.claim.key_hash}
        more = {"attempt": request.attempt, "now_ms": now_ms, "cost": charge.cost_nanousd, "tokens": charge.tokens}
        done = db.execute(JOBS_SQL["finish_request"], which | more).fetchall()
        if done:
            db.execute(JOBS_SQL["count_request"], which | {"texts": done[0][0], "tokens": charge.tokens})
            self._charged = True
        else:
            found = db.execute(JOBS_SQL["find_request"], which).fetchone()
            ours = found is not None and found[1] == request.attempt and found[3] is not None
            self._late = not ours  # else by this very write, in a batch of which nobody heard
        return self._charged

    def committed(self, stats: Stats) -> None:
        stats.captured += self._charged
        stats.captured_under_tabs += self._charged
        stats.released += self._charge is None
        if self._late:
            stats.late_captures += 1
            request_id = self._request.hold.hold_id
            words = "request %s of a job had ended: delivered, not charged"
            logger.warning(words, request_id, extra={"request_id": request_id})


def met(db: Db, hold: Hold, now_ms: int) -> JobMet:
    """The job that a request names. Raises NotFound, InsufficientScope or JobOver."""
    found = db.execute(JOBS_SQL["job_of_request"], {"job_id": hold.tab_id}).fetchone()
    job = None if found is None else JobMet(*found)
    if job is None or job.account_id != hold.account_id:
        raise no_such_job()
    if job.key_id != hold.key_id:
        raise InsufficientScope("This job is of another API key of the account, whose budget it has. Use that key.")
    if job.tab_state != TabState.OPEN.value or job.expires_ms <= now_ms:
        raise JobOver("The job is closed or has expired: nothing more is charged to it. Open another one.")
    return job


def no_such_job() -> NotFound:
    return NotFound("This account has no such job. GET /v1/jobs lists those that it has.")


def end_closed(db: Db, now_ms: int, job_ids: Sequence[str]) -> None:
    """End the tabs of those jobs that are closed and have nothing under way."""
    ended = db.execute(JOBS_SQL["closed_jobs"], as_rows([(job_id,) for job_id in job_ids])).fetchall()
    end_tabs(db, now_ms, [tab_id for (tab_id,) in ended], TabState.CLOSED)


def close_job(db: Db, now_ms: int, account_id: str, job_id: str) -> None:
    """Nothing more begins; what was not spent goes back once nothing is under way. Harmless for one that is over."""
    values = {"account_id": account_id, "job_id": job_id}
    db.execute(JOBS_SQL["close_job"], values | {"now_ms": now_ms})
    db.execute(JOBS_SQL["close_job_tab"], values)
    end_closed(db, now_ms, [job_id])


def drop_attempts(db: Db, now_ms: int, attempts: Sequence[tuple[str, str]]) -> int:
    """End attempts (job, attempt) that nobody ends any more; how many were still under way."""
    dropped = db.execute(JOBS_SQL["drop_requests"], as_rows(attempts)).fetchall()
    end_closed(db, now_ms, sorted({job_id for job_id, _ in attempts}))
    return len(dropped)


def _drop(db: Db, job_id: str, attempt: str) -> int:
    """End one attempt; the money that it had set aside."""
    dropped = db.execute(JOBS_SQL["drop_requests"], as_rows([(job_id, attempt)])).fetchall()
    return sum(amount for (amount,) in dropped)


def _check_room(job: JobMet, request: KeyedRequest) -> None:
    needs = request.hold.amount_nanousd
    if job.budget - job.charged - job.under_way < needs:
        raise InsufficientQuota(
            f"The budget of {request.job_id}, {format_usd(job.budget)}, does not cover this request: it needs "
            f"{format_usd(needs)}, {format_usd(job.charged)} is charged and {format_usd(job.under_way)} is set aside "
            "for requests under way. Open another job."
        )
    if job.requests >= JOB_REQUESTS_MAX:
        raise InsufficientQuota(f"A job may have {JOB_REQUESTS_MAX:,} requests. Open another job.")


def _check_recompute(job: JobMet, request: KeyedRequest) -> None:
    if not may_recompute(request.tokens, job.tokens, job.recomputed_tokens):
        raise InsufficientQuota(
            f"{request.job_id} has had {job.recomputed_tokens:,} tokens computed again, free, and has paid for "
            f"{job.tokens:,}, which may be had {JOB_RECOMPUTES_MAX} times more. Keep the replies, or open another job."
        )
