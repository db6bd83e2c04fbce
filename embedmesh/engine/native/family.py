"""Which models the kernels take: post-norm encoders with learned positions. All others are OpenVINO's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from embedmesh.engine.folder import Folder
from embedmesh.engine.models.bert import BERT_FIXED, BertConfig, LayerNames
from embedmesh.engine.models.config import EncoderConfig, read_config
from embedmesh.engine.models.distilbert import DISTILBERT_EPS, DISTILBERT_NAMES, DISTILBERT_SPELLINGS
from embedmesh.engine.models.roberta import RobertaConfig
from embedmesh.rules.errors import SetupError

POOLINGS = ("mean", "cls")
ACTIVATION = "gelu"  # by the error function
DENSE_ACTIVATIONS = ("identity", "tanh")
PANEL = 16  # what the kernels' widths are multiples of
HEAD_WIDTH_MAX = 128  # wider heads are rare, and untested
HIDDEN_MAX = 4_096  # as wide as the widest encoders that are published; it bounds what a thread needs
NAMES = LayerNames()


class Kind(NamedTuple):
    """How an architecture spells its config and tensors. `typed`: it has a table of token types."""

    config: type[EncoderConfig]
    names: LayerNames = NAMES
    fixed: Mapping[str, Any] = BERT_FIXED
    spellings: Mapping[str, str] = {}
    given: Mapping[str, Any] = {}
    typed: bool = True


ROBERTA = Kind(RobertaConfig)
KINDS: dict[str, Kind] = {
    "bert": Kind(BertConfig),
    "camembert": ROBERTA,
    "distilbert": Kind(
        EncoderConfig, DISTILBERT_NAMES, {}, DISTILBERT_SPELLINGS, {"layer_norm_eps": DISTILBERT_EPS}, typed=False
    ),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}


def unsupported(folder: Folder) -> str:
    """Why the kernels cannot run this model, in words; "" where they can."""
    if folder.reranks:
        return "the model reranks"
    if folder.source != "safetensors" or folder.model_type not in KINDS:
        return "the model is not of BERT's kind, in safetensors"
    if folder.pooling not in POOLINGS:
        return f"the pooling is {folder.pooling}"
    if not all(layer.activation in DENSE_ACTIVATIONS for layer in folder.dense):
        return "the activation of a dense layer"
    try:
        config = read_kind(folder)
    except SetupError:
        return "its config.json is not understood"  # and OpenVINO's builder refuses it, with the reason
    if config.hidden_act != ACTIVATION:
        return f"the activation is {config.hidden_act}"
    if config.hidden_size % PANEL or config.hidden_size > HIDDEN_MAX or config.intermediate_size > 4 * HIDDEN_MAX:
        return f"the hidden size is {config.hidden_size}"
    if config.head_width > HEAD_WIDTH_MAX:
        return f"heads are {config.head_width} wide"
    return ""


def read_kind(folder: Folder) -> EncoderConfig:
    """The config of a folder whose type is in KINDS. Raises SetupError for a variant that is not known."""
    kind = KINDS[folder.model_type]
    return read_config({**folder.config, **kind.given}, kind.config, spellings=kind.spellings, fixed=kind.fixed)
