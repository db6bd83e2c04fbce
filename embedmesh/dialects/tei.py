"""The `/embed` and `/rerank` of Text Embeddings Inference; the first one huggingface_hub's InferenceClient speaks, too.

https://huggingface.github.io/text-embeddings-inference/. It names no model: the path may, or there is only one.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from embedmesh.dialects.adapted import Adapted
from embedmesh.dialects.quantised import Matrix
from embedmesh.dialects.reranking import SOME_DOCUMENTS, SOME_QUERY, RerankForm
from embedmesh.rules.errors import CallerFailure, Failure, Overloaded, RateLimited
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.reranking import Ranked, RerankCall, RerankCounts

Text = Annotated[str, Meta(min_length=1)]


class TeiEmbed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `/embed`."""

    inputs: Text | Annotated[list[Text], Meta(min_length=1, max_length=REQUEST_INPUTS_MAX)]
    normalize: bool = True
    truncate: bool = False
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"
    prompt_name: str | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None


def envelope(failure: Failure) -> bytes:
    """How TEI tells failures."""
    busy = isinstance(failure, Overloaded | RateLimited)
    kind = "Overloaded" if busy else "Validation" if isinstance(failure, CallerFailure) else "Backend"
    return orjson.dumps({"error": failure.message, "error_type": kind})


def _ours(asked: TeiEmbed) -> dict[str, Any]:
    side = "start" if asked.truncation_direction.lower() == "left" else "end"
    return {
        "input": asked.inputs,
        "normalize": asked.normalize,
        "truncate": side if asked.truncate else "none",
        "prompt_name": asked.prompt_name,
        "dimensions": asked.dimensions,
    }


def _write(asked: TeiEmbed, matrix: Matrix, answer: Answer) -> Any:
    return matrix


EMBED = Adapted(TeiEmbed, _ours, _write, envelope, {"input": "inputs"})


class TeiRerank(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `/rerank`. Pairs that are too long are cut at their end only, the longer text first.

    `top_n` is not TEI's: some clients send it, to have only the best.
    """

    query: Annotated[str, SOME_QUERY]
    texts: Annotated[list[str], SOME_DOCUMENTS]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool = False
    truncation_direction: Literal["Right", "right"] = "Right"
    top_n: Annotated[int, Meta(ge=1)] | None = None


class TeiRanked(msgspec.Struct, frozen=True, omit_defaults=True):
    """A text's position in the request, and its score; with `return_text` the text, too."""

    index: Annotated[int, Meta(ge=0)]
    score: float
    text: str | None = None


def _meanings(asked: TeiRerank) -> dict[str, Any]:
    return {
        "query": asked.query,
        "documents": asked.texts,
        "top_n": asked.top_n,
        "truncate": "end" if asked.truncate else "none",
        "raw": asked.raw_scores,
    }


def _write_ranked(call: RerankCall, ranked: Sequence[Ranked], counts: RerankCounts) -> Any:
    if call.asked.return_text:
        return [{"index": each.index, "score": each.score, "text": call.documents[each.index]} for each in ranked]
    return [{"index": each.index, "score": each.score} for each in ranked]


RERANK = RerankForm(
    TeiRerank,
    _meanings,
    _write_ranked,
    envelope,
    {"documents": "texts", "input": "texts"},
    echoes=lambda asked: asked.return_text,
)
