"""GTE of the second kind (Zhang et al. 2024, mGTE): post-norm, rotary positions, gated layers.

gte-base-en-v1.5, gte-multilingual-base and snowflake-arctic-embed-m-v2.0. Published as model type `new` or `gte` with
words of their own for positions; transformers' native class `gte` has others. The tensors have the same names in both.
"""

from typing import Annotated, Any

import msgspec
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import TABLE_ROWS_MAX, EncoderConfig, read_config
from embedmesh.engine.models.encoder import Encoder
from embedmesh.engine.models.graph import add, rows_at, score_mask, weight
from embedmesh.engine.models.rotary import ROPE_TYPES, make_rotations, read_rope
from embedmesh.engine.safetensors import Weights

GTE_FIXED = {
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "pack_qkv": True,
    "position_embedding_type": "rope",
}


class GteConfig(EncoderConfig, frozen=True, kw_only=True):
    """The fields of config.json that decide the numbers. Without token types, none is added."""

    type_vocab_size: Annotated[int, msgspec.Meta(ge=0, lt=TABLE_ROWS_MAX)]


def build(
    fields: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output, *, types: ov.Output | None = None
) -> ov.Output:
    """Token states of a GTE model. Raises SetupError for a variant that is not known."""
    config = read_config(fields, GteConfig, fixed=GTE_FIXED, code=("NewModel", "GteModel"))
    rotations = make_rotations(ids, read_rope(fields, None, (*ROPE_TYPES, "ntk")), config)
    encoder = Encoder(config, weights)
    x = encoder.embed(ids)
    if config.type_vocab_size:
        segments = encoder.table("embeddings.token_type_embeddings", config.type_vocab_size)
        x = add(x, weight(segments[0]) if types is None else rows_at(segments, types))
    x = encoder.norm(x, "embeddings.LayerNorm")
    masked = score_mask(mask)
    for number in range(config.num_hidden_layers):
        at = f"encoder.layer.{number}."
        parts = encoder.split(x, f"{at}attention.qkv_proj", 3, config.hidden_size)
        mixed = encoder.dense(encoder.attend(parts, masked, rotations), f"{at}attention.o_proj")
        x = encoder.norm(add(x, mixed), f"{at}attn_ln")
        up, gate = encoder.halves(x, f"{at}mlp.up_gate_proj", bias=False)
        wide = op.multiply(up, encoder.activate(gate)).output(0)
        x = encoder.norm(add(x, encoder.narrow(wide, f"{at}mlp.down_proj")), f"{at}mlp_ln")
    return x
