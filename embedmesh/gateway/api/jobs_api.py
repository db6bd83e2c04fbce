"""`/v1/jobs`: budgets from which requests are charged that name them, each `Idempotency-Key` once."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from embedmesh.gateway.api.key_bodies import Budget
from embedmesh.gateway.api.replies import Count, doc
from embedmesh.gateway.api.routes import Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import InsufficientQuota, InvalidValue
from embedmesh.rules.jobs import JobStatus, NewJob, StoredJob
from embedmesh.rules.limits import JOB_NAME_CHARS_MAX, JOB_S, JOB_S_MAX, JOB_TEXTS_MAX, JOBS_PAGE_ROWS_MAX
from embedmesh.rules.money import parse_usd
from embedmesh.rules.ports import EMBED_SCOPE, Clock
from embedmesh.storage.jobs import RATE_S, StoredJobs

JOB_SCOPE = (EMBED_SCOPE,)
JOBS_PAGE_ROWS = 20  # where `limit` is not given

UnixSeconds = Annotated[Count, doc("Unix time in seconds.")]


class NewJobRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A new job. One of `budget_usd` and `budget_nanousd` is needed."""

    budget_usd: Annotated[str, Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?$", description="As in `12.50`.")] | None = None
    budget_nanousd: Budget | None = None
    expires_in_s: Annotated[int, Meta(ge=1, le=JOB_S_MAX, description="A day by default.")] = JOB_S
    name: Annotated[str, Meta(max_length=JOB_NAME_CHARS_MAX, pattern=r"^[ -~]*$", description="ASCII.")] | None = None
    texts_total: (
        Annotated[int, Meta(ge=1, le=JOB_TEXTS_MAX, description="How many texts you will send, for `eta_s`.")] | None
    ) = None


class JobReply(msgspec.Struct, frozen=True, kw_only=True):
    """A job."""

    id: str
    object: Literal["embedmesh.job"]
    status: Annotated[JobStatus, doc("`closing`: what is under way is still charged, nothing more begins.")]
    name: str | None
    budget_nanousd: Count
    charged_nanousd: Count
    held_nanousd: Annotated[Count, doc("What of the budget is set aside and not charged; 0 once the job is over.")]
    requests: Annotated[Count, doc("That were charged.")]
    texts: Annotated[Count, doc("Of these requests.")]
    texts_total: Annotated[Count | None, doc("As announced when the job was opened.")]
    tokens: Annotated[Count, doc("Of these requests.")]
    recomputed_tokens: Annotated[Count, doc("Of requests that were charged before, and computed again free.")]
    texts_per_s: Annotated[float, Meta(ge=0, description="That were charged over the last minute.")]
    eta_s: Annotated[Count | None, doc("Seconds until `texts_total` at that rate; null where that is not known.")]
    created_at: UnixSeconds
    expires_at: UnixSeconds
    ended_at: Annotated[Count | None, doc("Unix time in seconds; null while money is set aside.")]


class JobList(msgspec.Struct, frozen=True):
    """A page of your account's jobs, the newest first."""

    object: Literal["list"]
    data: list[JobReply]
    has_more: Annotated[bool, doc("Whether there is another page: `after` is the last id of this one.")]


class JobQuery(msgspec.Struct, frozen=True):
    after: Annotated[str, Meta(max_length=64, description="List jobs after this one.")] = ""
    limit: Annotated[
        int, Meta(ge=1, le=JOBS_PAGE_ROWS_MAX, description=f"Jobs of the page; {JOBS_PAGE_ROWS} by default.")
    ] = JOBS_PAGE_ROWS


class JobsApi(Api):
    """Handlers for callers. Each sees the jobs of its own account."""

    TAG = "Jobs"

    def __init__(self, jobs: StoredJobs, bodies: BodyBudget, clock: Clock) -> None:
        self._jobs = jobs
        self.bodies = bodies
        self._clock = clock

    async def create_job(self, call: ApiCall[NewJobRequest, None]) -> JobReply:
        """Open a job.

        Its budget is set aside until you cancel it or it expires. Embedding requests with the header `x-embedmesh-job`
        and an `Idempotency-Key` are charged from it, each key once; the same request again is computed again, free, as
        long as what is free stays within four times what was paid.
        """
        body, caller = call.body, call.caller
        new = NewJob(
            account_id=caller.account_id,
            key_id=caller.key_id,
            budget_nanousd=_budget_of(body),
            lasts_s=body.expires_in_s,
            name=body.name,
            texts_total=body.texts_total,
        )
        return self._reply(await self._jobs.open(new))

    async def list_jobs(self, call: ApiCall[None, JobQuery]) -> JobList:
        """List your jobs. The newest first."""
        query = call.query
        page = await self._jobs.page(call.caller.account_id, after=query.after or None, limit=query.limit)
        return JobList("list", [self._reply(job) for job in page.jobs], page.more)

    async def get_job(self, call: ApiCall[None, None]) -> JobReply:
        """Get a job. What it has done and spent."""
        return self._reply(await self._jobs.find(call.caller.account_id, call.parameter))

    async def cancel_job(self, call: ApiCall[None, None]) -> JobReply:
        """End a job.

        Nothing more is charged to it but what is under way; what is not spent goes back. So a job ends also when all
        is done. One that is over stays as it is.
        """
        return self._reply(await self._jobs.close(call.caller.account_id, call.parameter))

    def _reply(self, job: StoredJob) -> JobReply:
        """A job as its account sees it."""
        status = job.status(self._clock.unix_ms())
        per_s = job.texts_lately / RATE_S
        left = None if job.texts_total is None else max(0, job.texts_total - job.texts)
        return JobReply(
            id=job.job_id,
            object="embedmesh.job",
            status=status,
            name=job.name,
            budget_nanousd=job.budget_nanousd,
            charged_nanousd=job.charged_nanousd,
            held_nanousd=0 if job.ended_ms is not None else job.budget_nanousd - job.charged_nanousd,
            requests=job.requests,
            texts=job.texts,
            texts_total=job.texts_total,
            tokens=job.tokens,
            recomputed_tokens=job.recomputed_tokens,
            texts_per_s=per_s,
            eta_s=None if left is None or not per_s or status is not JobStatus.OPEN else round(left / per_s),
            created_at=job.created_ms // 1000,
            expires_at=job.expires_ms // 1000,
            ended_at=None if job.ended_ms is None else job.ended_ms // 1000,
        )

    ROUTES = (
        Route("POST", "/v1/jobs", JOB_SCOPE, create_job, failures=(InsufficientQuota,)),
        Route("GET", "/v1/jobs", JOB_SCOPE, list_jobs),
        Route("GET", "/v1/jobs/{job_id}", JOB_SCOPE, get_job),
        Route("POST", "/v1/jobs/{job_id}/cancel", JOB_SCOPE, cancel_job),
    )


def _budget_of(body: NewJobRequest) -> int:
    """In nano-USD. Raises InvalidValue."""
    if (body.budget_usd is None) == (body.budget_nanousd is None):
        raise InvalidValue('Give the budget once: `budget_usd` as in "12.50", or `budget_nanousd`.', param="budget_usd")
    return parse_usd(body.budget_usd) if body.budget_usd is not None else body.budget_nanousd or 0
