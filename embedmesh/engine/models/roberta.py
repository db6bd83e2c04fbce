"""RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): BERT with positions that begin behind padding's.

multilingual-e5, bge-m3's dense vectors, paraphrase-multilingual and all-distilroberta are of this kind. CamemBERT too.
"""

from typing import Annotated, Any

import msgspec
import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.bert import BERT_FIXED, BertConfig, encode
from embedmesh.engine.models.config import TABLE_ROWS_MAX, read_config
from embedmesh.engine.safetensors import Weights


class RobertaConfig(BertConfig, frozen=True, kw_only=True):
    """BERT's fields, and the one that decides where positions begin."""

    pad_token_id: Annotated[int, msgspec.Meta(ge=0, lt=TABLE_ROWS_MAX)] = 1


def build(fields: dict[str, Any], weights: Weights, ids: ov.Output, mask: ov.Output, **pair: Any) -> ov.Output:
    """Token states of a RoBERTa model. Raises SetupError for a variant that is not known."""
    config = read_config(fields, RobertaConfig, fixed=BERT_FIXED)
    return encode(config, weights, ids, mask, positions(ids, mask, config.pad_token_id), **pair)


def positions(ids: ov.Output, mask: ov.Output, padding: int) -> ov.Output:
    """Position of each token, int32 [rows, length]: padding + 1, padding + 2 ... (fairseq's make_positions).

    A text may spell the padding token; there, as for padding, the position is `padding` and the count stands still.
    """
    counts = op.multiply(mask, op.convert(op.not_equal(ids, op.constant(np.int32(padding))), "f32"))
    counted = op.multiply(op.cum_sum(counts, op.constant(np.int64(1))), counts)
    return op.add(op.convert(counted, "i32"), op.constant(np.int32(padding))).output(0)
