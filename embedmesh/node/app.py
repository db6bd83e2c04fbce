"""The node's HTTP: the public form for those who use a node alone, the compact one for its gateways.

docs/reference/node-protocol.md describes both. What a caller may send in the public form, and what comes back, is
decided by the same code as in a gateway.
"""

import asyncio
import functools
import hmac
import time

import msgspec
from aiohttp import web

from embedmesh.catalogue import Catalogue
from embedmesh.engine.cl100k import Cl100k
from embedmesh.engine.loaded import LoadedModels
from embedmesh.engine.served import Served
from embedmesh.flow.count import count
from embedmesh.flow.identify import identify
from embedmesh.flow.turns import Turns
from embedmesh.flow.validate import ORDINARY, Terms, no_such_model, validate
from embedmesh.http.bodies import JSON_HEADERS, json_reply
from embedmesh.http.failures import failure_response
from embedmesh.http.receive import JSON_TYPE, BodyBudget, read_body
from embedmesh.http.routing import PATH_REMAINDER, Handler, Routes
from embedmesh.node.metrics import NodeMetrics
from embedmesh.provision.assets import find_cl100k
from embedmesh.rules import errors
from embedmesh.rules.embeddings import (
    COMPACT,
    Call,
    Counted,
    EmbedIds,
    EmbedVectors,
    ServedModel,
    ServedModels,
    unpack_ids,
)
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, REQUEST_MAX_S
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Answer, Caller, Share

