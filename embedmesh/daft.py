"""Daft: a provider for `embed_text`. The width of a column of vectors comes from `/v1/models`: nothing is paid for it."""

import asyncio
from typing import Any

import numpy as np

from embedmesh.client.access import find_access
from embedmesh.client.bulk.shared import SharedClient
from embedmesh.client.errors import InputRefused, WrongCall
from embedmesh.client.models import served_width

try:
    import daft
    from daft.ai.provider import Provider
except ImportError:
    raise ImportError("embedmesh.daft needs Daft: pip install 'embedmesh[daft]'") from None

BATCH_ROWS = 1_024  # of a call: two requests or more of short texts, so that several are in flight
BATCHES_AT_ONCE = 4  # of a worker: while some wait for their last reply, others are asked for
OF_REQUESTS = frozenset({"input_type", "truncate", "user", "extra_body", "idempotent"})


class EmbedmeshProvider(Provider):  # type: ignore[misc]
    """`embed_text(df["text"], provider=EmbedmeshProvider(), model="all-MiniLM-L6-v2")`.

    `base_url` and `api_key` are those of EMBEDMESH_BASE_URL and EMBEDMESH_API_KEY where they are not given; a key that
    is given goes to the workers within the plan.
    """

    def __init__(self, name: str = "embedmesh", *, base_url: str | None = None, api_key: str | None = None) -> None:
        """Raises WrongCall."""
        self._name = name
        self._given = {"base_url": base_url, "api_key": api_key}
        find_access(base_url, api_key, None)

    @property
    def name(self) -> str:
        """What a session calls it."""
        return self._name

    def embed_text(self, text: Any, model: str | None = None, dimensions: int | None = None, **options: Any) -> Any:
        """An expression: `Embedding[Float32; width]`, null where the text is null.

        Of Daft's own options `batch_size` (rows a call), `max_concurrency` (calls of a worker at one time) and
        `on_error` count: "raise", or "log" and "ignore" for a null where a text is refused. Others are those of a
        request: `input_type`, `truncate`, `user`, `extra_body`, `idempotent`. Raises WrongCall, CallRefused,
        CallNotAnswered.
        """
        if model is None:
            raise WrongCall("Name the model: embed_text(…, model=…).")
        rows = options.pop("batch_size", None) or BATCH_ROWS
        at_once = options.pop("max_concurrency", None) or BATCHES_AT_ONCE
        keeps_going = options.pop("on_error", "raise") in ("log", "ignore")
        options.pop("max_retries", None)  # the client's own: as often as it helps
        if unknown := options.keys() - OF_REQUESTS:
            raise WrongCall(f"There is no option {min(unknown)}. Members of the request go into extra_body.")
        width = dimensions or served_width(find_access(**self._given, ssl_context=None), model)
        given = {**self._given, **options, "model": model, "dimensions": dimensions}
        made = daft.cls(DaftTextEmbedder, max_concurrency=at_once, name_override="embed_text")
        return made(given, width, keeps_going).embed(text, rows)
