"""What the operator's catalogue says of a model. Prices and checks refer to this, never to a node's word."""

from typing import Literal

import msgspec

TokenIds = Literal["cl100k", "native"]
Tier = Literal["exact", "fast", "int8"]
TIERS: tuple[Tier, ...] = ("exact", "fast", "int8")
Modality = Literal["embeddings", "rerank", "chat", "completions", "images"]
EMBEDDINGS: tuple[Modality, ...] = ("embeddings",)
RERANK: tuple[Modality, ...] = ("rerank",)
Scores = Literal["sigmoid", "raw"]
"""What a reranker's score is by its own definition: the logistic function of its logit, or the logit."""


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the catalogue.

    `width` counts the components of a vector. `max_tokens` bounds one input, special tokens included.
    `price` is nano-USD per million tokens. `digest` is over weights, tokenizer, pooling and prompts
    (`embedmesh.engine.folder.digest`); a node that reports another is not asked. `prompts` maps a role (`query`,
    `document`) to the words that the model wants in front of such a text.

    A *foreign* model, that only servers of other makes run, has no folder here and no digest: its tokens cannot be
    counted before it is asked.

    A model that reranks gives one number for a pair of a query and a document, its logit: `width` is 1. `scores` says
    what callers are told of it. With a `search_price`, in nano-USD a search (rules.reranking), tokens cost nothing.

    A model that generates is foreign, and its `max_tokens` bounds prompt and output together. `price` is that of its
    input; `output_price` and `cached_price` are those of what it makes, and of input that its node had cached (None: as
    other input). `output_max` is how much it makes where the caller sets no limit. Its template may add
    `template_tokens` to a request, and as many to each message. `image_tokens` is what an image in its input takes;
    None if it takes no images. `image_prices` are nano-USD for an image made, by size, the model's own size first. With
    `pass_unknown`, members of requests that we do not know go to its nodes as they are. `charge_partial`: whether an
    answer is charged that its node breaks off. `affinity`: whether requests that begin alike go to one node, whose
    cache then has their beginning.
    """

    id: str
    folder: str = ""
    width: int
    max_tokens: int
    price: int
    digest: str = ""
    aliases: tuple[str, ...] = ()
    token_ids: TokenIds = "cl100k"
    prompts: dict[str, str] = {}
    tier: Tier = "exact"
    modalities: tuple[Modality, ...] = EMBEDDINGS
    output_price: int = 0
    cached_price: int | None = None
    output_max: int = 0
    template_tokens: int = 0
    image_tokens: int | None = None
    image_prices: dict[str, int] = {}
    pass_unknown: bool = False
    charge_partial: bool = False
    affinity: bool = False
    scores: Scores = "sigmoid"
    search_price: int | None = None

    @property
    def embeds(self) -> bool:
        """Whether it makes vectors."""
        return self.modalities == EMBEDDINGS

    @property
    def reranks(self) -> bool:
        """Whether it scores pairs of a query and a document."""
        return self.modalities == RERANK

    @property
    def encodes(self) -> bool:
        """Whether nodes give numbers for its inputs, `width` for each: vectors or scores. All others generate."""
        return self.modalities in (EMBEDDINGS, RERANK)

    @property
    def foreign(self) -> bool:
        """Whether its files are not here."""
        return not self.folder
