"""DistilBERT (Sanh et al. 2019): BERT's layers under other names, without token types."""

from typing import Any

import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import EncoderConfig, read_config
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

EPS = 1e-12  # written into the reference's code, no member of config.json
SPELLINGS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}


def build(members: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    """Token states of a DistilBERT model. Raises SetupError for a variant that is not known.

    `sinusoidal_pos_embds` only says how the table of positions was made: the file has the table either way.
    """
    config = read_config({**members, "layer_norm_eps": EPS}, EncoderConfig, spellings=SPELLINGS)
    weights = weights.rooted("embeddings.word_embeddings.weight")
    width = config.hidden_size
    words = weights.get("embeddings.word_embeddings.weight", config.vocab_size, width)
    positions = weights.get("embeddings.position_embeddings.weight", config.max_position_embeddings, width)
    states = op.add(op.gather(weight(words), ids, axes(0)), rows_at(positions, places(ids))).output(0)
    states = layer_norm(states, weights, "embeddings.LayerNorm", width, EPS)
    masked = score_mask(mask)
    for number in range(config.num_hidden_layers):
        states = _layer(config, weights, states, masked, f"transformer.layer.{number}.")
    return states


def _layer(config: EncoderConfig, weights: Weights, x: ov.Output, masked: ov.Output, at: str) -> ov.Output:
    width, inner = config.hidden_size, config.intermediate_size
    query, key, value = (
        split_heads(dense(x, weights, f"{at}attention.{name}_lin", width, width), config.num_attention_heads)
        for name in ("q", "k", "v")
    )
    mixed = dense(attention(query, key, value, masked), weights, f"{at}attention.out_lin", width, width)
    x = layer_norm(add(mixed, x), weights, f"{at}sa_layer_norm", width, EPS)
    wide = activate(dense(x, weights, f"{at}ffn.lin1", inner, width), config.hidden_act)
    narrow = dense(wide, weights, f"{at}ffn.lin2", width, inner)
    return layer_norm(add(narrow, x), weights, f"{at}output_layer_norm", width, EPS)
