"""A batch's life. A batch is a file of requests that is worked off later, for less; its results are files, too.

It is validated before anything is done: then it has a price, and a tab of its own over the sum of all its lines. It is
cut into units of some lines. A unit is worked off as often as needed and settled once: its results and its charges
become durable in one step. Any gateway goes on with a batch whose gateway fell silent.
"""

from enum import Enum

import msgspec

from embedmesh.rules.ids import OWN_ID
from embedmesh.rules.limits import BYTES_A_TOKEN_MAX
from embedmesh.rules.money import TOKENS_PER_PRICE_UNIT, cost_nanousd

PRICE_RATIO_PPM = 500_000  # of the ordinary price, in millionths: half, as at OpenAI
LINE_DIGITS = 8  # hex digits of a line's number in its request id
FREE_BYTES_KEPT = 1024 * 1024  # by an account without money, to try with; a thousand of these take a gigabyte
OUTPUT_TIMES = 64  # what an output takes of that: its errors have six times the bytes of a short line
OUTPUT_BYTES_A_TOKEN_MAX = 64 * 1024  # a text of two tokens as 4,096 decimals takes 90 kB


class BatchState(Enum):
    """Where a batch stands, in OpenAI's words. The last four are final."""

    VALIDATING = "validating"  # its file is read; nothing is done yet
    IN_PROGRESS = "in_progress"  # its money is set aside, its units are worked off
    FINALIZING = "finalizing"  # all units are done, the output files are written
    CANCELLING = "cancelling"  # no unit is begun; what is done yet is written to the output files
    COMPLETED = "completed"
    FAILED = "failed"  # the file was not right, or the money did not suffice; nothing was done
    EXPIRED = "expired"  # its time was over before its last unit was done
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing follows."""
        return self in FINAL


FINAL = frozenset({BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED, BatchState.CANCELLED})


class BatchMove(Enum):
    """What moves a batch on."""

    BEGIN = "begin"  # the file is right, and its money is set aside
    FAIL = "fail"  # the file is not right, or the money does not suffice
    FINALIZE = "finalize"  # the last unit is done
    COMPLETE = "complete"  # its output files are there
    CANCEL = "cancel"  # its account wants no more of it, or its key was revoked
    END_CANCELLED = "end_cancelled"  # the output files of what was done are there
    EXPIRE = "expire"  # its time is over, and the output files of what was done are there


MOVES: dict[tuple[BatchState, BatchMove], BatchState] = {
    (BatchState.VALIDATING, BatchMove.BEGIN): BatchState.IN_PROGRESS,
    (BatchState.VALIDATING, BatchMove.FAIL): BatchState.FAILED,
    (BatchState.VALIDATING, BatchMove.CANCEL): BatchState.CANCELLING,
    (BatchState.VALIDATING, BatchMove.EXPIRE): BatchState.EXPIRED,
    (BatchState.IN_PROGRESS, BatchMove.FINALIZE): BatchState.FINALIZING,
    (BatchState.IN_PROGRESS, BatchMove.CANCEL): BatchState.CANCELLING,
    (BatchState.IN_PROGRESS, BatchMove.EXPIRE): BatchState.EXPIRED,
    (BatchState.FINALIZING, BatchMove.COMPLETE): BatchState.COMPLETED,
    (BatchState.CANCELLING, BatchMove.END_CANCELLED): BatchState.CANCELLED,
}
"""What is not in this table cannot happen; the store's SQL is checked against it by a test."""


class UnitState(Enum):
    """Where a unit stands. It is done once; until then nobody is charged for it."""

    OPEN = "open"
    DONE = "done"


class UnitEnd(Enum):
    """What became of a unit whose results were handed in. Only `DONE` has charged anything."""

    DONE = "done"
    DONE_BEFORE = "done_before"  # by somebody else, or by a write of which nobody heard: drop these results
    NO_MONEY = "no_money"  # the batch's tab has ended, so its time is over: drop these results


class FilePurpose(Enum):
    """What a file is for."""

    BATCH = "batch"  # requests
    BATCH_OUTPUT = "batch_output"  # results


class LeaseLost(Exception):
    """Another gateway has the batch, or it has ended: stop working on it. Nothing was written."""


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """A file without its contents. Times are Unix milliseconds; `bytes` are those of its plain contents."""

    file_id: str
    account_id: str
    filename: str
    purpose: FilePurpose
    bytes: int
    created_ms: int
    expires_ms: int
    deleted_ms: int | None = None  # nobody sees it any more; a batch that is not over may still read it


