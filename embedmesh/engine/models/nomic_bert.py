"""NomicBERT (Nussbaum et al. 2024): post-norm, rotary positions, SwiGLU, no biases; nomic-embed-text v1 and v1.5.

Its own code can vary more than any published model does; config.json names the variation, and it is refused. Both its
GPT-2 words and the words of transformers' native class are read. The tensors have the same names in both.
"""

from typing import Any

import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import EncoderConfig, RowCount, read_config
from embedmesh.engine.models.encoder import Encoder
from embedmesh.engine.models.graph import add, rows_at, score_mask, weight
from embedmesh.engine.models.rotary import Rope, convert_rope, make_rotations, read_rope
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.errors import SetupError

NOMIC_SPELLINGS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
NOMIC_FIXED = {
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
NOMIC_REQUIRED = ("activation_function", "mlp_fc1_bias", "mlp_fc2_bias", "qkv_proj_bias", "rotary_emb_base")
"""In the GPT-2 words: their defaults are those of other models."""

NOMIC_THETA = 1000.0  # of the native class, where config.json is silent


class NomicBertConfig(EncoderConfig, frozen=True, kw_only=True):
    """The fields of config.json that decide the numbers."""

    hidden_act: str = "silu"
    type_vocab_size: RowCount = 2


def build(
    fields: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output, *, types: ov.Output | None = None
) -> ov.Output:
    """Token states of a NomicBERT model. Raises SetupError for a variant that is not known."""
    config = read_config(
        fields, NomicBertConfig, spellings=NOMIC_SPELLINGS, fixed=NOMIC_FIXED, code=("NomicBertModel",)
    )
    rotations = make_rotations(ids, _rope(fields), config)
    encoder = Encoder(config, weights)
    segments = encoder.table("embeddings.token_type_embeddings", config.type_vocab_size)
    of_segment = weight(segments[0]) if types is None else rows_at(segments, types)
    x = encoder.norm(add(encoder.embed(ids), of_segment), "emb_ln")
    masked = score_mask(mask)
    for number in range(config.num_hidden_layers):
        at = f"encoder.layers.{number}."
        parts = encoder.split(x, f"{at}attn.Wqkv", 3, config.hidden_size, bias=False)
        mixed = encoder.dense(encoder.attend(parts, masked, rotations), f"{at}attn.out_proj", bias=False)
        x = encoder.norm(add(mixed, x), f"{at}norm1")
        up, gate = (encoder.widen(x, f"{at}mlp.{name}", bias=False) for name in ("fc11", "fc12"))
        wide = op.multiply(up, encoder.activate(gate)).output(0)
        x = encoder.norm(add(encoder.narrow(wide, f"{at}mlp.fc2", bias=False), x), f"{at}norm2")
    return x


def _rope(fields: dict[str, Any]) -> Rope:
    if "n_embd" not in fields:
        return read_rope(fields, NOMIC_THETA)
    if missing := [field for field in NOMIC_REQUIRED if field not in fields]:
        raise SetupError(f"config.json does not describe a model of its type: it does not say {missing[0]}.")
    return convert_rope({"rope_theta": fields["rotary_emb_base"]}, None)
