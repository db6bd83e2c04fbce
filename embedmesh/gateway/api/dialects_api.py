"""Embeddings in the words of other APIs: Ollama, Cohere, Text Embeddings Inference, Google."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from aiohttp import web

from embedmesh.dialects import cohere, google, ollama, tei
from embedmesh.dialects.adapted import Adapted, sole
from embedmesh.fleet.registry import Registry
from embedmesh.flow.embed import Embeddings
from embedmesh.flow.world import World
from embedmesh.gateway.api.embeddings_api import EMBEDDING_HEADERS, IDEMPOTENCY_KEY, JOB, EmbeddingsApi
from embedmesh.gateway.api.replies import Count, doc
from embedmesh.gateway.api.routes import ANY_KEY, Api, ApiCall, ApiReply, RawHandler, Route
from embedmesh.http.failures import TABLE, status_and_type
from embedmesh.rules.errors import InvalidValue, MethodNotAllowed, MissingParameter, ModelNotFound
from embedmesh.rules.limits import (
    CONNECTIONS_MAX,
    REQUEST_INPUTS_MAX,
    REQUEST_TOKENS_MAX,
    RERANK_DOCUMENTS_MAX,
    RERANK_TOKENS_MAX,
)
from embedmesh.rules.models import Model
from embedmesh.rules.ports import EMBED_SCOPE
from embedmesh.rules.served import no_such_model

OLLAMA_VERSION = "0.12.0"  # of the API that is spoken; clients compare it
UNKNOWN_TIME = "1970-01-01T00:00:00Z"
GOOGLE_KEY_HEADER = "x-goog-api-key"


class OllamaError(msgspec.Struct, frozen=True):
    """A failure as Ollama tells it."""

    error: str


class CohereError(msgspec.Struct, frozen=True):
    """A failure as Cohere tells it."""

    message: str


class TeiError(msgspec.Struct, frozen=True):
    """A failure as Text Embeddings Inference tells it."""

    error: str
    error_type: str


class GoogleStatus(msgspec.Struct, frozen=True):
    """What went wrong; `code` is the HTTP status."""

    code: int
    message: str
    status: str


class GoogleError(msgspec.Struct, frozen=True):
    """A failure as Google tells it."""

    error: GoogleStatus


class OllamaDetailsReply(msgspec.Struct, frozen=True):
    """What Ollama's clients show of a model."""

    format: str
    family: str
    families: tuple[str, ...]
    parameter_size: str
    quantization_level: Annotated[str, doc("The precision of the arithmetic.")]


class OllamaModelReply(msgspec.Struct, frozen=True):
    """A model."""

    name: str
    model: str
    modified_at: Annotated[str, doc("Not known: the beginning of Unix time.")]
    size: Annotated[Count, doc("Not known: 0.")]
    digest: str
    details: OllamaDetailsReply


class OllamaModelsReply(msgspec.Struct, frozen=True):
    """The models that embed, and that ready nodes serve."""

    models: list[OllamaModelReply]