class LineError(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wrong with a line of a batch's file, or, without a line, with the file."""

    code: str
    message: str
    line: int | None = None  # from 1 on
    param: str | None = None


class UsedTokens(msgspec.Struct, frozen=True):
    """Tokens that a batch has used, by meter."""

    input: int = 0
    cached: int = 0  # of the input
    output: int = 0


class NewBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for. `metadata` is shown to the account as it came."""

    account_id: str
    key_id: str
    input_file_id: str
    endpoint: str
    window_s: int  # until it expires
    metadata: dict[str, str] | None = None
    output_expires_s: int


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as it is kept. Times are Unix milliseconds, None for what has not happened.

    `prices` are the batch's own, in nano-USD per million by the name of their meter, fixed when it was validated.
    `total`, `completed` and `failed` count lines; `units` are all its units.
    """

    batch_id: str
    account_id: str
    key_id: str
    state: BatchState
    endpoint: str
    model: str | None
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    window_s: int
    output_expires_s: int
    metadata: dict[str, str] | None
    errors: tuple[LineError, ...]
    prices: dict[str, int]
    amount_nanousd: int  # of its tab: what all lines cost together
    units: int
    total: int
    completed: int
    failed: int
    used: UsedTokens
    created_ms: int
    expires_ms: int
    in_progress_ms: int | None
    finalizing_ms: int | None
    completed_ms: int | None
    failed_ms: int | None
    expired_ms: int | None
    cancelling_ms: int | None
    cancelled_ms: int | None


class BatchLease(msgspec.Struct, frozen=True):
    """That a gateway has a batch. Every later lease of it has a higher `epoch`: an older one is worth nothing."""

    batch_id: str
    account_id: str
    epoch: int


class BatchUnit(msgspec.Struct, frozen=True, array_like=True):
    """Some lines of a batch's file: where they are in it, and what they need. `unit` and `first_line` count from 0."""

    unit: int
    first_byte: int
    bytes: int
    first_line: int
    lines: int
    tokens: int


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the validation of a batch has found. `output_bytes` bounds its output files, whose room is kept for them."""

    model: str
    prices: dict[str, int]
    amount_nanousd: int
    units: int
    lines: int
    output_bytes: int


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Where a unit's results are: first the lines of the output file, then those of the error file."""

    name: str
    output_bytes: int
    error_bytes: int


def batch_price(price: int, ratio_ppm: int) -> int:
    """An ordinary price as that of a batch: `ratio_ppm` millionths of it, rounded up."""
    return cost_nanousd(price, ratio_ppm)


def bytes_paid_for(means_nanousd: int, price: int) -> int | None:
    """How many bytes an account may keep of files that it sends, for its money; None where the `price` is nothing.

    `means_nanousd` is what it has and has spent lately (`FileRows.means_nanousd`); `price` is the least of a batch, in
    nano-USD per million tokens. Text has some four bytes a token; at BYTES_A_TOKEN_MAX nobody who can pay for the work
    is refused the room for it.
    """
    if not price:
        return None
    tokens = max(0, means_nanousd) * TOKENS_PER_PRICE_UNIT // price
    return FREE_BYTES_KEPT + tokens * BYTES_A_TOKEN_MAX


def output_bytes_paid_for(means_nanousd: int, price: int) -> int | None:
    """How many bytes an account may keep of all files, outputs included, for its money; None where nothing costs."""
    if not price:
        return None
    tokens = max(0, means_nanousd) * TOKENS_PER_PRICE_UNIT // price
    return OUTPUT_TIMES * FREE_BYTES_KEPT + tokens * OUTPUT_BYTES_A_TOKEN_MAX


def line_request_id(batch_id: str, line: int) -> str:
    """The request id of a line, from 0 on, of a batch: always the same, so that the ledger can have it once only.

    It has the form of every request id (see `ids.new_id`): the batch's time, 48 of its random bits, the line's number.
    Raises ValueError for what is no id of a batch, or no such line.
    """
    if OWN_ID.fullmatch(batch_id) is None or not 0 <= line < 16**LINE_DIGITS:
        raise ValueError("not a line of a batch")
    return f"req_{batch_id.partition('_')[2][:-LINE_DIGITS]}{line:0{LINE_DIGITS}x}"


def line_of(batch_id: str, request_id: str) -> int | None:
    """Which line of a batch, from 0 on, has that request id; None if none has."""
    line = request_id[-LINE_DIGITS:]
    try:
        number = int(line, 16)
        return number if line_request_id(batch_id, number) == request_id else None
    except ValueError:
        return None
