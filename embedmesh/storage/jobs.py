"""Jobs in the store: opened, found and closed by their account; their requests begun and ended by gateways."""

import asyncio
from collections.abc import Mapping
from functools import partial

import msgspec

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.holds import Charge, Claim, Hold
from embedmesh.rules.ids import first_id, new_id
from embedmesh.rules.jobs import JobStatus, KeyedRequest, KeyedStart, NewJob, StoredJob
from embedmesh.rules.limits import JOB_KEPT_S, PAGE_ROWS_MAX
from embedmesh.rules.ports import Caller, Clock
from embedmesh.storage.batch_steps import AwaitWrite, Place
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.job_tab import (
    BeginKeyed,
    EndKeyed,
    JobMet,
    OpenJob,
    close_job,
    drop_attempts,
    no_such_job,
)
from embedmesh.storage.ledger.writes import KeptChange, SubmitWrite, WriteDurably
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import JOBS_SQL
from embedmesh.storage.times import MS_PER_DAY

RATE_S = 60  # over which a job's texts per second are told
CLOSE_WAIT_S = (0.02, 0.05, 0.1, 0.25, 0.5)  # between looks whether what is under way has ended; then it is told
ROWS_A_WRITE = 256  # about two milliseconds
LAST = "\x7f"  # sorts after every id


class JobsPage(msgspec.Struct, frozen=True):
    """A page of an account's jobs; `more`: there are others after it."""

    jobs: list[StoredJob]
    more: bool


class StoredJobs:
    """The jobs of one store, as the gateway `owner` sees them. Implements the port `Jobs`.

    Methods that wait raise StoreUnavailable, too.
    """

    def __init__(
        self,
        reads: Reads,
        write: WriteDurably,
        submit: SubmitWrite,
        outcome: AwaitWrite,
        place: Place,
        owner: str,
        clock: Clock,
    ) -> None:
        self._reads = reads
        self._write = write
        self._submit = submit
        self._outcome = outcome
        self._place = place
        self._owner = owner
        self._clock = clock

    # -- by their account

    async def open(self, new: NewJob) -> StoredJob:
        """Set the budget aside. Raises InsufficientQuota, which names the sum, or RateLimited.

        If it cannot be known whether the job was made, it is closed.
        """
        job_id, since_id = new_id("job", self._clock), first_id("job", self._clock.unix_ms() - MS_PER_DAY)
        await self._place(lambda: OpenJob(job_id, new, since_id, self._undo))
        try:
            return await self.find(new.account_id, job_id)
        except (StoreUnavailable, asyncio.CancelledError):
            self._undo(Hold(job_id, new.account_id, new.budget_nanousd, 0))
            raise

    async def find(self, account_id: str, job_id: str) -> StoredJob:
        """Raises NotFound."""
        values = {"account_id": account_id, "job_id": job_id, "since_ms": self._since_ms()}
        rows = await self._reads.ask(JOBS_SQL["find_job"], values)
        if not rows:
            raise no_such_job()
        return StoredJob(*rows[0])

    async def page(self, account_id: str, *, after: str | None = None, limit: int) -> JobsPage:
        """A page of at most `limit`, and PAGE_ROWS_MAX, of the account's jobs, the newest first, after `after`."""
        limit = min(limit, PAGE_ROWS_MAX)
        values = {"account_id": account_id, "after": after or LAST, "since_ms": self._since_ms(), "rows_max": limit + 1}
        rows = await self._reads.ask(JOBS_SQL["jobs_before"], values)
        return JobsPage([StoredJob(*row) for row in rows[:limit]], len(rows) > limit)

    async def close(self, account_id: str, job_id: str) -> StoredJob:
        """Begin nothing more; what is not spent goes back once nothing is under way, which is waited for a moment.

        One that is over stays as it is. Raises NotFound.
        """
        accounts = frozenset({account_id})
        await self._write(lambda db, now_ms: close_job(db, now_ms, account_id, job_id), accounts)
        for pause_s in CLOSE_WAIT_S:
            job = await self.find(account_id, job_id)
            if job.status(self._clock.unix_ms()) is not JobStatus.CLOSING:
                break
            await asyncio.sleep(pause_s)
        return await self.find(account_id, job_id)

    # -- for requests

    async def begin(self, request: KeyedRequest) -> KeyedStart:
        return await self._outcome(BeginKeyed(request, self._owner, self._give_back))

    async def runs(self, request: KeyedRequest) -> bool:
        which = {"job_id": request.job_id, "key_hash": request.claim.key_hash}
        rows = await self._reads.ask(JOBS_SQL["find_request"], which)
        return bool(rows) and rows[0][3] is None and rows[0][2] >= self._clock.unix_ms()

    def end(self, request: KeyedRequest, start: KeyedStart, charge: Charge | None) -> None:
        if start is KeyedStart.BEGUN:
            self._submit(EndKeyed(request, charge))
        elif charge is None:  # computed again, and not delivered: that counts for nothing
            self._submit(KeptChange(partial(_uncount, request), frozenset({request.hold.account_id})))

    async def left_nanousd(self, caller: Caller, job_id: str, claim: Claim) -> int | None:
        rows = await self._reads.ask(JOBS_SQL["job_of_request"], {"job_id": job_id})
        job = JobMet(*rows[0]) if rows else None
        if job is None or job.account_id != caller.account_id:
            raise no_such_job()
        found = await self._reads.ask(JOBS_SQL["find_request"], {"job_id": job_id, "key_hash": claim.key_hash})
        return None if found and found[0][3] is not None else job.budget - job.charged - job.under_way

    # -- upkeep

    async def sweep(self, now_ms: int) -> int:
        """End attempts whose deadline is before `now_ms`; how many."""
        rows = await self._reads.ask(JOBS_SQL["overdue_requests"], {"now_ms": now_ms, "rows_max": ROWS_A_WRITE})
        if not rows:
            return 0
        attempts, accounts = [(row[0], row[1]) for row in rows], frozenset(row[2] for row in rows)
        return await self._write(lambda db, now_ms: drop_attempts(db, now_ms, attempts), accounts)

    async def forget(self) -> int:
        """Delete the requests of jobs that are over, and jobs that were over long ago; how many rows."""
        total = 0
        for (job_id,) in await self._reads.ask(JOBS_SQL["unswept_jobs"], {"rows_max": PAGE_ROWS_MAX}):
            values = {"job_id": job_id, "rows_max": ROWS_A_WRITE}
            while deleted := await self._count("forget_requests", values):
                total += deleted
            await self._count("sweep_job", values)
        old = {"kept_from_ms": self._clock.unix_ms() - JOB_KEPT_S * 1000, "rows_max": ROWS_A_WRITE}
        return total + await self._count("forget_jobs", old)

    # -- within

    async def _count(self, statement: str, values: Mapping[str, object]) -> int:
        return await self._write(lambda db, _: db.execute(JOBS_SQL[statement], values).rowcount)

    def _give_back(self, request: KeyedRequest, start: KeyedStart) -> None:
        self.end(request, start, None)

    def _undo(self, hold: Hold) -> None:
        account_id, job_id = hold.account_id, hold.hold_id
        write = KeptChange(lambda db, now_ms: close_job(db, now_ms, account_id, job_id), frozenset({account_id}))
        self._submit(write)

    def _since_ms(self) -> int:
        return self._clock.unix_ms() - RATE_S * 1000


def _uncount(request: KeyedRequest, db: Db, now_ms: int) -> None:
    db.execute(JOBS_SQL["count_recomputed"], {"job_id": request.job_id, "tokens": -request.tokens})
