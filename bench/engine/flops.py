"""How much arithmetic a text is, counted from the model's shape, so that speed can be given as a share of the peak."""

from collections.abc import Mapping, Sequence
from typing import Any


def flops_per_token(config: Mapping[str, Any], tokens: float) -> float:
    """Floating-point operations for one token of a text of `tokens`, in a BERT of this config.json.

    A product of [m, k] and [k, n] is 2·m·k·n. A layer multiplies each token by four matrices of h·h (query, key, value,
    output) and two of h·i (feed-forward), and in attention each token with each other twice (scores, mixing), h wide:
    layers · (2·(4·h² + 2·h·i) + 4·tokens·h). Padding, softmax, GELU, normalisation and pooling are not counted.
    """
    h, i = config["hidden_size"], config["intermediate_size"]
    return float(config["num_hidden_layers"] * (2 * (4 * h * h + 2 * h * i) + 4 * tokens * h))


def flops(config: Mapping[str, Any], counts: Sequence[int]) -> float:
    """Of some texts, by their numbers of tokens."""
    return sum(count * flops_per_token(config, count) for count in counts)
