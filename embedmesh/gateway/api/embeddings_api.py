"""`/v1/embeddings`: adapts HTTP to one call of the flow; no rule lives here."""

import base64
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from embedmesh.dialects.openai.dialect import OpenAI
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.embed import Embeddings
from embedmesh.flow.operation import Operation
from embedmesh.flow.paid import serve
from embedmesh.flow.straight import StraightEmbeddings
from embedmesh.flow.world import World
from embedmesh.gateway.api.metrics import Metrics, RouteCounts, code_of
from embedmesh.gateway.api.pages.samples import EXAMPLE_MODEL, SAMPLES
from embedmesh.gateway.api.replies import Count, doc
from embedmesh.gateway.api.routes import Api, ApiReply, RawHandler, Route
from embedmesh.http.bodies import JSON_HEADERS
from embedmesh.http.exchange import Exchange, GeneralExchange
from embedmesh.http.failures import TABLE
from embedmesh.http.paths import EMBEDDINGS_PATH, OTHER_PATHS
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import PATH_REMAINDER
from embedmesh.rules.errors import MethodNotAllowed
from embedmesh.rules.exchange import JOB_HEADER, Delivery, Receive, RequestHead
from embedmesh.rules.limits import (
    IDEMPOTENCY_KEY_CHARS_MAX,
    REQUEST_BODY_BYTES_MAX,
    REQUEST_INPUTS_MAX,
    REQUEST_TOKENS_MAX,
)
from embedmesh.rules.ports import EMBED_SCOPE
from embedmesh.rules.request_record import CURRENT
from embedmesh.rules.shares import Room

OUTCOMES = {Delivery.WHOLE: "ok", Delivery.BROKEN_OFF: "broken_off", Delivery.FAILED: "failed"}
"""What a request's metrics say, by its delivery. A straight one is whole."""
EMBEDDING_HEADERS = (
    "openai-processing-ms",
    "x-embedmesh-cached",
    "x-embedmesh-cost-nanousd",
    "x-embedmesh-ignored",
    "x-embedmesh-node",
    "x-embedmesh-request",
    "x-embedmesh-truncated",
    *(f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in ("limit", "remaining", "reset")),
    "idempotent-replayed",
)
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key with the same body gives the same reply for a day, and is charged once; with another "
    "body it is refused with 409 `idempotency_conflict`. All API keys of an account share it.",
    "schema": {"type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY_CHARS_MAX},
    "example": "order-1729",
}
JOB = {
    "name": JOB_HEADER,
    "in": "header",
    "required": False,
    "description": "The job (see `POST /v1/jobs`) whose budget pays for the request, instead of the account's balance. "
    "It needs an `Idempotency-Key`, which is one of the job: it is charged once, and the same request again is "
    "computed again, free.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 64},
    "example": "job_019aa0b4c0de7b62a1f0c3d4e5f60718",
}
EMBEDDINGS = Embeddings(OpenAI())


class EmbeddingRequest(msgspec.Struct):
    """Stands for the schema of the request, which is made from `embedmesh.dialects.openai.fields`."""


class EmbeddingReply(msgspec.Struct):
    """The vector of one input."""

    object: Literal["embedding"]
    index: Annotated[Count, doc("The position of the input.")]
    embedding: Annotated[
        Annotated[list[float], Meta(min_length=1)]
        | Annotated[str, Meta(extra_json_schema={"contentEncoding": "base64"})],
        doc("Numbers, or base64 of little-endian float32, as `encoding_format` requests."),
    ]


class EmbeddingUsage(msgspec.Struct):
    """Tokens embedded, special tokens included."""

    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(msgspec.Struct):
    """One vector for each input, in input order."""

    object: Literal["list"]
    data: Annotated[list[EmbeddingReply], Meta(min_length=1, max_length=REQUEST_INPUTS_MAX)]
    model: Annotated[str, doc("As the request names it.")]
    usage: EmbeddingUsage
    id: Annotated[Literal["embeddings"], doc("The same in every reply; some clients want one.")]


