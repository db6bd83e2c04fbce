"""`/v1/batches`: files of requests that are worked off within a day, for less; as OpenAI's Batch API has it."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from embedmesh.flow.identify import may_use
from embedmesh.flow.world import World
from embedmesh.gateway.api.files_api import FILES_SCOPE
from embedmesh.gateway.api.replies import Count, doc
from embedmesh.gateway.api.routes import Api, ApiCall, Route, account_of, in_room
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import Handler
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.endpoints import Endpoints
from embedmesh.jobs.files import FileStore
from embedmesh.jobs.lines import BadLine, LineFinder, model_named, read_line
from embedmesh.jobs.runner import Runner
from embedmesh.rules.batches import Batch, BatchState, NewBatch
from embedmesh.rules.errors import InsufficientScope, InvalidValue, NotFound
from embedmesh.rules.file_failures import StorageFull
from embedmesh.rules.limits import (
    ACCOUNT_CALLS_MAX,
    BATCH_WINDOW_S,
    BATCHES_PAGE_ROWS_MAX,
    FILE_EXPIRES_S,
    FILE_EXPIRES_S_MAX,
    FILE_EXPIRES_S_MIN,
    METADATA_BYTES_MAX,
    METADATA_KEY_CHARS_MAX,
    METADATA_PAIRS_MAX,
    METADATA_VALUE_CHARS_MAX,
)
from embedmesh.rules.metrics import MetricReadings
from embedmesh.rules.ports import Caller
from embedmesh.rules.shares import Room
from embedmesh.storage.batches import Batches
from embedmesh.storage.files import FileRows

BATCHES_PAGE_ROWS = 20  # where `limit` is not given, as at OpenAI
MAY_CANCEL = (BatchState.VALIDATING, BatchState.IN_PROGRESS, BatchState.CANCELLING, BatchState.CANCELLED)

Time = Annotated[int | None, doc("Unix time in seconds; null for what has not happened.")]
FileId = Annotated[str | None, doc("Null for a file that would be empty.")]


class OutputExpiry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the output files expire."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=FILE_EXPIRES_S_MIN, le=FILE_EXPIRES_S_MAX)]


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A new batch."""

    input_file_id: Annotated[str, Meta(max_length=128)]
    endpoint: Annotated[str, Meta(max_length=64, description="Path that every line of the file names, too.")]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Meta(max_length=METADATA_KEY_CHARS_MAX)],
                Annotated[str, Meta(max_length=METADATA_VALUE_CHARS_MAX)],
            ],
            Meta(max_length=METADATA_PAIRS_MAX),
        ]
        | None
    ) = None
    output_expires_after: OutputExpiry | None = None


class BatchErrorReply(msgspec.Struct, frozen=True):
    """What is wrong with a line of the file, or with the file."""

    code: str
    message: str
    line: Annotated[int | None, doc("From 1 on; null for the file as a whole.")]
    param: str | None


class BatchErrors(msgspec.Struct, frozen=True):
    """Why the validation failed."""

    object: Literal["list"]
    data: list[BatchErrorReply]


class RequestCounts(msgspec.Struct, frozen=True):
    """Lines."""

    total: Count
    completed: Count
    failed: Count


class InputDetails(msgspec.Struct, frozen=True):
    """Of the input tokens."""

    cached_tokens: Count


class OutputDetails(msgspec.Struct, frozen=True):
    """Of the output tokens."""

    reasoning_tokens: Count


class BatchUsage(msgspec.Struct, frozen=True):
    """Tokens of all lines that are done and settled."""

    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: OutputDetails
    total_tokens: Count


class BatchReply(msgspec.Struct, frozen=True, kw_only=True):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: BatchState
    output_file_id: FileId
    error_file_id: FileId
    created_at: Count
    in_progress_at: Time
    expires_at: Count
    finalizing_at: Time
    completed_at: Time
    failed_at: Time
    expired_at: Time
    cancelling_at: Time
    cancelled_at: Time
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    held_nanousd: Annotated[Count, doc("What all lines cost together, set aside when the batch began.")]


class BatchList(msgspec.Struct, frozen=True):
    """A page of your batches, the newest first."""

    object: Literal["list"]
    data: list[BatchReply]
    first_id: str | None
    last_id: str | None
    has_more: Annotated[bool, doc("Whether there is another page: `after` is its last id.")]


class BatchQuery(msgspec.Struct, frozen=True):
    after: Annotated[str, Meta(max_length=64, description="List batches after this one.")] = ""
    limit: Annotated[
        int, Meta(ge=1, le=BATCHES_PAGE_ROWS_MAX, description=f"Batches of the page; {BATCHES_PAGE_ROWS} by default.")
    ] = BATCHES_PAGE_ROWS


