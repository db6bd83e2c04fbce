"""ELECTRA (Clark et al. 2020): BERT's layers behind a table of words that may be narrower than they are.

Rerankers are made of it (ms-marco-electra); few models that make vectors are.
"""

from typing import Any

import msgspec
import openvino as ov

from embedmesh.engine.models.bert import BERT_FIXED, BertConfig, LayerNames, embed_tokens, run_layers
from embedmesh.engine.models.config import Width, read_config
from embedmesh.engine.models.encoder import Encoder
from embedmesh.engine.models.graph import indexes, score_mask
from embedmesh.engine.safetensors import Weights


class ElectraConfig(BertConfig, frozen=True, kw_only=True):
    """BERT's fields, and the width of the words."""

    embedding_size: Width


def build(
    fields: dict[str, Any],
    weights: Weights,
    ids: ov.Output,
    mask: ov.Output,
    *,
    types: ov.Output | None = None,
    first_only: bool = False,
) -> ov.Output:
    """Token states of an ELECTRA model. Raises SetupError for a variant that is not known."""
    config = read_config(fields, ElectraConfig, fixed=BERT_FIXED)
    words = Encoder(msgspec.structs.replace(config, hidden_size=config.embedding_size), weights)
    states = embed_tokens(words, config, ids, indexes(ids), types)
    encoder = Encoder(config, weights)
    if config.embedding_size != config.hidden_size:
        states = encoder.project(states, "embeddings_project", config.embedding_size)
    return run_layers(encoder, config.num_hidden_layers, states, score_mask(mask), LayerNames(), first_only=first_only)
