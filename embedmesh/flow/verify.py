"""Is the answer one? Checked before it leaves us: count, width, finite, length, token count.

Order needs no check of its own: a compact answer has nothing but its order.
"""

import numpy as np

from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.models import Model

BYTES_PER_COMPONENT = 4


def verify(reply: EmbedVectors, model: Model, counted: Counted) -> None:
    """Returns for a right answer, else raises WrongAnswer saying which check failed (never with values)."""
    if len(reply.data) != len(counted.ids) * model.width * BYTES_PER_COMPONENT:
        raise WrongAnswer("the node answered with another number of components than asked")
    if reply.tokens != counted.tokens:
        raise WrongAnswer("the node counted other tokens than we did")
    vectors = np.frombuffer(reply.data, dtype="<f4").reshape(len(counted.ids), model.width)
    squares = np.einsum("ij,ij->i", vectors, vectors)  # one pass; NaN and infinity survive into the sum
    if not np.isfinite(squares).all():
        raise WrongAnswer("a vector has a component that is not finite")
    if not (squares > 0).all():
        raise WrongAnswer("a vector is all zeros")
