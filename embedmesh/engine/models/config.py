"""What every architecture reads from config.json in the same way. Unknown variants are refused by name."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from embedmesh.engine.models.graph import ACTIVATION_OPS
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import VECTOR_WIDTH_MAX

LAYERS_MAX = 1_024
TABLE_ROWS_MAX = 2**24  # of a table: the largest vocabularies have 1 M words, the longest models 128 k positions

Width = Annotated[int, msgspec.Meta(ge=1, le=VECTOR_WIDTH_MAX)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=LAYERS_MAX)]
RowCount = Annotated[int, msgspec.Meta(ge=1, le=TABLE_ROWS_MAX)]
Eps = Annotated[float, msgspec.Meta(gt=0, lt=1)]

ENCODER_FIXED: Mapping[str, Any] = {"is_decoder": False, "add_cross_attention": False, "quantization_config": None}
"""The values that these fields must have in every encoder, where config.json has them."""


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that all encoders have, in the words of BERT.

    Dropout, initialisers and heads do nothing to the states, and are not read.
    """

    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    intermediate_size: Width
    vocab_size: RowCount
    max_position_embeddings: RowCount
    layer_norm_eps: Eps
    hidden_act: str

    @property
    def head_width(self) -> int:
        """Components of one attention head."""
        return self.hidden_size // self.num_attention_heads


Config = TypeVar("Config", bound=EncoderConfig)


def read_config(
    fields: Mapping[str, Any],
    kind: type[Config],
    *,
    spellings: Mapping[str, str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    code: Collection[str] = (),
) -> Config:
    """`fields` of config.json as a `kind`. Raises SetupError for what is missing, out of range or not supported.

    `spellings` maps the file's words to ours; `fixed` has the only supported value of fields that the file may have;
    `code` has the class names that a model's own code may have.
    """
    check_code(fields, code)
    for field, value in {**ENCODER_FIXED, **(fixed or {})}.items():
        if field in fields and fields[field] != value:
            raise unsupported(field, fields[field], f"only {value!r} is")
    known = dict(fields)
    for theirs, ours in (spellings or {}).items():
        if theirs in known:
            value = known.pop(theirs)
            if known.setdefault(ours, value) != value:
                raise SetupError(f"config.json says both {theirs} and {ours}, and they differ. Correct the one.")
    try:
        config = msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise SetupError(f"config.json does not describe a model of its type: {error}.") from None
    if config.hidden_size % config.num_attention_heads:
        raise SetupError("config.json: hidden_size is not a multiple of num_attention_heads.")
    if fields.get("head_dim") not in (None, config.head_width):
        raise unsupported("head_dim", fields["head_dim"], "only hidden_size / num_attention_heads is")
    if config.hidden_act not in ACTIVATION_OPS:
        raise unsupported("hidden_act", config.hidden_act, f"known are {', '.join(ACTIVATION_OPS)}")
    return config


def unsupported(field: str, value: object, instead: str) -> SetupError:
    """The refusal of a value; `instead` says which one is supported."""
    return SetupError(f"config.json has {field} {value!r}, which is not supported; {instead}.")


def check_code(fields: Mapping[str, Any], code: Collection[str], of: str = "AutoModel") -> None:
    """A model with code of its own is not what its type says, unless we know that code by name. Raises SetupError.

    `of`: the task whose class is looked at.
    """
    auto_map = fields.get("auto_map") or {}
    named = auto_map.get(of) if isinstance(auto_map, dict) else auto_map
    if named is not None and str(named).rpartition(".")[2] not in code:
        raise unsupported("auto_map", named, "code that a model brings along is never run")
