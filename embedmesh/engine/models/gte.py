"""GTE of the second kind (Zhang et al. 2024, mGTE): post-norm, rotary positions, gated layers.

gte-base-en-v1.5, gte-multilingual-base and snowflake-arctic-embed-m-v2.0. Published as model type `new` or `gte` with
words of their own for positions; transformers' native class `gte` has others. The tensors have the same names in both.
"""

from typing import Annotated, Any

import msgspec
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import ROWS_MAX, EncoderConfig, read_config
from embedmesh.engine.models.graph import (
    activate,
    add,
    attention,
    axes,
    dense,
    layer_norm,
    packed,
    score_mask,
    split_heads,
    weight,
)
from embedmesh.engine.models.rotary import KINDS, Turns, read_rope, turn, turns
from embedmesh.engine.safetensors import Weights

ONLY = {
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "pack_qkv": True,
    "position_embedding_type": "rope",
}


class Config(EncoderConfig, frozen=True, kw_only=True):
    """The members of config.json that decide the numbers. Without token types, none is added."""

    type_vocab_size: Annotated[int, msgspec.Meta(ge=0, lt=ROWS_MAX)]


def build(members: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    """Token states of a GTE model. Raises SetupError for a variant that is not known."""
    config = read_config(members, Config, only=ONLY, code=("NewModel", "GteModel"))
    by = turns(ids, read_rope(members, None, (*KINDS, "ntk")), config.max_position_embeddings, config.head_width)
    weights = weights.rooted("embeddings.word_embeddings.weight")
    width = config.hidden_size
    words = weights.get("embeddings.word_embeddings.weight", config.vocab_size, width)
    states = op.gather(weight(words), ids, axes(0)).output(0)
    if config.type_vocab_size:
        types = weights.get("embeddings.token_type_embeddings.weight", config.type_vocab_size, width)
        states = add(states, weight(types[0]))
    states = layer_norm(states, weights, "embeddings.LayerNorm", width, config.layer_norm_eps)
    masked = score_mask(mask)
    for number in range(config.num_hidden_layers):
        states = _layer(config, weights, states, masked, by, f"encoder.layer.{number}.")
    return states


def _layer(config: Config, weights: Weights, x: ov.Output, masked: ov.Output, by: Turns, at: str) -> ov.Output:
    width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    query, key, value = (
        split_heads(part, config.num_attention_heads)
        for part in packed(x, weights, f"{at}attention.qkv_proj", 3, width, width, bias=True)
    )
    query, key = (turn(part, by, config.head_width) for part in (query, key))
    mixed = dense(attention(query, key, value, masked), weights, f"{at}attention.o_proj", width, width)
    x = layer_norm(add(x, mixed), weights, f"{at}attn_ln", width, eps)
    up, gate = packed(x, weights, f"{at}mlp.up_gate_proj", 2, inner, width, bias=False)
    wide = op.multiply(up, activate(gate, config.hidden_act)).output(0)
    narrow = dense(wide, weights, f"{at}mlp.down_proj", width, inner)
    return layer_norm(add(x, narrow), weights, f"{at}mlp_ln", width, eps)
