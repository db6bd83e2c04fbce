"""The `/embed` of Text Embeddings Inference, which huggingface_hub's InferenceClient speaks, too.

https://huggingface.github.io/text-embeddings-inference/. It names no model: the path may, or there is only one.
"""

from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from embedmesh.dialects.adapted import Adapted
from embedmesh.dialects.quantised import Matrix
from embedmesh.rules.errors import CallerFailure, Failure, Overloaded, RateLimited
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.limits import REQUEST_INPUTS_MAX

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
