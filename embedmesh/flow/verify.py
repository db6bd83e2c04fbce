"""Is the answer one? Checked before it leaves us: count, order, width, strict base64, finite, length, token count."""

import binascii

import numpy as np

from embedmesh.rules.embeddings import Counted, EmbedReply
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.models import Model

BYTES_PER_COMPONENT = 4


def verify(reply: EmbedReply, model: Model, counted: Counted) -> list[bytes]:
    """The raw float32 bytes of each vector, or WrongAnswer saying which check failed (never with values)."""
    if len(reply.data) != len(counted.ids):
        raise WrongAnswer("the node answered with another number of vectors than inputs")
    if reply.usage.prompt_tokens != counted.tokens:
        raise WrongAnswer("the node counted other tokens than we did")
    raw = []
    for position, item in enumerate(reply.data):
        if item.index != position:
            raise WrongAnswer("the vectors are not in input order")
        try:
            vector = binascii.a2b_base64(item.embedding, strict_mode=True)
        except (binascii.Error, ValueError):
            raise WrongAnswer("a vector is not strict base64") from None
        if len(vector) != model.width * BYTES_PER_COMPONENT:
            raise WrongAnswer("a vector has another width than the model")
        raw.append(vector)
    vectors = np.frombuffer(b"".join(raw), dtype="<f4").reshape(len(raw), model.width)
    squares = np.einsum("ij,ij->i", vectors, vectors)  # one pass; NaN and infinity survive into the sum
    if not np.isfinite(squares).all():
        raise WrongAnswer("a vector has a component that is not finite")
    if not (squares > 0).all():
        raise WrongAnswer("a vector is all zeros")
    return raw
