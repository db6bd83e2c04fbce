"""BERT (Devlin et al. 2018), post-norm, absolute positions: what all-MiniLM, bge, e5 and gte of the first kind are."""

from typing import Any, NamedTuple

import openvino as ov

from embedmesh.engine.models.config import EncoderConfig, RowCount, read_config
from embedmesh.engine.models.encoder import Encoder
from embedmesh.engine.models.graph import add, first, indexes, rows_at, score_mask
from embedmesh.engine.safetensors import Weights

BERT_FIXED = {"position_embedding_type": "absolute"}


class BertConfig(EncoderConfig, frozen=True, kw_only=True):
    """The fields of config.json that decide the numbers."""

    type_vocab_size: RowCount = 2


class LayerNames(NamedTuple):
    """What a model of BERT's kind calls the tensors of a layer; `layer` is the prefix, by the layer's number."""

    layer: str = "encoder.layer.{}."
    parts: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    mixed: str = "attention.output.dense"
    mixed_norm: str = "attention.output.LayerNorm"
    wide: str = "intermediate.dense"
    narrow: str = "output.dense"
    norm: str = "output.LayerNorm"


def build(fields: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output, **pair: Any) -> ov.Output:
    """Token states of a BERT model. Raises SetupError for a variant that is not known."""
    return encode(read_config(fields, BertConfig, fixed=BERT_FIXED), weights, ids, mask, indexes(ids), **pair)


def encode(
    config: BertConfig,
    weights: Weights,
    ids: ov.Output,
    mask: ov.Output,
    at: ov.Output,
    *,
    types: ov.Output | None = None,
    first_only: bool = False,
) -> ov.Output:
    """Token states; `at` says which learned position each token has, [length] or a row each, and `types` its type."""
    encoder = Encoder(config, weights)
    states = embed_tokens(encoder, config, ids, at, types)
    return run_layers(encoder, config.num_hidden_layers, states, score_mask(mask), LayerNames(), first_only=first_only)


def embed_tokens(
    encoder: Encoder, config: BertConfig, ids: ov.Output, at: ov.Output, types: ov.Output | None
) -> ov.Output:
    """What goes into the first layer: words, positions and token types."""
    positions = encoder.table("embeddings.position_embeddings", config.max_position_embeddings)
    segments = encoder.table("embeddings.token_type_embeddings", config.type_vocab_size)
    if types is None:  # a lone text has no second segment: all its tokens are of type 0
        states = add(encoder.embed(ids), rows_at(positions + segments[0], at))
    else:
        states = add(add(encoder.embed(ids), rows_at(positions, at)), rows_at(segments, types))
    return encoder.norm(states, "embeddings.LayerNorm")


def run_layers(
    encoder: Encoder,
    layers: int,
    x: ov.Output,
    scores_plus: ov.Output,
    names: LayerNames,
    *,
    first_only: bool = False,
) -> ov.Output:
    """Token states after all layers. With `first_only` that of the first token alone, [rows, 1, hidden].

    The last layer then mixes all tokens for that one: of six layers' work a seventh is saved.
    """
    for number in range(layers):
        at = names.layer.format(number)
        wanted = x
        if first_only and number == layers - 1:
            wanted, scores_plus = first(x, 1), first(scores_plus, 2)
        query, *others = names.parts
        parts = [encoder.dense(wanted, at + query), *(encoder.dense(x, at + name) for name in others)]
        mixed = encoder.dense(encoder.attend(parts, scores_plus), at + names.mixed)
        x = encoder.norm(add(mixed, wanted), at + names.mixed_norm)
        narrow = encoder.narrow(encoder.activate(encoder.widen(x, at + names.wide)), at + names.narrow)
        x = encoder.norm(add(narrow, x), at + names.norm)
    return x
