"""ModernBERT (Warner et al. 2024): pre-norm, rotary positions, gated layers; most layers look at near tokens only.

modernbert-embed and gte-modernbert are of this kind.
"""

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import ROWS_MAX, EncoderConfig, Width, read_config, unsupported
from embedmesh.engine.models.graph import (
    MASKED,
    activate,
    add,
    attention,
    axes,
    dense,
    distances,
    layer_norm,
    packed,
    score_mask,
    small,
    split_heads,
    weight,
)
from embedmesh.engine.models.rotary import Rope, Turns, convert_rope, turn, turns
from embedmesh.engine.safetensors import Weights

Attention = Literal["full_attention", "sliding_attention"]

SPELLINGS = {"hidden_activation": "hidden_act", "norm_eps": "layer_norm_eps"}
UNREAD = ("hidden_act", "layer_norm_eps")  # published configs have them as well; the reference reads the words above
ONLY = {"rope_scaling": None}
OLD_THETA = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
THETA = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}  # where config.json is silent


class Config(EncoderConfig, frozen=True, kw_only=True):
    """The members of config.json that decide the numbers. `local_attention` counts both sides of a token."""

    local_attention: Annotated[int, msgspec.Meta(ge=2, le=ROWS_MAX)] = 128
    global_attn_every_n_layers: Width = 3
    layer_types: list[Attention] | None = None
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def kinds(self) -> list[Attention]:
        """The attention of each layer: as listed, else full in every n-th from the first on."""
        every = self.global_attn_every_n_layers
        return self.layer_types or [
            "sliding_attention" if number % every else "full_attention" for number in range(self.num_hidden_layers)
        ]


def build(members: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    """Token states of a ModernBERT model. Raises SetupError for a variant that is not known."""
    read = {member: value for member, value in members.items() if member not in UNREAD}
    config = read_config(read, Config, spellings=SPELLINGS, only=ONLY, code=("ModernBertModel",))
    kinds = config.kinds()
    if len(kinds) != config.num_hidden_layers:
        raise unsupported("layer_types of length", len(kinds), "it must have one for each of num_hidden_layers")
    masked = {"full_attention": score_mask(mask), "sliding_attention": _near(score_mask(mask), ids, config)}
    by = {
        kind: turns(ids, _rope(members, kind), config.max_position_embeddings, config.head_width)
        for kind in sorted(set(kinds))
    }
    weights = weights.rooted("embeddings.tok_embeddings.weight")
    words = weights.get("embeddings.tok_embeddings.weight", config.vocab_size, config.hidden_size)
    states = _norm(config, weights, op.gather(weight(words), ids, axes(0)).output(0), "embeddings.norm")
    for number, kind in enumerate(kinds):
        states = _layer(config, weights, states, masked[kind], by[kind], number)
    return _norm(config, weights, states, "final_norm")


def _layer(config: Config, weights: Weights, x: ov.Output, masked: ov.Output, by: Turns, number: int) -> ov.Output:
    at, width, inner = f"layers.{number}.", config.hidden_size, config.intermediate_size
    normal = _norm(config, weights, x, f"{at}attn_norm") if number else x  # the embeddings were just normalised
    query, key, value = (
        split_heads(part, config.num_attention_heads)
        for part in packed(normal, weights, f"{at}attn.Wqkv", 3, width, width, bias=config.attention_bias)
    )
    query, key = (turn(part, by, config.head_width) for part in (query, key))
    mixed = attention(query, key, value, masked)
    x = add(x, dense(mixed, weights, f"{at}attn.Wo", width, width, bias=config.attention_bias))
    normal = _norm(config, weights, x, f"{at}mlp_norm")
    gated, gate = packed(normal, weights, f"{at}mlp.Wi", 2, inner, width, bias=config.mlp_bias)
    wide = op.multiply(activate(gated, config.hidden_act), gate).output(0)
    return add(x, dense(wide, weights, f"{at}mlp.Wo", width, inner, bias=config.mlp_bias))


def _norm(config: Config, weights: Weights, x: ov.Output, name: str) -> ov.Output:
    return layer_norm(x, weights, name, config.hidden_size, config.layer_norm_eps, bias=config.norm_bias)


def _near(masked: ov.Output, ids: ov.Output, config: Config) -> ov.Output:
    """`masked` [rows, 1, 1, length] and, on top, every pair farther apart than half the window: [.., length, length].

    Scores may be masked twice. A padding token that sees only such keys gets a finite mixture that nobody reads.
    """
    far = op.greater(op.abs(distances(ids)), op.constant(np.int32(config.local_attention // 2)))
    return add(masked, op.select(far, small(MASKED), small(0.0)).output(0))


def _rope(members: dict[str, Any], kind: Attention) -> Rope:
    """Of `rope_parameters`, else by the older word for its base."""
    written = (members.get("rope_parameters") or {}).get(kind) or {}
    return convert_rope(written, members.get(OLD_THETA[kind], THETA[kind]))
