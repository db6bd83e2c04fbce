"""BERT (Devlin et al. 2018), post-norm, absolute positions: what all-MiniLM, bge, e5 and gte of the first kind are."""

from typing import Any

import msgspec
import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.folder import Folder
from embedmesh.engine.models.graph import attention, axes, layer_norm, linear, pool, weight
from embedmesh.engine.safetensors import WeightsFile
from embedmesh.rules.errors import SetupError

GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # config's word -> OpenVINO's


class Config(msgspec.Struct, frozen=True):
    """The members of config.json that decide the numbers. Dropout and the like do nothing here and are not read."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_act: str
    type_vocab_size: int = 2
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False


def build(folder: Folder, weights: WeightsFile) -> ov.Model:
    """The graph of a BERT folder. Raises SetupError for a variant that is not known."""
    config = _check(folder.config)
    ids = op.parameter([-1, -1], np.int32, name="ids")
    mask = op.parameter([-1, -1], np.float32, name="mask")
    states = _embed(ids.output(0), config, weights)
    for number in range(config.num_hidden_layers):
        states = _layer(states, mask.output(0), f"encoder.layer.{number}.", config, weights)
    vectors = pool(states, mask.output(0), folder.pooling, folder.normalize)
    return ov.Model([vectors], [ids, mask], "bert")


def _check(members: dict[str, Any]) -> Config:
    try:
        config = msgspec.convert(members, Config)
    except msgspec.ValidationError as error:
        raise SetupError(f"config.json does not describe a BERT model: {error}.") from None
    if config.hidden_act not in GELU:
        raise SetupError(f"The activation {config.hidden_act!r} is not supported; known are {', '.join(GELU)}.")
    if config.position_embedding_type != "absolute" or config.is_decoder or config.add_cross_attention:
        raise SetupError("Only BERT encoders with absolute positions are supported.")
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise SetupError("config.json: hidden_size is not a multiple of num_attention_heads.")
    if config.num_hidden_layers < 1 or not 0 < config.layer_norm_eps < 1:
        raise SetupError("config.json: num_hidden_layers or layer_norm_eps is out of range.")
    return config


def _embed(ids: ov.Output, config: Config, weights: WeightsFile) -> ov.Output:
    """Word + position + token type 0 (a lone text has no second segment), normalised."""
    width = config.hidden_size
    words = weights.get("embeddings.word_embeddings.weight", config.vocab_size, width)
    positions = weights.get("embeddings.position_embeddings.weight", config.max_position_embeddings, width)
    types = weights.get("embeddings.token_type_embeddings.weight", config.type_vocab_size, width)
    length = op.gather(op.shape_of(ids), axes(1), axes(0))
    position = op.slice(weight(positions + types[0]), axes(0), length, axes(1), axes(0))
    states = op.add(op.gather(weight(words), ids, axes(0)), position).output(0)
    return _norm(states, "embeddings.LayerNorm", config, weights)


def _layer(x: ov.Output, mask: ov.Output, at: str, config: Config, weights: WeightsFile) -> ov.Output:
    width, inner = config.hidden_size, config.intermediate_size

    def dense(y: ov.Output, name: str, outputs: int, inputs: int) -> ov.Output:
        kernel = weights.get(f"{at}{name}.weight", outputs, inputs)
        return linear(y, kernel, weights.get(f"{at}{name}.bias", outputs))

    query, key, value = (dense(x, f"attention.self.{name}", width, width) for name in ("query", "key", "value"))
    mixed = attention(query, key, value, mask, config.num_attention_heads)
    mixed = dense(mixed, "attention.output.dense", width, width)
    x = _norm(op.add(mixed, x).output(0), f"{at}attention.output.LayerNorm", config, weights)
    wide = op.gelu(dense(x, "intermediate.dense", inner, width), GELU[config.hidden_act]).output(0)
    narrow = dense(wide, "output.dense", width, inner)
    return _norm(op.add(narrow, x).output(0), f"{at}output.LayerNorm", config, weights)


def _norm(x: ov.Output, name: str, config: Config, weights: WeightsFile) -> ov.Output:
    width = config.hidden_size
    scale, shift = weights.get(f"{name}.weight", width), weights.get(f"{name}.bias", width)
    return layer_norm(x, scale, shift, config.layer_norm_eps)
