"""The reply's bytes. Vectors are printed as the shortest decimals that give back the same float32, or as base64."""

import base64
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson

from embedmesh.rules.embeddings import Call
from embedmesh.rules.ports import Allowance, Answer, Reply

NODES_SHOWN_MAX = 8  # in a header; the ledger has all

Matrix = np.ndarray[Any, np.dtype[np.float32]]


def respond(call: Call, truncated: int, answer: Answer, seconds: float, *, cost: int | None = None) -> Reply:
    """Status 200: so many inputs were `truncated`, we took `seconds`; `cost` is in nano-USD, where anything costs."""
    matrix: Matrix = np.frombuffer(answer.data, dtype="<f4").reshape(-1, answer.width)
    if call.dimensions is not None:
        matrix = shorten(matrix, call.dimensions)
    as_floats = call.encoding == "float"
    vectors: list[Any] = (
        list(matrix) if as_floats else [base64.b64encode(row.tobytes()).decode("ascii") for row in matrix]
    )
    body = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)],
        "model": call.model,
        "usage": {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens},
    }
    headers = {
        "openai-processing-ms": str(math.ceil(seconds * 1000)),
        "x-embedmesh-node": ",".join(share.node_id for share in answer.shares[:NODES_SHOWN_MAX]),
        "x-embedmesh-truncated": str(truncated),
    }
    if cost is not None:
        headers["x-embedmesh-cost-nanousd"] = str(cost)
    return Reply(headers=headers, body=orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))


def limit_headers(left: Iterable[Allowance]) -> dict[str, str]:
    """What is left of the limits that the caller's key has; nothing for one that has none."""
    headers = {}
    for one in left:
        headers[f"x-ratelimit-limit-{one.what}"] = str(one.limit)
        headers[f"x-ratelimit-remaining-{one.what}"] = str(max(0, one.left))
        headers[f"x-ratelimit-reset-{one.what}"] = f"{one.reset_s:.3f}s"
    return headers


def shorten(matrix: Matrix, dimensions: int) -> Matrix:
    """The first components of each row, scaled back to unit length. Shape (n, width) in, (n, dimensions) out."""
    if dimensions == matrix.shape[1]:
        return matrix
    head = matrix[:, :dimensions].astype(np.float64)
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    norms[norms == 0] = 1.0  # a vector whose first components are all zero stays as it is
    shortened: Matrix = (head / norms).astype("<f4")
    return shortened
