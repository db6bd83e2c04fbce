"""BERT (Devlin et al. 2018), post-norm, absolute positions: what all-MiniLM, bge, e5 and gte of the first kind are."""

from typing import Any

import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import EncoderConfig, Rows, read_config
from embedmesh.engine.models.graph import (
    activate,
    add,
    attention,
    axes,
    dense,
    layer_norm,
    places,
    rows_at,
    score_mask,
    split_heads,
    weight,
)
from embedmesh.engine.safetensors import Weights

ONLY = {"position_embedding_type": "absolute"}


class Config(EncoderConfig, frozen=True, kw_only=True):
    """The members of config.json that decide the numbers."""

    type_vocab_size: Rows = 2


def build(members: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    """Token states of a BERT model. Raises SetupError for a variant that is not known."""
    config = read_config(members, Config, only=ONLY)
    weights = weights.rooted("embeddings.word_embeddings.weight")
    return encode(config, weights, ids, mask, places(ids))


def encode(config: Config, weights: Weights, ids: ov.Output, mask: ov.Output, at: ov.Output) -> ov.Output:
    """Token states [rows, length, width]; `at` says which learned position each token has, [length] or a row each."""
    states = _embed(config, weights, ids, at)
    masked = score_mask(mask)
    for number in range(config.num_hidden_layers):
        states = _layer(config, weights, states, masked, f"encoder.layer.{number}.")
    return states


def _embed(config: Config, weights: Weights, ids: ov.Output, at: ov.Output) -> ov.Output:
    """Word + position + token type 0 (a lone text has no second segment), normalised."""
    width = config.hidden_size
    words = weights.get("embeddings.word_embeddings.weight", config.vocab_size, width)
    positions = weights.get("embeddings.position_embeddings.weight", config.max_position_embeddings, width)
    types = weights.get("embeddings.token_type_embeddings.weight", config.type_vocab_size, width)
    states = op.add(op.gather(weight(words), ids, axes(0)), rows_at(positions + types[0], at)).output(0)
    return layer_norm(states, weights, "embeddings.LayerNorm", width, config.layer_norm_eps)


def _layer(config: Config, weights: Weights, x: ov.Output, masked: ov.Output, at: str) -> ov.Output:
    width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    query, key, value = (
        split_heads(dense(x, weights, f"{at}attention.self.{name}", width, width), config.num_attention_heads)
        for name in ("query", "key", "value")
    )
    mixed = dense(attention(query, key, value, masked), weights, f"{at}attention.output.dense", width, width)
    x = layer_norm(add(mixed, x), weights, f"{at}attention.output.LayerNorm", width, eps)
    wide = activate(dense(x, weights, f"{at}intermediate.dense", inner, width), config.hidden_act)
    narrow = dense(wide, weights, f"{at}output.dense", width, inner)
    return layer_norm(add(narrow, x), weights, f"{at}output.LayerNorm", width, eps)
