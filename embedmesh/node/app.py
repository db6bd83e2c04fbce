"""The node's HTTP API: the public form for callers of a node without a gateway, the compact form for its gateways.

docs/reference/node-protocol.md describes both. The same code as in a gateway parses the public form and writes replies.
"""

import asyncio
import functools
import hmac
import math
import time
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web

from embedmesh.catalogue import Catalogue
from embedmesh.dialects.openai.parse import parse
from embedmesh.engine.batch_queue import OnEnd
from embedmesh.engine.cl100k import Cl100k
from embedmesh.engine.loaded import LoadedModels
from embedmesh.engine.served import Served
from embedmesh.flow.count import CanPayFor, count
from embedmesh.flow.identify import identify
from embedmesh.flow.turns import Turns
from embedmesh.http.bodies import JSON_HEADERS, json_reply
from embedmesh.http.failures import failure_response
from embedmesh.http.receive import JSON_TYPE, BodyBudget, read_body
from embedmesh.http.routing import PATH_REMAINDER, Handler, Routes
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.traced import NodeTraces
from embedmesh.provision.assets import find_cl100k
from embedmesh.rules import errors
from embedmesh.rules.confidential import SignedKeys
from embedmesh.rules.embeddings import (
    COMPACT,
    Call,
    Counted,
    EmbedIds,
    EmbedVectors,
    ServedModel,
    ServedModels,
    numbers_of,
    unpack_ids,
)
from embedmesh.rules.errors import NodeFailure, SetupError
from embedmesh.rules.exchange import NODE_HEADER, PROCESSING_HEADER
from embedmesh.rules.forwarding import Answer, Share
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, REQUEST_MAX_S
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.served import ORDINARY, ParseTerms, no_such_model

QUEUE_FULL_STATUS = 429  # in the node protocol; in a gateway's API an overload has another status
SOON_BYTES_MAX = 32 * 1024  # of a body that is read on the event loop: a millisecond at most
SELF = "self"  # x-embedmesh-node of a node without a gateway
LATE = "The call took longer than it may. Send fewer or shorter inputs."
NOT_SERVED = "This node does not serve that model; GET /v1/models lists what it serves."