class OllamaShown(msgspec.Struct, frozen=True):
    """Which model to show."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class OllamaShowReply(msgspec.Struct, frozen=True):
    """A model."""

    details: OllamaDetailsReply
    model_info: dict[str, Any]
    capabilities: tuple[str, ...]
    modified_at: str


class OllamaVersionReply(msgspec.Struct, frozen=True):
    """The version of the API."""

    version: str


class TeiInfoReply(msgspec.Struct, frozen=True):
    """The model that `/embed` or `/rerank` has, and what a request may hold."""

    model_id: str
    model_sha: str
    model_dtype: Literal["float32", "bfloat16", "int8"]
    model_type: dict[str, Any]
    max_concurrent_requests: Count
    max_input_length: Count
    max_batch_tokens: Count
    max_client_batch_size: Count
    version: str


class Spoken(NamedTuple):
    """A dialect as an operation, at the path of a route; the form of its requests; where its clients put the key."""

    path: str
    operation: Embeddings
    form: type[msgspec.Struct]
    key_header: str | None = None


GOOGLE_ONE, GOOGLE_SEVERAL = google.dialects(lambda failure: status_and_type(failure)[0])
RERANKER_LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # TEI tells them of each reranker
DTYPES: dict[str, Literal["float32", "bfloat16", "int8"]] = {"exact": "float32", "fast": "bfloat16", "int8": "int8"}


def _spoken(path: str, dialect: Adapted, key_header: str | None = None) -> Spoken:
    return Spoken(path, Embeddings(dialect), dialect.form, key_header)


class DialectsApi(Api):
    """Routes of other APIs. Each answers by `EmbeddingsApi`."""

    TAG = "Other APIs"

    def __init__(self, world: World, registry: Registry, embeddings: EmbeddingsApi) -> None:
        self._world = world
        self._registry = registry
        self._embeddings = embeddings
        self.bodies = embeddings.bodies

    async def ollama_embed(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings as Ollama does. Vectors have unit length; long texts are cut unless `truncate` is false."""
        return await self._answer(request, OLLAMA_EMBED)

    async def ollama_embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create one embedding as Ollama did. The older form, for one text."""
        return await self._answer(request, OLLAMA_EMBEDDINGS)

    async def cohere_embed(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings as Cohere does. Long texts are cut at their end unless `truncate` says otherwise."""
        return await self._answer(request, COHERE_EMBED)

    async def cohere_embed_v1(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings as Cohere did. The older form."""
        return await self._answer(request, COHERE_EMBED_V1)

    async def tei_embed(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings as Text Embeddings Inference does. For the only model here that embeds."""
        return await self._answer(request, TEI_EMBED)

    async def tei_root(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings at the root, as Text Embeddings Inference does. For the only model here that embeds."""
        return await self._answer(request, TEI_ROOT)

    async def tei_embed_by(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings as Text Embeddings Inference does, by a model. The path names it."""
        return await self._answer(request, TEI_EMBED_BY)

    async def google_embed(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create one embedding as Google does. The key may come in `x-goog-api-key`."""
        return await self._answer(request, GOOGLE_EMBED)

    async def google_embed_several(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create embeddings as Google does. All requests agree in everything but their texts."""
        return await self._answer(request, GOOGLE_EMBED_SEVERAL)

    async def ollama_tags(self, call: ApiCall[None, None]) -> OllamaModelsReply:
        """List models as Ollama does. Those that embed, and that ready nodes serve."""
        served = [each for each in self._world.catalogue.models if each.embeds and self._registry.ready(each.id)]
        return OllamaModelsReply(
            [OllamaModelReply(each.id, each.id, UNKNOWN_TIME, 0, each.digest, _details(each)) for each in served]
        )

    async def ollama_show(self, call: ApiCall[OllamaShown, None]) -> OllamaShowReply:
        """Show a model as Ollama does. Its width and its longest input are among `model_info`."""
        model = self._model(ollama.name_of(call.body.model or call.body.name or "", self._world.catalogue))
        info = {
            "general.architecture": "embedmesh",
            "embedmesh.embedding_length": model.width,
            "embedmesh.context_length": model.max_tokens,
        }
        return OllamaShowReply(_details(model), info, ("embedding",), UNKNOWN_TIME)

    async def ollama_version(self, call: ApiCall[None, None]) -> OllamaVersionReply:
        """Tell the version of Ollama's API. That which is spoken here."""
        return OllamaVersionReply(OLLAMA_VERSION)

    async def tei_info(self, call: ApiCall[None, None]) -> TeiInfoReply:
        """Tell about the model as Text Embeddings Inference does. The only one that embeds; else that reranks."""
        catalogue = self._world.catalogue
        name = sole(catalogue) or sole(catalogue, lambda model: model.reranks, "name one, as in /tei/MODEL/info")
        if name is None:
            raise no_such_model("", catalogue, self._world.terms.serves)
        return self._info(name)

    async def tei_info_by(self, call: ApiCall[None, None]) -> TeiInfoReply:
        """Tell about a model as Text Embeddings Inference does. The path names it."""
        return self._info(call.parameter)

    async def tei_embed_all(self, call: ApiCall[None, None]) -> TeiInfoReply:
        """Refuse a vector for each token. Here a text has one vector."""
        raise InvalidValue("`/embed_all` gives a vector for each token, which no model here makes. POST /embed.")

    async def _answer(self, request: web.BaseRequest, spoken: Spoken) -> web.StreamResponse:
        path, operation = spoken.path, spoken.operation
        key = request.headers.get(spoken.key_header) if spoken.key_header else None
        return await self._embeddings.exchange(request, operation, path, form=path, api_key=key)

    def _info(self, name: str) -> TeiInfoReply:
        model = self._model(name, lambda model: model.encodes)
        return TeiInfoReply(
            model.id,
            model.digest,
            DTYPES[model.tier],
            {"reranker": RERANKER_LABELS} if model.reranks else {"embedding": {}},
            CONNECTIONS_MAX,
            model.max_tokens,
            RERANK_TOKENS_MAX if model.reranks else REQUEST_TOKENS_MAX,
            RERANK_DOCUMENTS_MAX if model.reranks else REQUEST_INPUTS_MAX,
            OLLAMA_VERSION,
        )

    def _model(self, name: str, does: Callable[[Model], bool] = lambda model: model.embeds) -> Model:
        model = self._world.catalogue.find(name)
        if model is None or not does(model) or not self._registry.ready(model.id):
            raise no_such_model(name, self._world.catalogue, self._world.terms.serves)
        return model


def _details(model: Model) -> OllamaDetailsReply:
    return OllamaDetailsReply("embedmesh", "embedmesh", ("embedmesh",), "", DTYPES[model.tier])


OLLAMA_EMBED = _spoken("/api/embed", ollama.EMBED)
OLLAMA_EMBEDDINGS = _spoken("/api/embeddings", ollama.EMBEDDINGS)
COHERE_EMBED, COHERE_EMBED_V1 = _spoken("/v2/embed", cohere.EMBED), _spoken("/v1/embed", cohere.EMBED_V1)
TEI_EMBED, TEI_ROOT = _spoken("/embed", tei.EMBED), _spoken("/", tei.EMBED)
TEI_EMBED_BY = _spoken("/tei/{id}/embed", tei.EMBED)
GOOGLE_EMBED = _spoken("/v1beta/models/{id}:embedContent", GOOGLE_ONE, GOOGLE_KEY_HEADER)
GOOGLE_EMBED_SEVERAL = _spoken("/v1beta/models/{id}:batchEmbedContents", GOOGLE_SEVERAL, GOOGLE_KEY_HEADER)
FAILURES = tuple(failure for failure in TABLE if failure is not MethodNotAllowed)


def _row(spoken: Spoken, handler: Any, reply: Any, error: Any) -> Route:
    """A row for embeddings."""
    told = ApiReply("A vector for each input, in input order.", reply, headers=EMBEDDING_HEADERS)
    raw = RawHandler(
        {200: told},
        spoken.form,
        key_checked_by_flow=True,
        extra={"parameters": [IDEMPOTENCY_KEY, JOB]},
        error=error,
    )
    return Route("POST", spoken.path, (EMBED_SCOPE,), handler, failures=FAILURES, raw=raw)


DialectsApi.ROUTES = (
    _row(OLLAMA_EMBED, DialectsApi.ollama_embed, ollama.OllamaVectors, OllamaError),
    _row(OLLAMA_EMBEDDINGS, DialectsApi.ollama_embeddings, ollama.OllamaVector, OllamaError),
    Route("GET", "/api/tags", ANY_KEY, DialectsApi.ollama_tags),
    Route("POST", "/api/show", ANY_KEY, DialectsApi.ollama_show, failures=(ModelNotFound,)),
    Route("GET", "/api/version", ANY_KEY, DialectsApi.ollama_version),
    _row(COHERE_EMBED, DialectsApi.cohere_embed, cohere.CohereVectors, CohereError),
    _row(COHERE_EMBED_V1, DialectsApi.cohere_embed_v1, cohere.CohereVectors, CohereError),
    _row(TEI_EMBED, DialectsApi.tei_embed, list[list[float]], TeiError),
    _row(TEI_ROOT, DialectsApi.tei_root, list[list[float]], TeiError),
    _row(TEI_EMBED_BY, DialectsApi.tei_embed_by, list[list[float]], TeiError),
    Route("GET", "/info", ANY_KEY, DialectsApi.tei_info, failures=(ModelNotFound, MissingParameter)),
    Route("GET", "/tei/{id}/info", ANY_KEY, DialectsApi.tei_info_by, failures=(ModelNotFound,), any_name=True),
    Route("POST", "/embed_all", ANY_KEY, DialectsApi.tei_embed_all, failures=(InvalidValue,)),
    _row(GOOGLE_EMBED, DialectsApi.google_embed, google.GoogleVector, GoogleError),
    _row(GOOGLE_EMBED_SEVERAL, DialectsApi.google_embed_several, google.GoogleVectors, GoogleError),
)