class BatchesApi(Api):
    """Handlers for callers. Each sees the batches of its own account."""

    TAG = "Batches"

    def __init__(
        self,
        batches: Batches,
        files: FileStore,
        rows: FileRows,
        runner: Runner,
        world: World,
        endpoints: Endpoints,
        bodies: BodyBudget,
    ) -> None:
        self._batches = batches
        self._files = files
        self._rows = rows
        self._runner = runner
        self._world = world
        self._endpoints = endpoints
        self.bodies = bodies
        self._room = Room(
            ACCOUNT_CALLS_MAX,
            f"The gateway handles {ACCOUNT_CALLS_MAX} such calls at a time, shared among accounts. Try again shortly.",
        )

    def bounded(self, handler: Handler) -> Handler:
        return in_room(self._room, handler, account_of)

    def readings(self) -> MetricReadings:
        return {"batches_under_way": self._runner.under_way, **self._runner.counts.readings()}

    async def create_batch(self, call: ApiCall[BatchRequest, None]) -> BatchReply:
        """Create a batch.

        The requests of an uploaded file are worked off within a day, at a lower price, while nodes have nothing more
        urgent to do. What all of them cost together is set aside first; each is charged once it is done.
        """
        body, caller = call.body, call.caller
        operation = self._endpoints.get(body.endpoint)
        if operation is None:
            raise InvalidValue(f"`endpoint` must be one of {', '.join(self._endpoints)}.", param="endpoint")
        if operation.scope not in caller.scopes:
            raise InsufficientScope(f"This API key may not do this: it lacks the scope `{operation.scope}`.")
        if body.metadata and len(msgspec.json.encode(body.metadata)) > METADATA_BYTES_MAX:
            raise InvalidValue(f"`metadata` has more than {METADATA_BYTES_MAX:,} bytes.", param="metadata")
        expiry = body.output_expires_after
        if caller.models is not None:
            await self._check_model(caller, body.input_file_id, body.endpoint)
        if not body.input_file_id.isprintable():  # PostgreSQL takes no NUL
            raise NotFound("There is no such file with the purpose batch.", param="input_file_id")
        batch = await self._batches.create(
            NewBatch(
                account_id=caller.account_id,
                key_id=caller.key_id,
                input_file_id=body.input_file_id,
                endpoint=body.endpoint,
                window_s=BATCH_WINDOW_S,
                metadata=body.metadata,
                output_expires_s=FILE_EXPIRES_S if expiry is None else expiry.seconds,
            )
        )
        self._runner.look()
        return batch_reply(batch)

    async def _check_model(self, caller: Caller, file_id: str, endpoint: str) -> None:
        """A key for some models: the file's first line says for which one the batch is, all others must name the same.

        What is wrong with the file is told by its validation. Raises InsufficientScope.
        """
        if await self._rows.find(caller.account_id, file_id) is None:
            return  # creating the batch says so
        async with aclosing(self._files.read(file_id)) as pieces:
            name = await _first_model(pieces, endpoint)
        model = self._world.catalogue.find(name) if name is not None else None
        if model is not None:
            may_use(caller, model)

    async def list_batches(self, call: ApiCall[None, BatchQuery]) -> BatchList:
        """List your batches. The newest first."""
        query = call.query
        page = await self._batches.page(call.caller.account_id, after=query.after or None, limit=query.limit)
        data = [batch_reply(each) for each in page.batches]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return BatchList("list", data, first, last, page.more)

    async def get_batch(self, call: ApiCall[None, None]) -> BatchReply:
        """Get a batch. Its state, its counts, and its files once it has ended."""
        return batch_reply(await self._find(call))

    async def cancel_batch(self, call: ApiCall[None, None]) -> BatchReply:
        """Cancel a batch.

        Nothing more of it is begun. Lines that are done stay done; the others are in its error file, and cost nothing.
        """
        before = await self._find(call)
        if before.state not in MAY_CANCEL:
            raise InvalidValue(f"The batch is {before.state.value}: it cannot be cancelled any more.")
        batch = await self._batches.cancel(call.caller.account_id, call.parameter)
        self._runner.look(call.parameter)
        return batch_reply(batch or before)

    async def _find(self, call: ApiCall[None, None]) -> Batch:
        batch = await self._batches.find(call.caller.account_id, call.parameter)
        if batch is None:
            raise NotFound("This account has no such batch. GET /v1/batches lists those that it has.")
        return batch

    ROUTES = (
        Route("POST", "/v1/batches", FILES_SCOPE, create_batch, failures=(NotFound, StorageFull)),
        Route("GET", "/v1/batches", FILES_SCOPE, list_batches),
        Route("GET", "/v1/batches/{batch_id}", FILES_SCOPE, get_batch),
        Route("POST", "/v1/batches/{batch_id}/cancel", FILES_SCOPE, cancel_batch, failures=(InvalidValue,)),
    )


async def _first_model(pieces: AsyncIterator[bytes], endpoint: str) -> str | None:
    """The model that the file's first line names."""
    finder = LineFinder()
    try:
        async for piece in pieces:
            for found in finder.feed(piece):
                return model_named(read_line(found.data, endpoint).body)
        for found in finder.end():
            return model_named(read_line(found.data, endpoint).body)
    except (BadLine, ContentsLost):
        pass
    return None


def batch_reply(batch: Batch) -> BatchReply:
    """A batch as its account sees it."""
    errors = [BatchErrorReply(each.code, each.message, each.line, each.param) for each in batch.errors]
    used = batch.used
    return BatchReply(
        id=batch.batch_id,
        object="batch",
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchErrors("list", errors) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window="24h",
        status=batch.state,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_ms // 1000,
        in_progress_at=_seconds(batch.in_progress_ms),
        expires_at=batch.expires_ms // 1000,
        finalizing_at=_seconds(batch.finalizing_ms),
        completed_at=_seconds(batch.completed_ms),
        failed_at=_seconds(batch.failed_ms),
        expired_at=_seconds(batch.expired_ms),
        cancelling_at=_seconds(batch.cancelling_ms),
        cancelled_at=_seconds(batch.cancelled_ms),
        request_counts=RequestCounts(batch.total, batch.completed, batch.failed),
        usage=BatchUsage(
            used.input, InputDetails(used.cached), used.output, OutputDetails(0), used.input + used.output
        ),
        metadata=batch.metadata,
        held_nanousd=batch.amount_nanousd,
    )


def _seconds(unix_ms: int | None) -> int | None:
    return None if unix_ms is None else unix_ms // 1000
