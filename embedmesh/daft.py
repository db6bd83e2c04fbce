"""Daft: a provider for `embed_text`. The width of a column of vectors comes from `/v1/models`: none is paid for it."""

import asyncio
from typing import Any

from embedmesh.client.access import find_access
from embedmesh.client.bulk.shared import SharedClient
from embedmesh.client.errors import InputRefused, WrongCall
from embedmesh.client.models import served_width

try:
    from daft import DataType
    from daft.ai.protocols import TextEmbedderDescriptor
    from daft.ai.provider import Provider
    from daft.ai.typing import EmbeddingDimensions
except ImportError:
    raise ImportError("embedmesh.daft needs Daft: pip install 'embedmesh[daft]'") from None

BATCH_ROWS = 1_024  # of a call: several requests, or two of short texts
BATCHES_AT_ONCE = 4  # of a worker: while some wait for their last reply, others are asked for
OF_REQUESTS = frozenset({"input_type", "truncate", "user", "extra_body", "idempotent"})


class EmbedmeshProvider(Provider):  # type: ignore[misc]
    """`embed_text(df["text"], provider=EmbedmeshProvider(), model="all-MiniLM-L6-v2")`.

    `base_url` and `api_key` are those of EMBEDMESH_BASE_URL and EMBEDMESH_API_KEY where they are not given; a key that
    is given goes to the workers within the plan.
    """

    def __init__(self, name: str = "embedmesh", *, base_url: str | None = None, api_key: str | None = None) -> None:
        """Raises WrongCall where no gateway or no key is known."""
        self._name = name
        self._given = {"base_url": base_url, "api_key": api_key}
        find_access(base_url, api_key, None)

    @property
    def name(self) -> str:
        """What a session calls it."""
        return self._name

    def get_text_embedder(
        self, model: str | None = None, dimensions: int | None = None, **options: Any
    ) -> "DaftTextDescriptor":
        """For `embed_text`: a column `Embedding[Float32; width]`, null where the text is null.

        Of Daft's own options `batch_size` (rows a call), `concurrency` (calls of a worker at one time) and `on_error`
        count: "raise", or "log" and "ignore" for a null where a text is refused; what ends all requests raises in any
        case. Others are those of a request: `input_type`, `truncate`, `user`, `extra_body`, `idempotent`. Raises
        WrongCall, CallRefused, CallNotAnswered.
        """
        if model is None:
            raise WrongCall("Name the model: embed_text(…, model=…).")
        of_daft = {
            "batch_size": options.pop("batch_size", None) or BATCH_ROWS,
            "concurrency": options.pop("concurrency", None) or BATCHES_AT_ONCE,
            "max_retries": 0,  # the client tries as often as it helps
            "on_error": "raise",
        }
        nulls = options.pop("on_error", "raise") in ("log", "ignore")
        options.pop("max_retries", None)
        if unknown := options.keys() - OF_REQUESTS:
            raise WrongCall(f"There is no option {min(unknown)}. Members of the request go into extra_body.")
        width = dimensions or served_width(find_access(**self._given, ssl_context=None), model)
        of_client = {**self._given, **options, "model": model, "dimensions": dimensions}
        return DaftTextDescriptor(self._name, width, of_client, of_daft, nulls)


class DaftTextDescriptor(TextEmbedderDescriptor):  # type: ignore[misc]
    """What Daft carries to its workers: how to make an embedder there. Its form does not show the key."""

    def __init__(self, name: str, width: int, of_client: dict[str, Any], of_daft: dict[str, Any], nulls: bool) -> None:
        self._name, self._width, self._nulls = name, width, nulls
        self._of_client, self._of_daft = of_client, of_daft

    def __repr__(self) -> str:
        return f"DaftTextDescriptor({self.get_model()})"

    def get_provider(self) -> str:
        """The provider's name."""
        return self._name

    def get_model(self) -> str:
        """The model's."""
        model: str = self._of_client["model"]
        return model

    def get_options(self) -> dict[str, Any]:
        """Those of Daft."""
        return dict(self._of_daft)

    def get_dimensions(self) -> Any:
        """Of the vectors."""
        return EmbeddingDimensions(size=self._width, dtype=DataType.float32())

    def is_async(self) -> bool:
        """So that several batches are under way."""
        return True

    def instantiate(self) -> "DaftTextEmbedder":
        """On a worker."""
        return DaftTextEmbedder(SharedClient(**self._of_client), self._nulls)


class DaftTextEmbedder:
    """A worker's. Its batches share a client."""

    def __init__(self, client: SharedClient, nulls: bool) -> None:
        self._client, self._nulls = client, nulls

    async def embed_text(self, text: list[str | None]) -> list[Any]:
        """A vector for each text, None for None. Raises subclasses of EmbedmeshError."""
        done = await asyncio.wrap_future(self._client.embed(text))
        if done.refused and not self._nulls:
            raise InputRefused(*min(done.refused.items()))
        return [
            None if one is None or at in done.refused else row
            for at, (one, row) in enumerate(zip(text, done.vectors, strict=True))
        ]
