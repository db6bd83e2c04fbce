"""Is the answer right? Checked before it is delivered: count, width, finite, length, token count.

Order needs no check: a compact answer has nothing but its order.
"""

import math

import numpy as np

from embedmesh.rules.embeddings import EmbedVectors
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check

BYTES_PER_COMPONENT = 4
FLOAT32 = np.dtype("<f4")
FROM_BUFFER, INFINITY = np.frombuffer, math.inf  # an attribute of a module is slow to look up


def verify(reply: EmbedVectors, model: Model, part: Part, exact: bool) -> None:
    """Raise WrongAnswer if a check fails; it says which one, never values.

    If our count is only a bound (not `exact`), the node's must be above zero and within it.
    """
    data, rows = reply.data, len(part.rows)
    if len(data) != rows * model.width * BYTES_PER_COMPONENT:
        check = Check.WIDTH if len(data) % (model.width * BYTES_PER_COMPONENT) else Check.COUNT
        raise WrongAnswer("the node answered with another number of components than asked", check=check)
    if reply.tokens != part.tokens if exact else not 0 < reply.tokens <= part.tokens:
        raise WrongAnswer("the node counted other tokens than we did", check=Check.TOKENS)
    vectors = FROM_BUFFER(data, FLOAT32)
    if rows == 1:  # the ordinary case, in a third of the time
        least = most = float(vectors @ vectors)
    else:
        vectors = vectors.reshape(rows, model.width)
        squares = np.einsum("ij,ij->i", vectors, vectors)  # one pass; NaN and infinity survive into the sum
        least, most = float(squares.min()), float(squares.max())
    if least > 0.0 and most < INFINITY:  # NaN is neither
        return
    if least == 0.0 and most < INFINITY:
        if model.reranks:
            return  # a score may be 0
        raise WrongAnswer("a vector is all zeros", check=Check.ZERO)
    raise WrongAnswer("a component or a score is not finite", check=Check.FINITE)
