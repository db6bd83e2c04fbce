"""DistilBERT (Sanh et al. 2019): BERT's layers under other names, without token types."""

from typing import Any

import openvino as ov

from embedmesh.engine.models.bert import LayerNames, run_layers
from embedmesh.engine.models.config import EncoderConfig, read_config
from embedmesh.engine.models.encoder import Encoder
from embedmesh.engine.models.graph import add, indexes, rows_at, score_mask
from embedmesh.engine.safetensors import Weights

DISTILBERT_EPS = 1e-12  # written into the reference's code; config.json has no field for it
DISTILBERT_SPELLINGS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
DISTILBERT_NAMES = LayerNames(
    layer="transformer.layer.{}.",
    parts=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    mixed="attention.out_lin",
    mixed_norm="sa_layer_norm",
    wide="ffn.lin1",
    narrow="ffn.lin2",
    norm="output_layer_norm",
)


def build(
    fields: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output, *, first_only: bool = False
) -> ov.Output:
    """Token states of a DistilBERT model. Raises SetupError for a variant that is not known.

    `sinusoidal_pos_embds` only says how the table of positions was made: the file has the table either way.
    """
    fields = {**fields, "layer_norm_eps": DISTILBERT_EPS}
    config = read_config(fields, EncoderConfig, spellings=DISTILBERT_SPELLINGS)
    encoder = Encoder(config, weights)
    positions = encoder.table("embeddings.position_embeddings", config.max_position_embeddings)
    states = encoder.norm(add(encoder.embed(ids), rows_at(positions, indexes(ids))), "embeddings.LayerNorm")
    return run_layers(
        encoder, config.num_hidden_layers, states, score_mask(mask), DISTILBERT_NAMES, first_only=first_only
    )
