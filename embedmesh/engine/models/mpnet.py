"""MPNet (Song et al. 2020): BERT's layers, RoBERTa's positions, and one learned bias of distances for all layers.

all-mpnet-base-v2 and the multi-qa-mpnet models are of this kind.
"""

import math
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import EncoderConfig, read_config
from embedmesh.engine.models.graph import (
    Array,
    activate,
    add,
    attention,
    axes,
    dense,
    distances,
    layer_norm,
    rows_at,
    score_mask,
    split_heads,
    weight,
)
from embedmesh.engine.models.roberta import positions
from embedmesh.engine.safetensors import Weights

PADDING = 1  # the reference's code has it fixed, whatever pad_token_id says
BUCKETS = 32  # so does it with these two
DISTANCE_MAX = 128  # farther tokens share a bucket
ONLY = {"pad_token_id": PADDING, "relative_attention_num_buckets": BUCKETS}


def build(members: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    """Token states of an MPNet model. Raises SetupError for a variant that is not known."""
    config = read_config(members, EncoderConfig, only=ONLY)
    weights = weights.rooted("embeddings.word_embeddings.weight")
    width, eps = config.hidden_size, config.layer_norm_eps
    words = weights.get("embeddings.word_embeddings.weight", config.vocab_size, width)
    table = weights.get("embeddings.position_embeddings.weight", config.max_position_embeddings, width)
    at = positions(ids, mask, PADDING)
    states = op.add(op.gather(weight(words), ids, axes(0)), rows_at(table, at)).output(0)
    states = layer_norm(states, weights, "embeddings.LayerNorm", width, eps)
    bias = weights.get("encoder.relative_attention_bias.weight", BUCKETS, config.num_attention_heads)
    scores_plus = add(score_mask(mask), _distance_bias(ids, bias))
    for number in range(config.num_hidden_layers):
        states = _layer(config, weights, states, scores_plus, f"encoder.layer.{number}.")
    return states


def _layer(config: EncoderConfig, weights: Weights, x: ov.Output, scores_plus: ov.Output, at: str) -> ov.Output:
    width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    query, key, value = (
        split_heads(dense(x, weights, f"{at}attention.attn.{name}", width, width), config.num_attention_heads)
        for name in ("q", "k", "v")
    )
    mixed = dense(attention(query, key, value, scores_plus), weights, f"{at}attention.attn.o", width, width)
    x = layer_norm(add(mixed, x), weights, f"{at}attention.LayerNorm", width, eps)
    wide = activate(dense(x, weights, f"{at}intermediate.dense", inner, width), config.hidden_act)
    narrow = dense(wide, weights, f"{at}output.dense", width, inner)
    return layer_norm(add(narrow, x), weights, f"{at}output.LayerNorm", width, eps)


def _distance_bias(ids: ov.Output, bias: Array) -> ov.Output:
    """What each head adds to the score of a pair of places, [1, heads, length, length].

    Beyond DISTANCE_MAX nothing changes, so a constant of 2 x 128 + 1 distances is enough for any length.
    """
    table = bias[[_bucket(distance) for distance in range(-DISTANCE_MAX, DISTANCE_MAX + 1)]].T
    low, high = op.constant(np.int32(-DISTANCE_MAX)), op.constant(np.int32(DISTANCE_MAX))
    at = op.add(op.maximum(op.minimum(distances(ids), high), low), high)
    return op.unsqueeze(op.gather(weight(np.ascontiguousarray(table)), at, axes(1)), axes(0)).output(0)


def _bucket(distance: int) -> int:
    """The bucket of key's place minus query's place (Raffel et al. 2020, T5, both directions).

    Half of the buckets is for either direction; of these, half is for one distance each and half grows by logarithms,
    which the reference takes in float32.
    """
    direction = BUCKETS // 2
    exact = direction // 2
    far = abs(distance)
    side = direction if distance > 0 else 0
    if far < exact:
        return side + far
    steps = np.log(np.float32(far / exact)) / np.float32(math.log(DISTANCE_MAX / exact)) * np.float32(direction - exact)
    return side + min(exact + int(steps), direction - 1)
