"""Whether an account's answers may come from memory, and what they cost then."""

from enum import StrEnum


class CachePolicy(StrEnum):
    """Whether answers may come from memory where the same text was embedded before with the same model and options.

    Such an answer is `charged` as any other, or `free`.
    """

    OFF = "off"
    CHARGED = "charged"  # such an answer costs as much as one from a node
    FREE = "free"  # it costs nothing
