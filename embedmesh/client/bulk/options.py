"""What a caller may say about a bulk run, and what follows from that."""

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from embedmesh.client.errors import WrongCall
from embedmesh.client.refusals import Problem

if TYPE_CHECKING:
    from embedmesh.client.access import Access
    from embedmesh.client.bulk.replies import Rows
    from embedmesh.client.core import Trust

CONCURRENCY_MAX = 1_024  # a connection each; the system's own bound is often as much


class BulkProgress(NamedTuple):
    """How far a run is. `texts` are done, those that were refused included, of `total`, where that is known."""

    texts: int
    total: int | None
    refused: int
    tokens: int
    cost_nanousd: int
    seconds: float


class Chunk(NamedTuple):
    """Vectors of consecutive texts, one a row; `start` is the index of the first. A refused text has a row of NaN."""

    start: int
    vectors: "Rows"


class BulkOptions(TypedDict, total=False):
    """Options of `embed` and `embed_stream`.

    `dimensions`, `input_type`, `truncate`, `user`, `extra_body`, `confidential`: as of `embeddings.create`.
    `concurrency`: requests in flight, "auto" for as many as make it faster. `batch_size`: texts a request at most; by
    default requests are cut by tokens. `idempotent`: every request has an Idempotency-Key, so that what is sent again
    is not paid twice, whichever gateway gets it. `progress` is called when texts are done. `on_refused` is called with
    the index of each text that the endpoint refuses, and why; its row is NaN then. Without it the first such text ends
    the run.
    """

    dimensions: int | None
    input_type: str | None
    truncate: Literal["none", "end", "start"] | None
    user: str | None
    extra_body: Mapping[str, Any] | None
    confidential: bool | None
    idempotent: bool
    concurrency: int | Literal["auto"]
    batch_size: int | None
    progress: Callable[[BulkProgress], object] | None
    on_refused: Callable[[int, Problem], object] | None


class BulkCall(NamedTuple):
    """A run that can begin. `within_s` is the time for one reply, and `silence_max_s` for none at all."""

    access: "Access"
    fields: Mapping[str, Any]
    trust: "Trust | None"
    idempotent: bool
    concurrency: int | None
    batch_size: int | None
    progress: Callable[[BulkProgress], object] | None
    on_refused: Callable[[int, Problem], object] | None
    within_s: float
    dice: Any = random


def bulk_fields(model: str, options: BulkOptions) -> dict[str, Any]:
    """The members of every request beside its input. Raises WrongCall for options that do not exist."""
    if unknown := options.keys() - BulkOptions.__annotations__.keys():
        raise WrongCall(f"There is no option {min(unknown)}. Members of the request go into extra_body.")
    named = ("dimensions", "input_type", "truncate", "user")
    given = {name: options.get(name) for name in named}
    return {name: value for name, value in given.items() if value is not None} | {
        **(options.get("extra_body") or {}),
        "model": model,
    }


def bulk_concurrency(options: BulkOptions) -> int | None:
    """None for "auto". Raises WrongCall."""
    asked = options.get("concurrency", "auto")
    if asked == "auto":
        return None
    if not isinstance(asked, int) or not 1 <= asked <= CONCURRENCY_MAX:
        raise WrongCall(f'concurrency must be "auto", or from 1 to {CONCURRENCY_MAX:,}.')
    return asked


def bulk_batch_size(options: BulkOptions) -> int | None:
    """None for requests that are cut by tokens. Raises WrongCall."""
    asked = options.get("batch_size")
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise WrongCall("batch_size must be at least 1.")
    return asked
