"""MPNet (Song et al. 2020): BERT's layers, RoBERTa's positions, and one learned bias of distances for all layers.

all-mpnet-base-v2 and the multi-qa-mpnet models are of this kind.
"""

import math
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.bert import LayerNames, run_layers
from embedmesh.engine.models.config import EncoderConfig, read_config
from embedmesh.engine.models.encoder import Encoder
from embedmesh.engine.models.graph import Array, add, axes, distances, rows_at, score_mask, weight
from embedmesh.engine.models.roberta import positions
from embedmesh.engine.safetensors import Weights

MPNET_PADDING_ID = 1  # the reference's code has it fixed, whatever pad_token_id says
BUCKETS = 32  # and so are these two
BUCKET_DISTANCE_MAX = 128  # farther tokens share a bucket
MPNET_FIXED = {"pad_token_id": MPNET_PADDING_ID, "relative_attention_num_buckets": BUCKETS}
MPNET_NAMES = LayerNames(
    parts=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    mixed="attention.attn.o",
    mixed_norm="attention.LayerNorm",
)


def build(
    fields: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output, *, first_only: bool = False
) -> ov.Output:
    """Token states of an MPNet model. Raises SetupError for a variant that is not known."""
    config = read_config(fields, EncoderConfig, fixed=MPNET_FIXED)
    encoder = Encoder(config, weights)
    table = encoder.table("embeddings.position_embeddings", config.max_position_embeddings)
    at = positions(ids, mask, MPNET_PADDING_ID)
    states = encoder.norm(add(encoder.embed(ids), rows_at(table, at)), "embeddings.LayerNorm")
    bias = encoder.table("encoder.relative_attention_bias", BUCKETS, config.num_attention_heads)
    scores_plus = add(score_mask(mask), _distance_bias(ids, bias))
    return run_layers(encoder, config.num_hidden_layers, states, scores_plus, MPNET_NAMES, first_only=first_only)


def _distance_bias(ids: ov.Output, bias: Array) -> ov.Output:
    """What each head adds to the score of a pair of tokens, [1, heads, length, length].

    Beyond BUCKET_DISTANCE_MAX nothing changes, so a constant of 2 x 128 + 1 distances is enough for any length.
    """
    table = bias[[_bucket(distance) for distance in range(-BUCKET_DISTANCE_MAX, BUCKET_DISTANCE_MAX + 1)]].T
    low, high = op.constant(np.int32(-BUCKET_DISTANCE_MAX)), op.constant(np.int32(BUCKET_DISTANCE_MAX))
    at = op.add(op.maximum(op.minimum(distances(ids), high), low), high)
    return op.unsqueeze(op.gather(weight(np.ascontiguousarray(table)), at, axes(1)), axes(0)).output(0)


def _bucket(distance: int) -> int:
    """The bucket of key's index minus query's index (Raffel et al. 2020, T5, both directions).

    Each direction has half of the buckets; of these, half stand for one distance each and half grow by logarithms,
    which the reference takes in float32.
    """
    direction = BUCKETS // 2
    exact = direction // 2
    far = abs(distance)
    side = direction if distance > 0 else 0
    if far < exact:
        return side + far
    steps = (
        np.log(np.float32(far / exact))
        / np.float32(math.log(BUCKET_DISTANCE_MAX / exact))
        * np.float32(direction - exact)
    )
    return side + min(exact + int(steps), direction - 1)
