"""What the operator's catalogue says of a model. Prices and checks refer to this, never to a node's word."""

from typing import Literal

import msgspec

TokenIds = Literal["cl100k", "native"]
Tier = Literal["exact", "fast", "int8"]
TIERS: tuple[Tier, ...] = ("exact", "fast", "int8")


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the catalogue.

    `width` counts the components of a vector. `max_tokens` bounds one input, special tokens included.
    `price` is nano-USD per million tokens. `digest` is over weights, tokenizer, pooling and prompts
    (`embedmesh.engine.folder.digest`); a node that reports another is not asked. `prompts` maps a role (`query`,
    `document`) to the words that the model wants in front of such a text.

    A *foreign* model, that only servers of other makes run, has no folder here and no digest: its tokens cannot be
    counted before it is asked.
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

    @property
    def foreign(self) -> bool:
        """Whether its files are not here."""
        return not self.folder
