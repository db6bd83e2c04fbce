"""`/v1/files`: files that an account keeps here, streamed in and out; as OpenAI's Files API has it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Literal
from urllib.parse import quote

import msgspec
from aiohttp import web
from msgspec import Meta

from embedmesh.flow.generate import GENERATE_SCOPE
from embedmesh.gateway.api.queries import path_parameter
from embedmesh.gateway.api.replies import Always, Count, doc
from embedmesh.gateway.api.routes import Api, ApiCall, ApiReply, RawHandler, Route, Scope, account_of, in_room
from embedmesh.http.bodies import CALLER, json_reply
from embedmesh.http.multipart import FORM_TYPE, FRAME_BYTES_MAX, FormPart, form_parts
from embedmesh.http.receive import BodyBudget
from embedmesh.http.rendering import REPLY_HEADERS
from embedmesh.http.routing import Handler
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.file_writer import FileWriter
from embedmesh.jobs.files import FileStore
from embedmesh.rules.batches import FilePurpose, FileRow, bytes_paid_for
from embedmesh.rules.errors import (
    BodyTooLarge,
    InternalError,
    InvalidValue,
    MissingParameter,
    NotFound,
    UnknownParameter,
    UnsupportedMediaType,
)
from embedmesh.rules.file_failures import StorageFull, TooMuchKept
from embedmesh.rules.limits import (
    BATCH_FILE_BYTES_MAX,
    FILE_CALLS_MAX,
    FILE_EXPIRES_S,
    FILE_EXPIRES_S_MAX,
    FILE_EXPIRES_S_MIN,
    FILENAME_CHARS_MAX,
    FILES_PAGE_ROWS_MAX,
    PAGE_ROWS_MAX,
    WRITE_REPLY_S,
)
from embedmesh.rules.metrics import MetricReadings
from embedmesh.rules.ports import EMBED_SCOPE, Caller
from embedmesh.rules.shares import Room
from embedmesh.storage.files import FileRows

FILES_SCOPE: Scope = (EMBED_SCOPE, GENERATE_SCOPE)
FIELD_BYTES_MAX = 64  # of `purpose` and the like
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("purpose", ANCHOR, SECONDS)
FILE_NAME_EXAMPLE = "requests.jsonl"


class FileReply(msgspec.Struct, frozen=True, rename={"file_id": "id"}):
    """A file."""

    file_id: str
    object: Literal["file"]
    bytes: Count
    created_at: Annotated[Count, doc("Unix time in seconds, as `expires_at`.")]
    expires_at: Count
    filename: str
    purpose: Annotated[FilePurpose, doc("`batch`: requests; `batch_output`: results, or errors.")]
    status: Literal["processed"]
    status_details: None


class FileList(msgspec.Struct, frozen=True):
    """A page of your files."""

    object: Literal["list"]
    data: list[FileReply]
    first_id: str | None
    last_id: str | None
    has_more: Annotated[bool, doc("Whether there is another page: `after` is its last id.")]


class DeletedFile(msgspec.Struct, frozen=True, rename={"file_id": "id"}):
    """The file is deleted."""

    file_id: str
    object: Literal["file"]
    deleted: Always


class FileQuery(msgspec.Struct, frozen=True):
    after: Annotated[str, Meta(max_length=64, description="List files after this one.")] = ""
    limit: Annotated[
        int, Meta(ge=1, le=FILES_PAGE_ROWS_MAX, description=f"Files of the page; at most {PAGE_ROWS_MAX:,} come.")
    ] = PAGE_ROWS_MAX
    order: Annotated[Literal["asc", "desc"], doc("By their time; the newest first by default.")] = "desc"
    purpose: Annotated[Literal["", "batch", "batch_output"], doc("Only files for that.")] = ""


class FilesApi(Api):
    """Handlers for callers. Each sees the files of its own account."""

    TAG = "Files"

    def __init__(self, files: FileStore, rows: FileRows, price_min: Callable[[str], int], bodies: BodyBudget) -> None:
        """`price_min` is the least price of a million tokens in a batch, for an account."""
        self._files = files
        self._rows = rows
        self._price_min = price_min
        self.bodies = bodies
        self._room = Room(
            FILE_CALLS_MAX,
            f"The gateway sends and takes {FILE_CALLS_MAX} files at a time, shared among accounts. Try again shortly.",
        )

    def bounded(self, handler: Handler) -> Handler:
        return in_room(self._room, handler, account_of)

    def readings(self) -> MetricReadings:
        free = self._files.free_bytes
        away = {"files_unavailable": int(self._files.unavailable)}
        return away if free is None else {"files_free_bytes": free, **away}

    async def create_file(self, request: web.BaseRequest) -> web.StreamResponse:
        """Upload a file.

        A file of requests for a batch: JSON, one request a line. It is encrypted where it is kept, and deleted when it
        expires.
        """
        return json_reply(_reply(await self._take(request, request[CALLER])))

    async def _take(self, request: web.BaseRequest, caller: Caller) -> FileRow:
        """Keep the form's file. Raises a Failure; then nothing is kept."""
        means = await self._rows.means_nanousd(caller.account_id)
        paid_for = bytes_paid_for(means, self._price_min(caller.account_id))
        allowed = await self._files.bytes_allowed(caller.account_id, paid_for)
        fields: dict[str, str] = {}
        writer: FileWriter | None = None
        try:
            async with aclosing(form_parts(request, BATCH_FILE_BYTES_MAX + FRAME_BYTES_MAX)) as parts:
                async for part in parts:
                    if part.name != "file":
                        await _read_field(part, fields)
                        continue
                    if writer is not None:
                        raise InvalidValue("`file` is given twice.", param="file")
                    writer = await self._files.create(
                        caller.account_id,
                        filename=_filename(part.filename),
                        purpose=FilePurpose.BATCH,
                        expires_s=FILE_EXPIRES_S,
                        file_bytes_max=BATCH_FILE_BYTES_MAX,
                        kept_bytes_max=allowed,
                    )
                    async for piece in part.pieces:
                        await writer.write(piece)
            if writer is None:
                raise MissingParameter("You must give the parameter `file`.", param="file")
            return await writer.commit(expires_s=_expires_s(fields))
        except BaseException:
            if writer is not None:
                await asyncio.shield(writer.abort())
            raise

    async def list_files(self, call: ApiCall[None, FileQuery]) -> FileList:
        """List your files. The newest first, unless `order` says otherwise."""
        query = call.query
        page = await self._rows.page(
            call.caller.account_id,
            after=query.after or None,
            limit=min(query.limit, PAGE_ROWS_MAX),
            newest_first=query.order == "desc",
            purpose=FilePurpose(query.purpose) if query.purpose else None,
        )
        data = [_reply(each) for each in page.files]
        first, last = (data[0].file_id, data[-1].file_id) if data else (None, None)
        return FileList("list", data, first, last, page.more)

    async def get_file(self, call: ApiCall[None, None]) -> FileReply:
        """Get a file. What is known of it, without its contents."""
        return _reply(await self._find(call.caller, call.parameter))

    async def delete_file(self, call: ApiCall[None, None]) -> DeletedFile:
        """Delete a file. A batch that reads it goes on; nobody else sees it any more."""
        if not await self._files.delete(call.caller.account_id, call.parameter):
            raise _no_file()
        return DeletedFile(call.parameter, "file", True)

    async def get_file_content(self, request: web.BaseRequest) -> web.StreamResponse:
        """Get a file's contents. As they are."""
        row = await self._find(request[CALLER], path_parameter(request, any_name=False))
        async with aclosing(self._files.read(row.file_id)) as pieces:
            return await self._send(request, row, pieces)

    async def _send(
        self, request: web.BaseRequest, row: FileRow, pieces: AsyncGenerator[bytes, None]
    ) -> web.StreamResponse:
        try:
            first = await anext(pieces, b"")
        except ContentsLost:
            raise InternalError("The file's contents cannot be read here. Upload it again.") from None
        name = quote(row.filename, safe="")
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
                "X-Content-Type-Options": "nosniff",
            }
        )
        response.headers.update(request[REPLY_HEADERS])
        response.content_length = row.bytes
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        try:
            await _write(response, first)
            async for piece in pieces:
                await _write(response, piece)
        except (ContentsLost, StorageFull, TimeoutError):  # a cut reply is told from a whole one by its length
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the contents could not be sent whole") from None
        await response.write_eof()
        return response

    async def _find(self, caller: Caller, file_id: str) -> FileRow:
        row = await self._rows.find(caller.account_id, file_id)
        if row is None:
            raise _no_file()
        return row

    ROUTES = (
        Route(
            "POST",
            "/v1/files",
            FILES_SCOPE,
            create_file,
            failures=(
                BodyTooLarge,
                InvalidValue,
                MissingParameter,
                UnknownParameter,
                UnsupportedMediaType,
                TooMuchKept,
                StorageFull,
            ),
            details=f"At most {BATCH_FILE_BYTES_MAX // 1024**2} MiB. It expires after `expires_after[seconds]`, "
            f"{FILE_EXPIRES_S // 86_400} days by default.",
            raw=RawHandler({200: ApiReply("The file.", FileReply)}, extra={"requestBody": {
                "required": True,
                "content": {FORM_TYPE: {"schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                        "purpose": {"enum": ["batch"]},
                        ANCHOR: {"enum": ["created_at"]},
                        SECONDS: {"type": "integer", "minimum": FILE_EXPIRES_S_MIN, "maximum": FILE_EXPIRES_S_MAX},
                    },
                    "additionalProperties": False,
                }}},
            }}),
        ),
        Route("GET", "/v1/files", FILES_SCOPE, list_files),
        Route("GET", "/v1/files/{file_id}", FILES_SCOPE, get_file),
        Route("DELETE", "/v1/files/{file_id}", FILES_SCOPE, delete_file),
        Route(
            "GET",
            "/v1/files/{file_id}/content",
            FILES_SCOPE,
            get_file_content,
            failures=(StorageFull,),
            raw=RawHandler({200: ApiReply("The contents.", content_type="application/octet-stream")}),
        ),
    )  # fmt: skip


