"""A job: a budget that is set aside once, from which requests with an Idempotency-Key are charged.

Each key of a job is charged once, whatever dies on the way. The same request again is computed again, free of charge:
replies are not kept. What is free is bounded by what was paid.
"""

import hashlib
from enum import Enum
from typing import Protocol

import msgspec

from embedmesh.rules.holds import Charge, Claim, Hold
from embedmesh.rules.limits import JOB_RECOMPUTES_MAX
from embedmesh.rules.ports import Caller
from embedmesh.rules.tabs import TabState

JOB_ID_HEX = slice(4, 16)  # of its id: when it was made


class JobStatus(Enum):
    """Where a job stands, as its account sees it."""

    OPEN = "open"
    CLOSING = "closing"  # nothing more begins; what is under way is still charged
    CLOSED = "closed"  # by its account; what was not spent went back
    EXPIRED = "expired"  # its time is over; what was not spent went back, or goes within minutes


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for. `texts_total` is how many texts it will send, if it knows."""

    account_id: str
    key_id: str
    budget_nanousd: int
    lasts_s: int
    name: str | None = None
    texts_total: int | None = None


class StoredJob(msgspec.Struct, frozen=True):
    """A job as it is kept, its fields in the order in which statements select them. Times are Unix milliseconds.

    `texts` and `tokens` are those that were charged; `texts_lately` those of the last RATE_S.
    """

    job_id: str
    account_id: str
    key_id: str
    name: str | None
    texts_total: int | None
    created_ms: int
    expires_ms: int
    closed_ms: int | None
    tab_state: str
    ended_ms: int | None
    budget_nanousd: int
    charged_nanousd: int
    requests: int
    texts: int
    tokens: int
    recomputed_tokens: int
    texts_lately: int

    def status(self, now_ms: int) -> JobStatus:
        """Where it stands at that moment."""
        if self.ended_ms is not None:
            expired = self.closed_ms is None and self.tab_state == TabState.EXPIRED.value
            return JobStatus.EXPIRED if expired else JobStatus.CLOSED
        if self.closed_ms is not None:
            return JobStatus.CLOSING
        return JobStatus.EXPIRED if self.expires_ms <= now_ms else JobStatus.OPEN


class KeyedRequest(msgspec.Struct, frozen=True):
    """One attempt at a request of a job. Its hold is a part of the job's tab; `tokens` were counted."""

    attempt: str
    hold: Hold
    claim: Claim
    texts: int
    tokens: int

    @property
    def job_id(self) -> str:
        """The job that pays."""
        assert self.hold.tab_id is not None
        return self.hold.tab_id


class KeyedStart(Enum):
    """What became of an attempt to begin."""

    BEGUN = "begun"  # its money is set aside
    AGAIN = "again"  # its key was charged before: it is computed once more, free
    RUNNING = "running"  # another attempt has the key, and has not ended


class Jobs(Protocol):
    """Jobs in the store, as requests need them."""

    async def begin(self, request: KeyedRequest) -> KeyedStart:
        """Durably set money aside in the job, unless the key was charged before or another attempt has it.

        Raises NotFound, InsufficientScope, JobOver, IdempotencyConflict, InsufficientQuota or StoreUnavailable.
        """
        ...

    async def runs(self, request: KeyedRequest) -> bool:
        """Whether an attempt has the key that has not ended. Raises StoreUnavailable."""
        ...

    def end(self, request: KeyedRequest, start: KeyedStart, charge: Charge | None) -> None:
        """End what has begun: with its charge, or None where nothing was delivered. Written with the next batch."""
        ...

    async def left_nanousd(self, caller: Caller, job_id: str, claim: Claim) -> int | None:
        """What a new request may cost at most; None for a key that was charged before.

        Raises NotFound or StoreUnavailable.
        """
        ...


def job_request_id(job_id: str, key_hash: bytes) -> str:
    """The request id of a key of a job: always the same, so that the ledger can have it once only.

    It has the form of every request id (see `ids.new_id`), and the job's time.
    """
    rest = hashlib.blake2b(job_id.encode("utf-8", "replace") + key_hash, digest_size=10).hexdigest()
    return f"req_{job_id[JOB_ID_HEX]}{rest}"


def may_recompute(tokens: int, charged_tokens: int, recomputed_tokens: int) -> bool:
    """Whether a job may have that many tokens computed again: JOB_RECOMPUTES_MAX times what was paid, at the most."""
    return recomputed_tokens + tokens <= charged_tokens * JOB_RECOMPUTES_MAX
