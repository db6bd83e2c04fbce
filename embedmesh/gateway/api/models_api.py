"""`/v1/models`: the models that ready nodes serve."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from embedmesh.fleet.registry import Registry
from embedmesh.flow.world import World
from embedmesh.gateway.api.replies import Count, ReplyList, doc
from embedmesh.gateway.api.routes import ANY_KEY, Api, ApiCall, Route
from embedmesh.http.paths import MODELS_PATH
from embedmesh.rules.errors import ModelNotFound
from embedmesh.rules.models import Modality, Model, Scores, Tier
from embedmesh.rules.served import no_such_model

Positive = Annotated[int, Meta(ge=1)]


class ModelReply(msgspec.Struct, frozen=True):
    """A model."""

    id: str
    object: Literal["model"]
    created: Annotated[Count, doc("Unix time in seconds; 0 if it is not known.")]
    owned_by: str
    aliases: Annotated[tuple[str, ...], doc("Other names that requests may use.")]
    tier: Annotated[Tier, doc("The precision of the arithmetic.")]
    modalities: Annotated[
        tuple[Modality, ...], doc("What it does: `embeddings`, `rerank`, or `chat`, `completions`, `images`.")
    ]
    width: Annotated[Count, doc("Components of a vector; 0 if it makes none.")]
    max_tokens: Annotated[
        Positive, doc("Most tokens of one input, special tokens included; of a model that generates, with its answer.")
    ]
    price_nanousd_per_million_tokens: Annotated[Count, doc("Nano-USD (1e-9 USD) per million tokens of input.")]
    output_price_nanousd_per_million_tokens: Annotated[Count, doc("The same, of what it makes.")]
    image_prices_nanousd: Annotated[dict[str, Count], doc("Nano-USD for an image that it makes, by size.")]
    scores: Annotated[Scores | None, doc("What its scores are, if it reranks, by the model's own definition.")]
    search_price_nanousd: Annotated[Count | None, doc("Nano-USD a search, if it reranks and is paid by searches.")]
    nodes: Annotated[Count, doc("Ready nodes that serve it.")]


class ModelsApi(Api):
    TAG = "Models"

    def __init__(self, world: World, registry: Registry) -> None:
        self._world = world
        self._registry = registry

    async def list_models(self, call: ApiCall[None, None]) -> ReplyList[ModelReply]:
        """List models. The models that ready nodes serve now. Any API key of this gateway may list them."""
        served = [model for model in self._world.catalogue.models if self._registry.ready(model.id)]
        return ReplyList("list", [self._reply(model) for model in served])

    async def get_model(self, call: ApiCall[None, None]) -> ModelReply:
        """Get a model. By id, alias, or either with a precision suffix. Send a slash in it as `/` or `%2F`."""
        model = self._world.catalogue.find(call.parameter)
        if model is None or not self._registry.ready(model.id):
            raise no_such_model(call.parameter, self._world.catalogue, self._world.terms.serves)
        return self._reply(model)

    def _reply(self, model: Model) -> ModelReply:
        return ModelReply(
            id=model.id,
            object="model",
            created=0,
            owned_by="embedmesh",
            aliases=model.aliases,
            tier=model.tier,
            modalities=model.modalities,
            width=model.width if not model.reranks else 0,
            max_tokens=model.max_tokens,
            price_nanousd_per_million_tokens=model.price,
            output_price_nanousd_per_million_tokens=model.output_price,
            image_prices_nanousd=model.image_prices,
            scores=model.scores if model.reranks else None,
            search_price_nanousd=model.search_price,
            nodes=len(self._registry.ready(model.id)),
        )

    ROUTES = (
        Route("GET", MODELS_PATH, ANY_KEY, list_models),
        Route("GET", "/v1/models/{id}", ANY_KEY, get_model, failures=(ModelNotFound,), any_name=True),
    )
