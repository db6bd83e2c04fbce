"""Vectors of all-MiniLM-L6-v2 as sentence-transformers gives them in fp32; `make_goldens.py` makes them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent


class Goldens(NamedTuple):
    """Texts with what the reference makes of them, in one order.

    `tokens` counts what is really embedded, special tokens included; a text longer than `max_tokens` is cut at its end.
    `vectors` is float32, (texts, width), rows of unit length.
    """

    kinds: list[str]
    texts: list[str]
    tokens: list[int]
    max_tokens: int
    vectors: NDArray[np.float32]

    def at(self, rows: list[int]) -> "Goldens":
        """Some of them, in this order."""
        return Goldens(
            kinds=[self.kinds[at] for at in rows],
            texts=[self.texts[at] for at in rows],
            tokens=[self.tokens[at] for at in rows],
            max_tokens=self.max_tokens,
            vectors=self.vectors[rows],
        )


def read_goldens() -> Goldens:
    """The committed goldens."""
    about = json.loads((HERE / "all_minilm_l6_v2.json").read_text(encoding="ascii"))
    with np.load(HERE / "all_minilm_l6_v2.npz", allow_pickle=False) as arrays:
        vectors = arrays["vectors"]
    items = about["texts"]
    return Goldens(
        kinds=[item["kind"] for item in items],
        texts=[item["text"] for item in items],
        tokens=[item["tokens"] for item in items],
        max_tokens=about["max_tokens"],
        vectors=vectors,
    )
