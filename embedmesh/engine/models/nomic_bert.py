"""NomicBERT (Nussbaum et al. 2024): post-norm, rotary positions, SwiGLU, no biases; nomic-embed-text v1 and v1.5.

Its own code can vary more than any published model does; config.json names the variation, and it is refused. Read are
its GPT-2 words as well as the words of transformers' native class. The tensors have the same names in both.
"""

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
    packed,
    score_mask,
    split_heads,
    weight,
)
from embedmesh.engine.models.rotary import Rope, Turns, convert_rope, read_rope, turn, turns
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.errors import SetupError

SPELLINGS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
ONLY = {
    "activation_function": "swiglu",
    "causal": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "moe_every_n_layers": 0,
    "num_experts": 0,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,  # it would make a text's vector depend on how long its neighbours are
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_rms_norm": False,
}
MUST_SAY = ("activation_function", "mlp_fc1_bias", "mlp_fc2_bias", "qkv_proj_bias", "rotary_emb_base")
"""In the GPT-2 words: their defaults are those of other models."""

THETA = 1000.0  # of the native class, where config.json is silent


class Config(EncoderConfig, frozen=True, kw_only=True):
    """The members of config.json that decide the numbers."""

    hidden_act: str = "silu"
    type_vocab_size: Rows = 2


def build(members: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    """Token states of a NomicBERT model. Raises SetupError for a variant that is not known."""
    config = read_config(members, Config, spellings=SPELLINGS, only=ONLY, code=("NomicBertModel",))
    by = turns(ids, _rope(members), config.max_position_embeddings, config.head_width)
    weights = weights.rooted("embeddings.word_embeddings.weight")
    width = config.hidden_size
    words = weights.get("embeddings.word_embeddings.weight", config.vocab_size, width)
    types = weights.get("embeddings.token_type_embeddings.weight", config.type_vocab_size, width)
    states = op.add(op.gather(weight(words), ids, axes(0)), weight(types[0])).output(0)
    states = layer_norm(states, weights, "emb_ln", width, config.layer_norm_eps)
    masked = score_mask(mask)
    for number in range(config.num_hidden_layers):
        states = _layer(config, weights, states, masked, by, f"encoder.layers.{number}.")
    return states


def _layer(config: Config, weights: Weights, x: ov.Output, masked: ov.Output, by: Turns, at: str) -> ov.Output:
    width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    query, key, value = (
        split_heads(part, config.num_attention_heads)
        for part in packed(x, weights, f"{at}attn.Wqkv", 3, width, width, bias=False)
    )
    query, key = (turn(part, by, config.head_width) for part in (query, key))
    mixed = dense(attention(query, key, value, masked), weights, f"{at}attn.out_proj", width, width, bias=False)
    x = layer_norm(add(mixed, x), weights, f"{at}norm1", width, eps)
    up, gate = (dense(x, weights, f"{at}mlp.{name}", inner, width, bias=False) for name in ("fc11", "fc12"))
    wide = op.multiply(up, activate(gate, config.hidden_act)).output(0)
    narrow = dense(wide, weights, f"{at}mlp.fc2", width, inner, bias=False)
    return layer_norm(add(narrow, x), weights, f"{at}norm2", width, eps)


def _rope(members: dict[str, Any]) -> Rope:
    if "n_embd" not in members:
        return read_rope(members, THETA)
    if missing := [member for member in MUST_SAY if member not in members]:
        raise SetupError(f"config.json does not describe a model of its type: it does not say {missing[0]}.")
    return convert_rope({"rope_theta": members["rotary_emb_base"]}, None)
