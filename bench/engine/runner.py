"""One contender, alone in its process: `python -P runner.py KIND FOLDER THREADS`.

A script and no module, because it runs under the contender's own Python, where our packages are not installed. One
JSON line in, one out: `{"texts": [...]}` is answered with `{"seconds": 0.5}`, from texts in hand to vectors in hand;
`"vectors": true` adds them (base64 of little-endian float32), `"each": true` embeds the texts one by one and answers
with a list of seconds. The first line out says that a first text was embedded, and with which version.
"""

import base64
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Embed = Callable[[Sequence[str]], Any]
"""Texts -> an array [len(texts), width]."""

Load = Callable[[str, int], Embed]
"""Model folder, threads -> what embeds."""

FIRST = "How long does it take from nothing to a first vector?"
MATMUL = 1_536  # rows, columns and inner size of the matrix product that the peak is measured with
MATMULS = 8  # one after the other, so that what happens at the ends of the graph counts for little


def sentence_transformers(folder: str, threads: int) -> Embed:
    """As its documentation says to use it: all defaults."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu")
    return lambda texts: model.encode(texts, show_progress_bar=False)


def fastembed(folder: str, threads: int) -> Embed:
    """All defaults, on the ONNX form of the same weights."""
    import numpy as np
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    width = json.loads((Path(folder) / "config.json").read_bytes())["hidden_size"]
    source = ModelSource(hf="local/model")  # a name; specific_model_path is where it is read from
    TextEmbedding.add_custom_model(
        "local/model", PoolingType.MEAN, normalization=True, sources=source, dim=width, model_file="model.onnx"
    )
    model = TextEmbedding("local/model", specific_model_path=folder, threads=threads)
    return lambda texts: np.array(list(model.embed(texts)))


def embedmesh(tier: Any) -> Load:
    """The engine in this process: tokenizer, planner and compiled model, as node and worker use them."""

    def load(folder: str, threads: int) -> Embed:
        import numpy as np

        from embedmesh.engine.compiled import CompiledModel
        from embedmesh.engine.folder import read_folder
        from embedmesh.engine.plan import CallRows, next_batch
        from embedmesh.engine.tokens import ModelTokenizer

        path = Path(folder)
        described = read_folder(path)
        tokenizer = ModelTokenizer(path, described.max_tokens)
        model = CompiledModel(described, threads, tier)

        def embed(texts: Sequence[str]) -> Any:
            sequences = [tokenizer.with_specials(ids) for ids in tokenizer.ids(texts)]
            waiting = CallRows([len(sequence) for sequence in sequences])
            vectors = np.empty((len(texts), described.width), np.float32)
            while plan := next_batch([waiting], last_was_bulk=False):
                rows = [row for _, row in plan.picks]
                vectors[rows] = model.run([sequences[row] for row in rows], plan.rows, plan.length)
                waiting.remove(set(rows))
            return vectors

        return embed

    return load


def peak(precision: str) -> Load:
    """No model: a large matrix product in the same OpenVINO, as fast as this machine does it. Texts are ignored."""

    def load(folder: str, threads: int) -> Embed:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as op

        rows = op.parameter([MATMUL, MATMUL], np.float32)
        product = rows.output(0)
        weights = np.random.default_rng(1).standard_normal((MATMUL, MATMUL), np.float32) / 40  # keeps numbers near 1
        for _ in range(MATMULS):
            product = op.matmul(product, op.constant(weights), False, True).output(0)
        options = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        request = ov.Core().compile_model(ov.Model([product], [rows], "peak"), "CPU", options).create_infer_request()
        given = np.ones((MATMUL, MATMUL), np.float32)

        def multiply(texts: Sequence[str]) -> Any:
            request.infer([given], share_inputs=True)
            return given[: len(texts)]

        return multiply

    return load


KINDS: dict[str, Load] = {
    "sentence-transformers": sentence_transformers,
    "fastembed": fastembed,
    "exact": embedmesh("exact"),
    "fast": embedmesh("fast"),
    "int8": embedmesh("int8"),
    "peak-f32": peak("f32"),
    "peak-bf16": peak("bf16"),
}


def main(kind: str, folder: str, threads: str) -> None:
    """Load, say so, then answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    embed = KINDS[kind](folder, int(threads))
    embed([FIRST])
    try:
        version = importlib.metadata.version(kind)
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("openvino")
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(embed, json.loads(line))), file=answers, flush=True)


def answer(embed: Embed, work: dict[str, Any]) -> dict[str, Any]:
    """The reply to one line in."""
    if work.get("each"):
        return {"seconds": [timed(embed, [text])[0] for text in work["texts"]]}
    seconds, vectors = timed(embed, work["texts"])
    reply: dict[str, Any] = {"seconds": seconds}
    if work.get("vectors"):
        reply["vectors"] = base64.b64encode(vectors.astype("<f4").tobytes()).decode("ascii")
    return reply


def timed(embed: Embed, texts: Sequence[str]) -> tuple[float, Any]:
    """Seconds, and the vectors."""
    begun = time.perf_counter()
    vectors = embed(texts)
    return time.perf_counter() - begun, vectors


if __name__ == "__main__":
    main(*sys.argv[1:])
