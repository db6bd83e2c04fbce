"""Vectors in fewer bits, by the formulas that vendors document.

* `int8`: round(127 x), from -127 to 127, of a vector of unit length; `uint8` is 128 more.
* `ubinary`: one bit a component, 1 where it is positive, the first in the highest bit of its byte; `binary` is the
  same byte less 128, as a signed number ("offset binary").
* `base64`: little-endian float32 in the padded standard alphabet.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from embedmesh.rules.base64s import encode64

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Kind = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
SCALE = 127
OFFSET = 128
BITS = 8


def _int8(matrix: Matrix) -> Any:
    return np.clip(np.rint(matrix * np.float32(SCALE)), -SCALE, SCALE).astype(np.int8)


def _ubinary(matrix: Matrix) -> Any:
    return np.packbits(matrix > 0, axis=1)


FORMS: dict[Kind, Callable[[Matrix], Any]] = {
    "float": lambda matrix: matrix,
    "int8": _int8,
    "uint8": lambda matrix: (_int8(matrix).astype(np.int16) + OFFSET).astype(np.uint8),
    "binary": lambda matrix: (_ubinary(matrix).astype(np.int16) - OFFSET).astype(np.int8),
    "ubinary": _ubinary,
    "base64": lambda matrix: [encode64(row.tobytes()) for row in matrix],
}
"""What a matrix (n, width) is in each form. Binary forms fill the last byte of a row with zeros."""

PRINTED_BYTES: dict[Kind, int] = {"float": 19, "int8": 5, "uint8": 4, "binary": 1, "ubinary": 1, "base64": 6}
"""What a component takes in JSON at most."""
