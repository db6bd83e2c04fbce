"""One contender, alone in its process: `python -P runner.py KIND FOLDER THREADS`.

A script and no module, because it runs under the contender's own Python, where our packages are not installed. One
JSON line in, one out: `{"texts": [...]}` is answered with `{"seconds": 0.5}`, from texts in hand to vectors in hand;
`"vectors": true` adds them (base64 of little-endian float32), `"each": true` embeds the texts one by one and answers
with a list of seconds. The first line out says that a first text was embedded, and with which version.

A KIND that ends in "-pairs" reranks: the vector of a text is one number, the logit of QUERY and that text.
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
QUERY = "how do i find out which processes are listening on a port"  # of 12 tokens; a reranker's, with every text
ONNX_BATCH = 32  # texts, as sentence-transformers takes them


def sentence_transformers(folder: str, threads: int) -> Embed:
    """As its documentation says to use it: all defaults."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu")
    return lambda texts: model.encode(texts, show_progress_bar=False)


def sentence_transformers_pairs(folder: str, threads: int) -> Embed:
    """All defaults, but for logits instead of what the model's config makes of them."""
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(threads)
    model, plain = CrossEncoder(folder, device="cpu"), torch.nn.Identity()
    return lambda texts: model.predict([(QUERY, text) for text in texts], activation_fn=plain, show_progress_bar=False)


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


def fastembed_pairs(folder: str, threads: int) -> Embed:
    """All defaults, on the ONNX form of the same weights."""
    import numpy as np
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    TextCrossEncoder.add_custom_model("local/model", ModelSource(hf="local/model"), model_file="model.onnx")
    model = TextCrossEncoder("local/model", specific_model_path=folder, threads=threads)
    return lambda texts: np.array(list(model.rerank(QUERY, texts)))


def onnxruntime(folder: str, threads: int) -> Embed:
    """As a careful user writes it: sorted by length, in batches, on the ONNX form of the same weights."""
    import numpy as np
    from onnxruntime import InferenceSession, SessionOptions
    from tokenizers import Tokenizer

    path = Path(folder)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(json.loads((path / "sentence_bert_config.json").read_bytes())["max_seq_length"])
    tokenizer.enable_padding()
    options = SessionOptions()
    options.intra_op_num_threads = threads
    session = InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def run(texts: Sequence[str]) -> Any:
        found = tokenizer.encode_batch(list(texts))
        ids = np.array([each.ids for each in found], np.int64)
        mask = np.array([each.attention_mask for each in found], np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        states = session.run(None, inputs)[0]
        sums = np.einsum("rtw,rt->rw", states, mask.astype(np.float32), optimize=True)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)  # a mean's direction is its sum's

    def embed(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        vectors: list[Any] = [None] * len(texts)
        for begin in range(0, len(order), ONNX_BATCH):
            batch = order[begin : begin + ONNX_BATCH]
            for at, vector in zip(batch, run([texts[at] for at in batch]), strict=True):
                vectors[at] = vector
        return np.array(vectors)

    return embed


def embedmesh(tier: Any, pairs: bool = False) -> Load:
    """The engine in this process: tokenizer, planner and the model that runs here, as node and worker use them."""

    def load(folder: str, threads: int) -> Embed:
        import numpy as np

        from embedmesh.engine.folder import read_folder
        from embedmesh.engine.plan import CallRows, next_batch
        from embedmesh.engine.runtime import make_model
        from embedmesh.engine.tokens import ModelTokenizer

        path = Path(folder)
        described = read_folder(path)
        tokenizer = ModelTokenizer(path, described.max_tokens)
        model = make_model(described, threads, tier)

        def embed(texts: Sequence[str]) -> Any:
            if pairs:
                sequences = pairs_of(tokenizer, QUERY, texts)
            else:
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


def pairs_of(tokenizer: Any, query: str, documents: Sequence[str]) -> list[list[int]]:
    """What the model gets for a query and each document, cut to what it takes: as gateway and node do it together."""
    from embedmesh.rules.embeddings import numbers_of
    from embedmesh.rules.reranking import fit_pair

    first, *seconds = tokenizer.ids([query, *documents])
    room = tokenizer.max_tokens - tokenizer.specials - len(tokenizer.between)
    fits = [fit_pair(len(first), len(second), room) for second in seconds]
    cut = [(first[:most], second[:least]) for second, (most, least) in zip(seconds, fits, strict=True)]
    return [tokenizer.marked(numbers_of(tokenizer.pair(*both))) for both in cut]


KINDS: dict[str, Load] = {
    "sentence-transformers": sentence_transformers,
    "sentence-transformers-pairs": sentence_transformers_pairs,
    "fastembed": fastembed,
    "fastembed-pairs": fastembed_pairs,
    "onnxruntime": onnxruntime,
    "exact": embedmesh("exact"),
    "exact-pairs": embedmesh("exact", pairs=True),
    "fast": embedmesh("fast"),
    "fast-pairs": embedmesh("fast", pairs=True),
    "int8": embedmesh("int8"),
}


def main(kind: str, folder: str, threads: str) -> None:
    """Load, say so, then answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    embed = KINDS[kind](folder, int(threads))
    embed([FIRST])
    print(json.dumps({"version": version(kind.removesuffix("-pairs"))}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(embed, json.loads(line))), file=answers, flush=True)


def version(kind: str) -> str:
    """Of what computes; for sentence-transformers with the instructions that its MKL has chosen."""
    if kind == "sentence-transformers":
        return f"{importlib.metadata.version(kind)}, MKL level {mkl_level()}"
    try:
        return importlib.metadata.version(kind)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("openvino")


def mkl_level() -> str:
    """What MKL has found the CPU to be, by its own numbers: 5 is AVX2, 7 is AVX-512, 0 a CPU that is not Intel's."""
    import ctypes

    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return str(library.mkl_serv_cpu_detect())
    except (OSError, AttributeError):
        return "unknown"


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