CompactDone = Callable[[bytes | Exception, int], None]
"""Called with the reply to a request of the compact form and the tokens embedded, or with the failure and 0."""


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /v1/models`: an id or alias of the node's catalogue, tier suffix included."""

    model: str


class OneKey:
    """The one API key of a node without a gateway. Implements the port `Keys`."""

    def __init__(self, api_key: str) -> None:
        self._key = api_key.encode()
        self._caller = Caller("node", "node", frozenset())

    async def find(self, token: str) -> Caller | None:
        return self._caller if hmac.compare_digest(token.encode("utf-8", "replace"), self._key) else None


class NodeApp:
    """Handlers over the models of one node. Models of `catalogue` may be loaded while it runs."""

    def __init__(
        self,
        models: LoadedModels,
        catalogue: Catalogue,
        metrics: NodeMetrics,
        bodies: BodyBudget,
        keys: Callable[[Mapping[str, str]], SignedKeys | msgspec.UnsetType] = lambda models: msgspec.UNSET,
        traces: NodeTraces | None = None,
    ) -> None:
        """`keys` gives the document of the node's confidential keys for these models (ids and digests)."""
        self._models = models
        self._keys = keys
        self._traces = traces
        self._catalogue = catalogue
        self._metrics = metrics
        self._bodies = bodies
        self._cl100k: Cl100k | None = None
        self._turns = Turns()
        self._decode_ids = msgspec.msgpack.Decoder(EmbedIds).decode
        self._encode_vectors = msgspec.msgpack.Encoder().encode

    def routes(self) -> Routes:
        """Routes for a socket that only the node's owner may open."""
        return {
            "/v1/embeddings": {"POST": self.embeddings},
            "/v1/tokenize": {"POST": self.tokenize},
            "/v1/models": {"GET": self.models, "POST": self.load},
            "/v1/models/*": {"GET": self.model, "DELETE": self.unload},
            "/health": {"GET": self.health},
            "/readyz": {"GET": self.readyz},
            "/metrics": {"GET": self.show_metrics},
        }

    def public_routes(self, api_key: str) -> Routes:
        """Routes for callers with the API key. Only the owner may load and unload models."""
        keys = OneKey(api_key)

        def with_key(handler: Handler) -> Handler:
            @functools.wraps(handler)
            async def checked(request: web.BaseRequest) -> web.StreamResponse:
                await identify(request.headers.get("Authorization"), keys, api_key=request.headers.get("api-key"))
                return await handler(request)

            return checked

        return {
            "/v1/embeddings": {"POST": with_key(self.embeddings)},
            "/v1/tokenize": {"POST": with_key(self.tokenize)},
            "/v1/models": {"GET": with_key(self.models)},
            "/v1/models/*": {"GET": with_key(self.model)},
            "/health": {"GET": self.health},
            "/readyz": {"GET": self.readyz},
            "/metrics": {"GET": with_key(self.show_metrics)},
        }

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """Embed. If the caller hangs up, this is cancelled, and its waiting work leaves the queue."""
        compact = request.content_type == COMPACT
        body = await read_body(
            request, REQUEST_BODY_BYTES_MAX, self._bodies, content_type=COMPACT if compact else JSON_TYPE
        )
        try:
            if compact:
                reply, _ = await self.embed_compact(body)
                return web.Response(body=reply, headers={"Content-Type": COMPACT})
            return await self._embed_public(body, request.get(PATH_REMAINDER))
        except errors.Overloaded as failure:
            return queue_full(failure)
        finally:
            self._bodies.give_back("", len(body))

    async def tokenize(self, request: web.BaseRequest) -> web.StreamResponse:
        """The model's token ids for a request of /v1/embeddings, in place of vectors."""
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self._bodies)
        try:
            call, served, counted = await self.read(body)
        finally:
            self._bodies.give_back("", len(body))
        ids = [served.tokenizer.with_specials(numbers_of(each)) for each in counted.ids or ()]
        data = [{"object": "tokens", "index": at, "token_ids": each} for at, each in enumerate(ids)]
        usage = {"prompt_tokens": counted.tokens, "total_tokens": counted.tokens}
        return json_reply({"object": "list", "data": data, "model": call.model, "usage": usage})

    def begin_compact(self, body: bytes, done: CompactDone, traceparent: str | None = None) -> Callable[[], object]:
        """Answer a request of the compact form, later; returns what drops it if its caller goes. Raises a Failure."""
        begun = time.monotonic()
        try:
            request = self._decode_ids(body)
            ids = unpack_ids(request)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
            raise errors.InvalidType("The body is not an embeddings request of the node protocol.") from None
        served = self._models.find(request.model)
        if served is None:
            raise errors.ModelNotFound(NOT_SERVED, param="model")
        tokens = served.check(ids)
        if not served.is_loaded:
            return asyncio.get_running_loop().create_task(self._when_loaded(served, body, done)).cancel

        def ended(outcome: list[bytes] | NodeFailure) -> None:
            if isinstance(outcome, NodeFailure):
                done(outcome, 0)
                return
            data = outcome[0] if len(outcome) == 1 else b"".join(outcome)
            done(self._encode_vectors(EmbedVectors(tokens, data)), tokens)
            self._metrics.answered(served.model.id, len(ids), tokens, time.monotonic() - begun)

        on_end: OnEnd = ended
        if self._traces is not None and traceparent is not None:
            on_end = self._traces.around(ended, traceparent, begun, served, tokens)
        try:
            return functools.partial(served.drop, served.begin(ids, on_end))
        except errors.Overloaded:
            self._metrics.refused(served.model.id)
            raise

    async def embed_compact(self, body: bytes) -> tuple[bytes, int]:
        """As `begin_compact`: the reply, and how many tokens were embedded."""
        ended: asyncio.Future[tuple[bytes | Exception, int]] = asyncio.get_running_loop().create_future()
        drop = self.begin_compact(body, lambda *said: None if ended.done() else ended.set_result(said))
        try:
            async with asyncio.timeout(REQUEST_MAX_S):  # a gateway hangs up before
                reply, tokens = await ended
        except TimeoutError:
            raise errors.DeadlineExceeded(LATE) from None
        finally:
            drop()
        if isinstance(reply, Exception):
            raise reply
        return reply, tokens

    async def _when_loaded(self, served: Served, body: bytes, done: CompactDone) -> None:
        try:
            await served.loaded()
            reply, tokens = await self.embed_compact(body)
        except Exception as error:  # noqa: BLE001 - `done` explains it, and counts a bug of ours
            done(error, 0)
        else:
            done(reply, tokens)

    async def _embed_public(self, body: bytes, path_model: str | None) -> web.Response:
        from embedmesh.dialects.openai.render import (
            render,  # brings numpy: 15 MB that a node behind gateways does not need
        )

        begun = time.monotonic()
        call, served, counted = await self.read(body, path_model)
        assert counted.ids is not None  # there was a tokenizer
        try:
            data = await served.embed(list(map(numbers_of, counted.ids)))
        except errors.Overloaded:
            self._metrics.refused(served.model.id)
            raise
        self._metrics.answered(served.model.id, len(counted.ids), counted.tokens, time.monotonic() - begun)
        answer = Answer(data, served.model.width, counted.tokens, (Share(SELF, counted.tokens),))
        headers = {PROCESSING_HEADER: str(math.ceil((time.monotonic() - begun) * 1000)), NODE_HEADER: SELF}
        reply = render(call, counted.truncated, answer, headers)
        return web.Response(body=reply.body, headers=JSON_HEADERS | reply.headers)

    async def read(
        self, body: bytes, path_model: str | None = None, can_pay_for: CanPayFor | None = None
    ) -> tuple[Call, Served, Counted]:
        """Parse and count a request of the public form; its path may name a model. Raises a CallerFailure."""
        catalogue = Catalogue(tuple(one.model for one in self._models))
        terms = ParseTerms(normal=[one.model.id for one in self._models if one.normal])
        reading = functools.partial(parse, body, catalogue, terms, named=path_model)
        call, model = reading() if len(body) <= SOON_BYTES_MAX else await self._turns.call(SELF, reading)
        served = self._models.find(model.id)
        if served is None:  # it was unloaded meanwhile
            raise errors.ModelNotFound(NOT_SERVED, param="model")
        if call.ids and model.token_ids == "cl100k" and self._cl100k is None:
            self._cl100k = await asyncio.to_thread(_load_cl100k)
        return call, served, await count(call, model, served.tokenizer, self._cl100k, self._turns, SELF, can_pay_for)

    async def models(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=self.list_bytes(), headers=JSON_HEADERS)

    def list_bytes(self) -> bytes:
        """The list of models that embed now: without those that are down or still loading.

        The digest is the catalogue's, which the worker has compared with the files. With the list come the keys of
        confidential requests: this is the one place where a node publishes them.
        """
        shortage = next((one.shortage for one in self._models if one.shortage), "")
        threads = "; ".join(dict.fromkeys(str(one.threads) for one in self._models if one.threads is not None))
        models = [one.model for one in self._models.up()]
        keys = self._keys({model.id: model.digest for model in models}) if models else msgspec.UNSET
        described = [_described(model) for model in models]
        return msgspec.json.encode(ServedModels(described, shortage=shortage, threads=threads, keys=keys))

    async def model(self, request: web.BaseRequest) -> web.StreamResponse:
        """A model as the list has it; while it loads, `loading` says what its engine does, and how far it is."""
        served = self._served(request[PATH_REMAINDER])
        members = msgspec.structs.asdict(_described(served.model))
        if served.loading is not None:
            members["loading"] = msgspec.structs.asdict(served.loading)
        return json_reply(members)

    async def load(self, request: web.BaseRequest) -> web.StreamResponse:
        """Load a model; replies once it has embedded a first text."""
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self._bodies)
        self._bodies.give_back("", len(body))
        try:
            name = msgspec.json.decode(body, type=LoadRequest).model
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise errors.InvalidJson('The body must be JSON like {"model": "an-id:fast"}.') from None
        model = self._catalogue.find(name)
        if model is None:
            raise errors.ModelNotFound("The node's catalogue has no model of that name.", param="model")
        try:
            await self._models.load(model)
        except SetupError as error:
            raise errors.InvalidValue(str(error), param="model") from None
        return json_reply(_described(model))

    async def unload(self, request: web.BaseRequest) -> web.StreamResponse:
        """Unload a model; replies once its last calls are answered and its memory is free."""
        model_id = self._served(request[PATH_REMAINDER]).model.id  # a name for the model itself would keep it alive
        await self._models.unload(model_id)
        self._metrics.forget(model_id)
        return json_reply({"id": model_id, "object": "model", "deleted": True})

    async def health(self, request: web.BaseRequest) -> web.StreamResponse:
        return json_reply({"message": "ok"})

    async def readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        """200 if each model embedded something within the last two seconds; else 503, with those that did not."""
        waiting = [f"{one.model.id} ({one.state()})" for one in self._models if not one.ready()]
        if waiting:
            raise errors.NoNodeAvailable(f"Not ready: {', '.join(waiting)}.")
        return json_reply({"message": "ready"})

    async def show_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        for one in self._models:
            self._metrics.state(
                one.model.id, waiting_tokens=one.waiting_tokens, ready=one.ready(), starved=bool(one.shortage)
            )
        waiting, running = map(sum, zip((0, 0), *(one.calls for one in self._models), strict=True))
        self._metrics.calls(waiting, running)
        body, content_type = self._metrics.text()
        return web.Response(body=body, headers={"Content-Type": content_type})

    def _served(self, name: str) -> Served:
        catalogue = Catalogue(tuple(one.model for one in self._models))
        model = catalogue.find(name)
        served = self._models.find(model.id) if model is not None else None
        if served is None:
            raise no_such_model(name, catalogue, ORDINARY.serves)
        return served


def queue_full(failure: errors.Overloaded) -> web.Response:
    """The refusal of the node protocol for more work than may wait."""
    response = failure_response(failure)
    response.set_status(QUEUE_FULL_STATUS)
    return response


def _described(model: Model) -> ServedModel:
    return ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier, aliases=model.aliases)


def _load_cl100k() -> Cl100k | None:
    ranks = find_cl100k()
    return Cl100k(ranks) if ranks is not None else None