class EmbeddingsApi(Api):
    """The flow's exchange with callers. Bounds the requests under way at one time; more are refused at once."""

    TAG = "Embeddings"

    def __init__(self, world: World, metrics: Metrics, room: Room, bodies: BodyBudget, write_s: float) -> None:
        self._world = world
        self.metrics = metrics
        self._room = room
        self.bodies = bodies
        self._write_s = write_s
        self.straight = StraightEmbeddings(world, EMBEDDINGS, room, metrics.route(EMBEDDINGS_PATH), self._go_on)

    async def create_embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings.

        One vector for each input. A field that is null counts as not given. You pay for the tokens that were embedded,
        special tokens included, once the reply is on its way to you. If your connection breaks then, a retry with the
        same key and body within a minute gets the reply without a second charge.
        """
        return await self.exchange(request, EMBEDDINGS, EMBEDDINGS_PATH)

    async def exchange(
        self, request: web.BaseRequest, operation: Operation, path: str, *, form: str = "", api_key: str | None = None
    ) -> web.StreamResponse:
        """Answer one request of an operation, on the general server. `path` is that of the route.

        `form` and `api_key` as in RequestHead.
        """
        response = web.Response(headers=JSON_HEADERS)
        exchange = GeneralExchange(request, self.bodies, response, self._write_s)
        try:
            job = request.headers.get(JOB_HEADER)
            more: dict[str, Any] = {"form": form, "job": job}
            if api_key is not None:
                more["api_key"] = api_key
            await self.answer(exchange, request.get(PATH_REMAINDER), operation, more, path)
        finally:
            exchange.end()
        return exchange.response

    async def answer(
        self,
        exchange: Exchange,
        model_in_path: str | None = None,
        operation: Operation = EMBEDDINGS,
        more: Mapping[str, Any] | None = None,
        path: str = EMBEDDINGS_PATH,
    ) -> None:
        """Answer one request; `more` are members of its RequestHead. The fast path calls this, too."""
        watched = _Watched(self.metrics.route(path), self._world.clock.monotonic())

        async def receive(account_id: str) -> bytes:
            body = await exchange.body(account_id)  # before there is room for it: bodies that never end would fill it
            self._room.take(account_id)
            watched.account = account_id
            return body

        head = RequestHead.read(exchange.header, exchange.own_id, model_in_path)
        if more is not None:
            head = head._replace(**more)
        outcome = self._serve(exchange, operation, head, receive, watched.on_model)
        await self._observe(watched, outcome)

    def _serve(
        self,
        exchange: Exchange,
        operation: Operation,
        head: RequestHead,
        receive: Receive,
        on_model: Callable[[str], None],
    ) -> Awaitable[Outcome]:
        return serve(self._world, operation, head, receive, exchange.deliver, on_model)

    async def _go_on(self, began: float, account: str, model: str, outcome: Awaitable[Outcome]) -> None:
        await self._observe(_Watched(self.metrics.route(EMBEDDINGS_PATH), began, account, model), outcome)

    async def _observe(self, watched: "_Watched", outcome: Awaitable[Outcome]) -> None:
        """Count how a request ends, and give its room back."""
        code, tokens, nanousd = "", 0, 0
        try:
            ended = await outcome
            code = OUTCOMES[ended.delivery]
            tokens, nanousd = ended.tokens, ended.cost_nanousd
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            if watched.account is not None:
                self._room.give_back(watched.account)
            seconds = self._world.clock.monotonic() - watched.began
            watched.counts.ended(code, watched.model, seconds, tokens, nanousd)
            if (record := CURRENT.get()) is not None:
                record.model, record.outcome, record.tokens, record.nanousd = watched.model, code, tokens, nanousd

    ROUTES = (
        Route(
            "POST",
            EMBEDDINGS_PATH,
            (EMBED_SCOPE,),
            create_embeddings,
            failures=tuple(failure for failure in TABLE if failure is not MethodNotAllowed),
            details=f"A request takes at most {REQUEST_INPUTS_MAX:,} inputs, {REQUEST_TOKENS_MAX:,} tokens and "
            f"{REQUEST_BODY_BYTES_MAX // 1024**2} MiB of plain JSON. Other paths of the same route: "
            f"{', '.join(f'`{path}`' for path, same in OTHER_PATHS.items() if same == EMBEDDINGS_PATH)}. The star is "
            "the model, which the body may then leave out.",
            raw=RawHandler(
                {200: ApiReply("One vector for each input, in input order.", EmbeddingList, headers=EMBEDDING_HEADERS)},
                EmbeddingRequest,
                key_checked_by_flow=True,
                extra={"parameters": [IDEMPOTENCY_KEY, JOB], "x-codeSamples": SAMPLES},
            ),
        ),
    )


@dataclass
class _Watched:
    """What is known of a request that is counted."""

    counts: RouteCounts
    began: float
    account: str | None = None  # once it has room
    model: str = ""  # once it is known

    def on_model(self, known: str) -> None:
        """The model is known."""
        self.model = known


def request_examples() -> dict[str, Any]:
    """For the OpenAPI document."""
    request = {"model": EXAMPLE_MODEL, "input": ["Good morning", "Guten Morgen"], "dimensions": 4}
    return {"two": {"summary": "Two texts, four dimensions", "value": request}}


def reply_examples() -> dict[str, Any]:
    """The reply to that request, in both encodings, for the OpenAPI document."""
    vectors = [(0.5, -0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5)]  # exact in float32 and of unit length
    encoded = [base64.b64encode(struct.pack("<4f", *vector)).decode("ascii") for vector in vectors]
    return {
        "float": {"summary": "Numbers", "value": _example([list(vector) for vector in vectors])},
        "base64": {"summary": "The same, with `encoding_format: base64`", "value": _example(encoded)},
    }


def _example(embeddings: list[Any]) -> dict[str, Any]:
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(embeddings)]
    usage = {"prompt_tokens": 9, "total_tokens": 9}
    return {"object": "list", "data": data, "model": EXAMPLE_MODEL, "usage": usage, "id": "embeddings"}
