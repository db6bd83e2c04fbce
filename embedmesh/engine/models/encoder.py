"""An encoder whose graph is being built: its config, its weights, and the layers that all architectures share."""

from collections.abc import Iterable

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import EncoderConfig
from embedmesh.engine.models.graph import ACTIVATION_OPS, Array, axes, layer_norm, linear, table_weight
from embedmesh.engine.models.rotary import Rotations, rotate
from embedmesh.engine.safetensors import Weights


class Encoder:
    """Layers by the names of their tensors. States are [rows, length, hidden_size].

    Every method raises SetupError where a tensor is missing, or its shape does not follow from the config.
    """

    def __init__(
        self, config: EncoderConfig, weights: Weights, words: str = "embeddings.word_embeddings.weight"
    ) -> None:
        """`words` is the table of word embeddings: the prefix in front of it is that of all tensors."""
        self._config = config
        self._weights = weights.rooted(words)
        self._words = words

    def embed(self, ids: ov.Output) -> ov.Output:
        """The word embeddings of token ids [rows, length]."""
        words = self._weights.table(self._words, self._config.vocab_size, self._config.hidden_size)
        return op.gather(table_weight(words), ids, axes(0)).output(0)

    def table(self, name: str, rows: int, width: int | None = None) -> Array:
        """The table `name`, with rows of `hidden_size` components unless a width is given."""
        return self._weights.get(f"{name}.weight", rows, width or self._config.hidden_size)

    def dense(self, x: ov.Output, name: str, *, bias: bool = True) -> ov.Output:
        """A linear layer from states to states."""
        return self._linear(x, name, self._config.hidden_size, self._config.hidden_size, bias)

    def project(self, x: ov.Output, name: str, inputs: int) -> ov.Output:
        """A linear layer from something else, which is `inputs` wide, to states."""
        return self._linear(x, name, self._config.hidden_size, inputs, True)

    def widen(self, x: ov.Output, name: str, *, bias: bool = True) -> ov.Output:
        """A linear layer from states to the wide middle of a layer."""
        return self._linear(x, name, self._config.intermediate_size, self._config.hidden_size, bias)

    def narrow(self, x: ov.Output, name: str, *, bias: bool = True) -> ov.Output:
        """A linear layer from the wide middle of a layer to states."""
        return self._linear(x, name, self._config.hidden_size, self._config.intermediate_size, bias)

    def split(self, x: ov.Output, name: str, parts: int, outputs: int, *, bias: bool = True) -> list[ov.Output]:
        """The `parts` linear layers, each `outputs` wide, whose rows the tensor `name` holds one below the other."""
        kernels = np.split(self._weights.get(f"{name}.weight", parts * outputs, self._config.hidden_size), parts)
        biases = np.split(self._weights.get(f"{name}.bias", parts * outputs), parts) if bias else [None] * parts
        return [linear(x, kernel, one) for kernel, one in zip(kernels, biases, strict=True)]

    def halves(self, x: ov.Output, name: str, *, bias: bool = True) -> list[ov.Output]:
        """Both halves of the linear layer `name`, each `intermediate_size` wide: what is gated, and the gate.

        One layer, whose activation comes later: OpenVINO would take it into a layer of its own, and pack the weights of
        such a layer once for few tokens and again for many.
        """
        width = self._config.intermediate_size
        both = self._linear(x, name, 2 * width, self._config.hidden_size, bias)
        return list(op.variadic_split(both, op.constant(np.int64(2)), axes(width, width)).outputs())

    def activate(self, x: ov.Output) -> ov.Output:
        """The config's `hidden_act`."""
        return ACTIVATION_OPS[self._config.hidden_act](x).output(0)

    def norm(self, x: ov.Output, name: str, *, bias: bool = True) -> ov.Output:
        """The layer normalisation `name` over the last axis."""
        width = self._config.hidden_size
        shift = self._weights.get(f"{name}.bias", width) if bias else None
        return layer_norm(x, self._weights.get(f"{name}.weight", width), shift, self._config.layer_norm_eps)

    def attend(
        self, parts: Iterable[ov.Output], scores_plus: ov.Output, rotations: Rotations | None = None
    ) -> ov.Output:
        """Scaled dot-product attention of queries, keys and values, which `parts` has in this order.

        `scores_plus` is added to the scaled scores: a mask, a bias of positions, or both. `rotations` turn queries and
        keys, where the architecture has rotary positions.
        """
        heads, width = self._config.num_attention_heads, self._config.head_width
        query, key, value = (
            op.transpose(op.reshape(part, axes(0, 0, heads, -1), True), axes(0, 2, 1, 3)).output(0) for part in parts
        )
        if rotations is not None:
            query, key = rotate(query, rotations, width), rotate(key, rotations, width)
        mixed = op.scaled_dot_product_attention(query, key, value, scores_plus)
        return op.reshape(op.transpose(mixed, axes(0, 2, 1, 3)), axes(0, 0, -1), True).output(0)

    def _linear(self, x: ov.Output, name: str, outputs: int, inputs: int, bias: bool) -> ov.Output:
        kernel = self._weights.get(f"{name}.weight", outputs, inputs)
        return linear(x, kernel, self._weights.get(f"{name}.bias", outputs) if bias else None)