TOO_MANY_REQUESTS = 429  # what the protocol says of a full queue; the public API has its own number for it
SELF = "self"  # x-embedmesh-node of a node that is asked directly
NOT_SERVED = "This node does not serve that model; GET /v1/models lists what it serves."


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /v1/models`: an id or alias of the node's catalogue, tier suffix included."""

    model: str


class OneKey:
    """The one API key of a node that is used alone. Implements the port `Keys`."""

    def __init__(self, api_key: str) -> None:
        self._key = api_key.encode()
        self._caller = Caller("node", "node", frozenset())

    async def find(self, token: str) -> Caller | None:
        """The caller, if the token is the key."""
        return self._caller if hmac.compare_digest(token.encode("utf-8", "replace"), self._key) else None


class NodeApp:
    """Handlers over the models of one node. `catalogue` is what may be loaded while it runs."""

    def __init__(self, models: LoadedModels, catalogue: Catalogue, metrics: NodeMetrics, bodies: BodyBudget) -> None:
        self._models = models
        self._catalogue = catalogue
        self._metrics = metrics
        self._bodies = bodies
        self._cl100k: Cl100k | None = None
        self._turns = Turns()
        self._decode_ids = msgspec.msgpack.Decoder(EmbedIds).decode

    def routes(self) -> Routes:
        """Path -> method -> handler, for a socket that only the node's owner may open."""
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
        """The same for those who hold the key of a node that is used alone; what it serves is its owner's to say."""
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
        """Embed. A caller who hangs up cancels this, and its waiting work leaves the queue."""
        compact = request.content_type == COMPACT
        body = await read_body(
            request, REQUEST_BODY_BYTES_MAX, self._bodies, content_type=COMPACT if compact else JSON_TYPE
        )
        try:
            if compact:
                return (await self.embed_compact(body))[0]
            return await self._embed_public(body, request.get(PATH_REMAINDER))
        except errors.Overloaded as failure:
            return _too_many(failure)
        finally:
            self._bodies.give_back("", len(body))

    async def tokenize(self, request: web.BaseRequest) -> web.StreamResponse:
        """What the model would be given: takes what /v1/embeddings takes, and answers with ids in place of vectors."""
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self._bodies)
        try:
            call, served, counted = await self._read(body)
        finally:
            self._bodies.give_back("", len(body))
        ids = [served.tokenizer.with_specials(each) for each in counted.ids or ()]
        data = [{"object": "tokens", "index": at, "token_ids": each} for at, each in enumerate(ids)]
        usage = {"prompt_tokens": counted.tokens, "total_tokens": counted.tokens}
        return json_reply({"object": "list", "data": data, "model": call.model, "usage": usage})

    async def embed_compact(self, body: bytes) -> tuple[web.Response, int]:
        """The answer to a request of the compact form, and how many tokens were embedded. Raises a Failure."""
        begun = time.monotonic()
        try:
            asked = self._decode_ids(body)
            ids = unpack_ids(asked)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
            raise errors.InvalidType("The body is not an embeddings request of the node protocol.") from None
        served = self._models.find(asked.model)
        if served is None:
            raise errors.ModelNotFound(NOT_SERVED, param="model")
        tokens = served.check(ids)
        try:
            data = await self._embed(served, ids, tokens, begun, within_s=REQUEST_MAX_S)  # a gateway hangs up before
        except errors.Overloaded as failure:
            return _too_many(failure), 0
        answer = msgspec.msgpack.encode(EmbedVectors(tokens, data))
        return web.Response(body=answer, headers={"Content-Type": COMPACT}), tokens

    async def _embed_public(self, body: bytes, named: str | None) -> web.Response:
        from embedmesh.flow.respond import respond  # brings numpy, 15 MB that a node behind gateways can do without

        begun = time.monotonic()
        call, served, counted = await self._read(body, named)
        assert counted.ids is not None  # there was a tokenizer
        data = await self._embed(served, counted.ids, counted.tokens, begun)
        answer = Answer(data, served.model.width, counted.tokens, (Share(SELF, counted.tokens),))
        reply = respond(call, counted.truncated, answer, time.monotonic() - begun)
        return web.Response(body=reply.body, headers=JSON_HEADERS | reply.headers)

    async def _read(self, body: bytes, named: str | None = None) -> tuple[Call, Served, Counted]:
        """A request of the public form; `named` is the model that its path names. Raises a CallerFailure."""
        catalogue = Catalogue(tuple(one.model for one in self._models))
        reading = functools.partial(validate, body, catalogue, self._terms(), named=named)
        call, model = await self._turns.call(SELF, reading)
        served = self._models.find(model.id)
        if served is None:  # it was unloaded meanwhile
            raise errors.ModelNotFound(NOT_SERVED, param="model")
        if call.ids and model.token_ids == "cl100k" and self._cl100k is None:
            self._cl100k = await asyncio.to_thread(_load_cl100k)
        return call, served, await count(call, model, served.tokenizer, self._cl100k, self._turns, SELF)

    async def _embed(
        self, served: Served, ids: list[list[int]], tokens: int, begun: float, *, within_s: float | None = None
    ) -> bytes:
        try:
            data = await served.embed(ids, within_s=within_s)
        except errors.Overloaded:
            self._metrics.refused(served.model.id)
            raise
        self._metrics.answered(served.model.id, len(ids), tokens, time.monotonic() - begun)
        return data

    async def models(self, request: web.BaseRequest) -> web.StreamResponse:
        """What this node serves. The digest is the catalogue's, which the worker has compared with the files."""
        return self.listed()

    def listed(self) -> web.Response:
        """All models that are served, without those that are loading still or down: nobody should wait for them."""
        every = list(self._models)
        shortage = next((one.shortage for one in every if one.shortage), "")
        return json_reply(ServedModels([_described(one.model) for one in self._models.up()], shortage=shortage))

    async def model(self, request: web.BaseRequest) -> web.StreamResponse:
        """One of them."""
        return json_reply(_described(self._served(request[PATH_REMAINDER]).model))

    async def load(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one model more; answers once a first text was embedded."""
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
        """Stop serving a model; answers once its last calls were answered and its memory is free."""
        served = self._served(request[PATH_REMAINDER])
        await self._models.unload(served.model.id)
        self._metrics.forget(served.model.id)
        return json_reply({"id": served.model.id, "object": "model", "deleted": True})

    async def health(self, request: web.BaseRequest) -> web.StreamResponse:
        """200 while the process answers."""
        return json_reply({"message": "ok"})

    async def readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        """200 while each model embedded something within the last two seconds; else 503, which did not, and why."""
        waiting = [f"{one.model.id} ({one.state()})" for one in self._models if not one.ready()]
        if waiting:
            raise errors.NoNodeAvailable(f"Not ready: {', '.join(waiting)}.")
        return json_reply({"message": "ready"})

    async def show_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        """Prometheus text."""
        for one in self._models:
            self._metrics.state(
                one.model.id, waiting_tokens=one.waiting_tokens, ready=one.ready(), starved=bool(one.shortage)
            )
        body, content_type = self._metrics.text()
        return web.Response(body=body, headers={"Content-Type": content_type})

    def _terms(self) -> Terms:
        return Terms(normal=[one.model.id for one in self._models if one.normal])

    def _served(self, name: str) -> Served:
        catalogue = Catalogue(tuple(one.model for one in self._models))
        model = catalogue.find(name)
        served = self._models.find(model.id) if model is not None else None
        if served is None:
            raise no_such_model(name, catalogue, ORDINARY.serves)
        return served


def _too_many(failure: errors.Overloaded) -> web.Response:
    response = failure_response(failure)
    response.set_status(TOO_MANY_REQUESTS)
    return response


def _described(model: Model) -> ServedModel:
    return ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier, aliases=model.aliases)


def _load_cl100k() -> Cl100k | None:
    ranks = find_cl100k()
    return Cl100k(ranks) if ranks is not None else None