def _reply(row: FileRow) -> FileReply:
    return FileReply(
        file_id=row.file_id,
        object="file",
        bytes=row.bytes,
        created_at=row.created_ms // 1000,
        expires_at=row.expires_ms // 1000,
        filename=row.filename,
        purpose=row.purpose,
        status="processed",
        status_details=None,
    )


def _no_file() -> NotFound:
    return NotFound("This account has no such file. GET /v1/files lists those that it has.")


async def _read_field(part: FormPart, fields: dict[str, str]) -> None:
    if part.name not in FIELDS:
        raise UnknownParameter(f"A form has `file`, {', '.join(f'`{name}`' for name in FIELDS)}.", param=part.name[:64])
    if part.name in fields:
        raise InvalidValue(f"`{part.name}` is given twice.", param=part.name)
    fields[part.name] = await part.text(FIELD_BYTES_MAX)


def _filename(given: str | None) -> str:
    """The name without folders. Raises InvalidValue."""
    name = (given or "").replace("\\", "/").rpartition("/")[2]
    if not 0 < len(name) <= FILENAME_CHARS_MAX or not name.isprintable():
        raise InvalidValue(f"`file` needs a filename of at most {FILENAME_CHARS_MAX} characters.", param="file")
    return name


def _expires_s(fields: dict[str, str]) -> int:
    """Check what a form says besides its file. Raises MissingParameter, InvalidValue."""
    if "purpose" not in fields:
        raise MissingParameter("You must give the parameter `purpose`.", param="purpose")
    if fields["purpose"] != FilePurpose.BATCH.value:
        raise InvalidValue("`purpose` must be `batch`: files are for nothing else here.", param="purpose")
    if ANCHOR not in fields and SECONDS not in fields:
        return FILE_EXPIRES_S
    if fields.get(ANCHOR) != "created_at":
        raise InvalidValue(f"`{ANCHOR}` must be `created_at`.", param=ANCHOR)
    seconds = fields.get(SECONDS, "")
    good = seconds.isascii() and seconds.isdigit() and len(seconds) <= 9
    if not good or not FILE_EXPIRES_S_MIN <= int(seconds) <= FILE_EXPIRES_S_MAX:
        words = f"`{SECONDS}` must be a whole number from {FILE_EXPIRES_S_MIN} to {FILE_EXPIRES_S_MAX}."
        raise InvalidValue(words, param=SECONDS)
    return int(seconds)


async def _write(response: web.StreamResponse, piece: bytes) -> None:
    """A caller has WRITE_REPLY_S to read each piece."""
    async with asyncio.timeout(WRITE_REPLY_S):
        await response.write(piece)
