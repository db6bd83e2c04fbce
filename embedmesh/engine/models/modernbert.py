"""ModernBERT (Warner et al. 2024): pre-norm, rotary positions, gated layers; most layers look at near tokens only.

modernbert-embed and gte-modernbert are of this kind.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import TABLE_ROWS_MAX, EncoderConfig, Width, check_code, read_config, unsupported
from embedmesh.engine.models.encoder import Encoder
from embedmesh.engine.models.graph import ACTIVATION_OPS, MASKED, add, axes, indexes, layer_norm, score_mask, small
from embedmesh.engine.models.heads import TASK, dense
from embedmesh.engine.models.rotary import Rope, convert_rope, make_rotations
from embedmesh.engine.safetensors import Weights

Attention = Literal["full_attention", "sliding_attention"]

MODERNBERT_SPELLINGS = {"hidden_activation": "hidden_act", "norm_eps": "layer_norm_eps"}
UNREAD = ("hidden_act", "layer_norm_eps")  # published configs have them as well; the reference reads the words above
MODERNBERT_FIXED = {"rope_scaling": None}
OLD_THETA_FIELDS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
MODERNBERT_THETAS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}  # where config.json is silent


class ModernBertConfig(EncoderConfig, frozen=True, kw_only=True):
    """The fields of config.json that decide the numbers. `local_attention` counts both sides of a token."""

    local_attention: Annotated[int, msgspec.Meta(ge=2, le=TABLE_ROWS_MAX)] = 128
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


class ModernBertHead(ModernBertConfig, frozen=True, kw_only=True):
    """And those that decide what the head makes of the states."""

    classifier_bias: bool = False
    classifier_activation: str = "gelu"


Kind = TypeVar("Kind", bound=ModernBertConfig)


def build(fields: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    """Token states of a ModernBERT model. Raises SetupError for a variant that is not known."""
    config = _read(fields, ModernBertConfig)
    kinds = config.kinds()
    if len(kinds) != config.num_hidden_layers:
        raise unsupported("layer_types of length", len(kinds), "it must have one for each of num_hidden_layers")
    masked = {"full_attention": score_mask(mask), "sliding_attention": _near(score_mask(mask), ids, config)}
    rotations = {kind: make_rotations(ids, _rope(fields, kind), config) for kind in sorted(set(kinds))}
    encoder = Encoder(config, weights, "embeddings.tok_embeddings.weight")
    x = encoder.norm(encoder.embed(ids), "embeddings.norm", bias=config.norm_bias)
    for number, kind in enumerate(kinds):
        at = f"layers.{number}."
        # The embeddings were just normalised.
        normal = encoder.norm(x, f"{at}attn_norm", bias=config.norm_bias) if number else x
        parts = encoder.split(normal, f"{at}attn.Wqkv", 3, config.hidden_size, bias=config.attention_bias)
        mixed = encoder.attend(parts, masked[kind], rotations[kind])
        x = add(x, encoder.dense(mixed, f"{at}attn.Wo", bias=config.attention_bias))
        normal = encoder.norm(x, f"{at}mlp_norm", bias=config.norm_bias)
        gated, gate = encoder.halves(normal, f"{at}mlp.Wi", bias=config.mlp_bias)
        wide = op.multiply(encoder.activate(gated), gate).output(0)
        x = add(x, encoder.narrow(wide, f"{at}mlp.Wo", bias=config.mlp_bias))
    return encoder.norm(x, "final_norm", bias=config.norm_bias)


def head(fields: dict[str, Any], weights: Weights, pooled: ov.Output) -> ov.Output:
    """Logits [rows, 1]: see `heads.Head`."""
    check_code(fields, (), TASK)
    config = _read(fields, ModernBertHead)
    if (activation := config.classifier_activation) not in ACTIVATION_OPS:
        raise unsupported("classifier_activation", activation, f"known are {', '.join(ACTIVATION_OPS)}")
    width = config.hidden_size
    inner = dense(weights, pooled, "head.dense", width, bias=config.classifier_bias)
    norm = weights.rooted("head.norm.weight")
    shift = norm.get("head.norm.bias", width) if config.norm_bias else None
    active = ACTIVATION_OPS[activation](inner).output(0)
    normal = layer_norm(active, norm.get("head.norm.weight", width), shift, config.layer_norm_eps)
    return dense(weights, normal, "classifier", 1)


def _read(fields: dict[str, Any], kind: type[Kind]) -> Kind:
    read = {field: value for field, value in fields.items() if field not in UNREAD}
    return read_config(read, kind, spellings=MODERNBERT_SPELLINGS, fixed=MODERNBERT_FIXED, code=("ModernBertModel",))


def _near(masked: ov.Output, ids: ov.Output, config: ModernBertConfig) -> ov.Output:
    """`masked` [rows, 1, 1, length] and, on top, every pair farther apart than half the window: [.., length, length].

    Scores may be masked twice. A padding token that sees only such keys gets a finite mixture that nobody reads. For
    8,192 tokens it takes 268 MB; these operations become one loop, so that no other array is as large.
    """
    at = op.convert(indexes(ids), "f32")
    apart = op.abs(op.subtract(op.unsqueeze(at, axes(0)), op.unsqueeze(at, axes(1))))
    far = op.clamp(op.subtract(apart, small(config.local_attention // 2)), 0.0, 1.0)  # distances are whole: 0 or 1
    return add(masked, op.multiply(far, small(MASKED)).output(0))


def _rope(fields: dict[str, Any], kind: Attention) -> Rope:
    """From `rope_parameters`, else from the older field of its base."""
    written = (fields.get("rope_parameters") or {}).get(kind) or {}
    return convert_rope(written, fields.get(OLD_THETA_FIELDS[kind], MODERNBERT_THETAS[kind]))
