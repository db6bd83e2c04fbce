"""Rerankers: the two segments of a pair, and the heads that make one number of token states."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import check_code
from embedmesh.engine.models.graph import ACTIVATION_OPS, linear
from embedmesh.engine.safetensors import Weights

Head = Callable[[dict[str, Any], Weights, ov.Output], ov.Output]
"""config.json, weights and what the pooling gave, [rows, hidden] -> logits [rows, 1]. Raises SetupError."""

TASK = "AutoModelForSequenceClassification"  # which class of a model's own code would make its scores
HEAD_ACTIVATIONS: dict[str, Callable[[ov.Output], ov.Node]] = {"tanh": op.tanh, **ACTIVATION_OPS}


def split_segments(ids: ov.Output) -> tuple[ov.Output, ov.Output]:
    """The token ids, and the type of each token: 1 behind the marked one, 0 up to it; both int32 [rows, length].

    A negative id is ~id and marks the last token of the first segment. So types are right where a text spells a special
    token, and where one has no token at all.
    """
    none = op.constant(np.int32(0))
    marked = op.less(ids, none)
    plain = op.select(marked, op.subtract(op.constant(np.int32(-1)), ids), ids)
    types = op.cum_sum(op.convert(marked, "i32"), op.constant(np.int64(1)), exclusive=True)
    return plain.output(0), types.output(0)


def head(hidden: str, activation: str, result: str, *, code: Collection[str] = ()) -> Head:
    """A head of two linear layers: `hidden` and its activation, then `result`, whose one output is the logit.

    `code` has the class names that a model's own code may have.
    """

    def build(fields: dict[str, Any], weights: Weights, pooled: ov.Output) -> ov.Output:
        check_code(fields, code, TASK)
        inner = dense(weights, pooled, hidden, _width(pooled))
        return dense(weights, HEAD_ACTIVATIONS[activation](inner).output(0), result, 1)

    return build


def dense(weights: Weights, x: ov.Output, name: str, outputs: int, *, bias: bool = True) -> ov.Output:
    """The linear layer `name`, whatever stands before its name. Raises SetupError where it is missing or another."""
    found = weights.rooted(f"{name}.weight")
    kernel = found.get(f"{name}.weight", outputs, _width(x))
    return linear(x, kernel, found.get(f"{name}.bias", outputs) if bias else None)


def _width(x: ov.Output) -> int:
    width: int = x.get_partial_shape()[-1].get_length()
    return width


BERT = head("pooler.dense", "tanh", "classifier")
GTE = head("pooler.dense", "tanh", "classifier", code=("NewForSequenceClassification", "GteForSequenceClassification"))
ROBERTA = head("classifier.dense", "tanh", "classifier.out_proj")
ELECTRA = head("classifier.dense", "gelu", "classifier.out_proj")
DISTILBERT = head("pre_classifier", "relu", "classifier")
