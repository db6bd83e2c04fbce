"""Rotary positions (Su et al. 2021, RoFormer), in the form of GPT-NeoX: component j turns together with j + d/2.

Frequencies and angles are rounded to float32 where transformers rounds them. Past some thousand positions an exact
angle would be a different one, and the models were trained on these.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.config import EncoderConfig, unsupported
from embedmesh.engine.models.graph import Array, axes, indexes, rows_at, small
from embedmesh.rules.errors import SetupError

ROPE_TABLE_NUMBERS_MAX = 2**24  # 64 MB: 128 k positions of 128 components, more than any published encoder has

Theta = Annotated[float, msgspec.Meta(gt=1, le=1e12)]
Factor = Annotated[float, msgspec.Meta(ge=1, le=1e6)]

ROPE_TYPES = ("default", "linear")
"""The types of scaling that transformers has for these encoders."""


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast positions turn: `rope_parameters` of config.json, or `rope_theta` and `rope_scaling` in one.

    `linear` divides all frequencies by `factor`. `ntk` is the fixed NTK scaling of kexue.fm/archives/9706: a base
    `factor` times as large, and frequencies divided by factor^(2/d).
    """

    rope_theta: Theta
    rope_type: Literal["default", "linear", "ntk"] = "default"
    factor: Factor = 1.0
    partial_rotary_factor: Annotated[float, msgspec.Meta(ge=1, le=1)] = 1.0

    def frequencies(self, head_width: int) -> Array:
        """Radians a position, float32 [head_width / 2]."""
        theta, divisor = self.rope_theta, self.factor
        if self.rope_type == "ntk":
            theta, divisor = theta * self.factor, self.factor ** (2 / head_width)
        powers = (theta ** (np.arange(0, head_width, 2) / head_width)).astype(np.float32)
        return np.float32(1) / powers / np.float32(divisor)


class Rotations(NamedTuple):
    """Cosine and sine of every angle, as graph values [1, 1, length, head_width]."""

    cos: ov.Output
    sin: ov.Output


def read_rope(fields: Mapping[str, Any], theta: float | None, types: Collection[str] = ROPE_TYPES) -> Rope:
    """The one Rope of a model; `theta` is what its architecture takes when config.json is silent. Raises SetupError."""
    theta = fields.get("rope_theta", theta)
    return convert_rope(fields.get("rope_parameters") or fields.get("rope_scaling") or {}, theta, types)


def convert_rope(written: object, theta: float | None, types: Collection[str] = ROPE_TYPES) -> Rope:
    """`written` in config.json as a Rope of one of `types`. Raises SetupError."""
    if not isinstance(written, dict):
        raise unsupported("rope_parameters", written, "an object is")
    given = {field: value for field, value in written.items() if value is not None}
    named = {"rope_type" if field == "type" else field: value for field, value in given.items()}
    kind = named.get("rope_type", "default")
    if kind not in types:
        raise unsupported("rope_type", kind, f"known are {', '.join(types)}")
    if kind == "default" and "factor" in named:
        raise unsupported("a rope factor", named["factor"], "without a rope_type it means nothing")
    try:
        return msgspec.convert(({} if theta is None else {"rope_theta": theta}) | named, Rope)
    except msgspec.ValidationError as error:
        raise SetupError(f"config.json has rotary positions that are not supported: {error}.") from None


def make_rotations(ids: ov.Output, rope: Rope, config: EncoderConfig) -> Rotations:
    """The angles at the indexes of `ids` [rows, length]; tables for all positions of the config are kept for it."""
    positions, width = config.max_position_embeddings, config.head_width
    if width % 2:
        raise SetupError(f"config.json gives attention heads of {width} components; rotary positions need pairs.")
    if positions * width > ROPE_TABLE_NUMBERS_MAX:
        raise unsupported("max_position_embeddings", positions, f"at most {ROPE_TABLE_NUMBERS_MAX // width} is")
    angles = np.arange(positions, dtype=np.float32)[:, None] * rope.frequencies(width)
    return Rotations(_table(np.cos, angles, ids), _table(np.sin, angles, ids))


def rotate(x: ov.Output, by: Rotations, head_width: int) -> ov.Output:
    """Queries or keys [rows, heads, length, head_width], each turned by its position.

    In just these operations OpenVINO finds its own rotary kernel.
    """
    first, second = op.variadic_split(x, op.constant(np.int64(3)), axes(head_width // 2, head_width // 2)).outputs()
    half_turned = op.concat([op.multiply(second, small(-1.0)), first], -1)
    return op.add(op.multiply(x, by.cos), op.multiply(half_turned, by.sin)).output(0)


def _table(function: np.ufunc, angles: Array, ids: ov.Output) -> ov.Output:
    """A function of all angles, exact in float32, at the indexes of `ids`: [1, 1, length, head_width]."""
    half = function(angles.astype(np.float64)).astype(np.float32)
    return op.unsqueeze(rows_at(np.concatenate([half, half], axis=1), indexes(ids)), axes(0, 1)).output(0)
