"""`/v1/rerank`, `/v2/rerank`, `/rerank` and `/tei/MODEL/rerank`: adapt HTTP to the flow; no rule lives here."""

from typing import Any

import msgspec
from aiohttp import web

from embedmesh.dialects import tei
from embedmesh.dialects.rerank import RerankList, RerankRequest, VoyageRerankList, rerank_forms
from embedmesh.dialects.reranking import RerankPath
from embedmesh.flow.operation import Operation
from embedmesh.flow.rerank import Rerank
from embedmesh.gateway.api.dialects_api import FAILURES, TeiError
from embedmesh.gateway.api.embeddings_api import EMBEDDING_HEADERS, IDEMPOTENCY_KEY, JOB, EmbeddingsApi
from embedmesh.gateway.api.pages.samples import ORIGIN
from embedmesh.gateway.api.routes import Api, ApiReply, RawHandler, Route
from embedmesh.http.failures import status_and_type
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, RERANK_DOCUMENTS_MAX, RERANK_TOKENS_MAX
from embedmesh.rules.ports import EMBED_SCOPE

RERANK_PATH, RERANK_V2_PATH = "/v1/rerank", "/v2/rerank"
TEI_RERANK_PATH, TEI_RERANK_BY_PATH = "/rerank", "/tei/{id}/rerank"
RERANK_MODEL = "cross-encoder/ms-marco-MiniLM-L6-v2"  # as in docs/reference/catalogue.md
RERANK_FORM, RERANK_V2_FORM, PLAIN_RERANK_FORM = rerank_forms(lambda failure: status_and_type(failure)[1])
RERANK, RERANK_V2, TEI_RERANK = Rerank(RERANK_FORM), Rerank(RERANK_V2_FORM), Rerank(tei.RERANK)

RERANK_CURL = f"""\
curl {ORIGIN}{RERANK_PATH} \\
  -H "Authorization: Bearer $EMBEDMESH_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{RERANK_MODEL}", "query": "What is a lemon?", "top_n": 1,
       "documents": ["A yellow fruit.", "A red vehicle."]}}'
"""
COHERE_PYTHON = f"""\
# pip install cohere
import os

import cohere

client = cohere.ClientV2(
    base_url="{ORIGIN}",
    api_key=os.environ["EMBEDMESH_API_KEY"],
)
reply = client.rerank(
    model="{RERANK_MODEL}",
    query="What is a lemon?",
    documents=["A yellow fruit.", "A red vehicle."],
)

for result in reply.results:
    print(result.index, result.relevance_score)
"""
RERANK_SAMPLES = [
    {"lang": "shell", "label": "rerank · curl", "source": RERANK_CURL},
    {"lang": "python", "label": "cohere · Python", "source": COHERE_PYTHON},
]


class RerankErrorMembers(msgspec.Struct, frozen=True):
    """As in every other failure."""

    message: str
    type: str
    param: str | None
    code: str | None


class RerankError(msgspec.Struct, frozen=True):
    """A failure. `message` is for Cohere's clients, `detail` for Voyage's and Jina's: the same words."""

    error: RerankErrorMembers
    message: str
    detail: str


class RerankApi(Api):
    """Documents in the order of their scores for a query."""

    TAG = "Rerank"

    def __init__(self, embeddings: EmbeddingsApi) -> None:
        self._embeddings = embeddings
        self.bodies = embeddings.bodies

    async def rerank(self, request: web.BaseRequest) -> web.StreamResponse:
        """Rerank documents.

        A score for the query and each document, best first: as Cohere, Jina, Voyage, vLLM and Infinity do. You
        pay for the tokens of all pairs, the query once for each document; or for a search, if the model has a price of
        searches.
        """
        return await self._answer(request, RERANK, RERANK_PATH)

    async def rerank_v2(self, request: web.BaseRequest) -> web.StreamResponse:
        """Rerank documents, at Cohere's second path. The same as `POST /v1/rerank`."""
        return await self._answer(request, RERANK_V2, RERANK_V2_PATH)

    async def tei_rerank(self, request: web.BaseRequest) -> web.StreamResponse:
        """Rerank documents as Text Embeddings Inference does, or as `POST /v1/rerank`.

        The first where the body has `texts`, for the only model here that reranks; else the second.
        """
        either = Rerank(RerankPath("texts", tei.RERANK, PLAIN_RERANK_FORM))
        return await self._answer(request, either, TEI_RERANK_PATH)

    async def tei_rerank_by(self, request: web.BaseRequest) -> web.StreamResponse:
        """Rerank texts as Text Embeddings Inference does, by a model. The path names it."""
        return await self._answer(request, TEI_RERANK, TEI_RERANK_BY_PATH)

    async def _answer(self, request: web.BaseRequest, operation: Operation, path: str) -> web.StreamResponse:
        return await self._embeddings.exchange(request, operation, path, form=path)


DETAILS = (
    f"A request takes at most {RERANK_DOCUMENTS_MAX:,} documents, {RERANK_TOKENS_MAX:,} tokens of all pairs and "
    f"{REQUEST_BODY_BYTES_MAX // 1024**2} MiB of plain JSON."
)


def _rerank_row(path: str, handler: Any, request: Any, reply: Any, error: Any, samples: Any = None) -> Route:
    told = ApiReply("The best documents, best first.", reply, headers=EMBEDDING_HEADERS)
    extra = {"parameters": [IDEMPOTENCY_KEY, JOB], **({"x-codeSamples": samples} if samples else {})}
    raw = RawHandler({200: told}, request, key_checked_by_flow=True, extra=extra, error=error)
    return Route("POST", path, (EMBED_SCOPE,), handler, failures=FAILURES, details=DETAILS, raw=raw)


LISTS = (RerankList, VoyageRerankList)
TEI_LIST = list[tei.TeiRanked]
RerankApi.ROUTES = (
    _rerank_row(RERANK_PATH, RerankApi.rerank, RerankRequest, LISTS, RerankError, RERANK_SAMPLES),
    _rerank_row(RERANK_V2_PATH, RerankApi.rerank_v2, RerankRequest, LISTS, RerankError),
    _rerank_row(
        TEI_RERANK_PATH,
        RerankApi.tei_rerank,
        (tei.TeiRerank, RerankRequest),
        (TEI_LIST, *LISTS),
        (TeiError, RerankError),
    ),
    _rerank_row(TEI_RERANK_BY_PATH, RerankApi.tei_rerank_by, tei.TeiRerank, TEI_LIST, TeiError),
)


def rerank_request_examples() -> dict[str, Any]:
    """For the OpenAPI document."""
    documents = ["A yellow fruit.", "A red vehicle."]
    request = {"model": RERANK_MODEL, "query": "What is a lemon?", "documents": documents, "return_documents": True}
    return {"two": {"summary": "Two documents, told with their texts", "value": request}}


def rerank_reply_examples() -> dict[str, Any]:
    """The reply to that request, for the OpenAPI document."""
    results = [
        {"index": 0, "relevance_score": 8.5, "document": {"text": "A yellow fruit."}},
        {"index": 1, "relevance_score": -11.25, "document": {"text": "A red vehicle."}},
    ]
    reply = {
        "id": "rerank",
        "object": "list",
        "model": RERANK_MODEL,
        "results": results,
        "usage": {"prompt_tokens": 26, "total_tokens": 26},
        "meta": {"api_version": {"version": "1"}, "billed_units": {"input_tokens": 26}},
    }
    return {"two": {"summary": "Logits, which this model's scores are", "value": reply}}
