"""Real servers of other makes that rerank, as nodes of ours: do callers get the scores that our own node gives?

The model is a small random cross-encoder of the tests. llama.cpp has no token types, so for it the model has one.
"""

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.rig.http import http_request
from bench.rig.live import Live
from bench.rig.processes import EMBEDMESH, HOST
from tests.data import CHECKOUT

GOLDEN = CHECKOUT / "tests" / "engine" / "goldens" / "rerankers" / "bert"
TYPES = "bert.embeddings.token_type_embeddings.weight"
CLOSE = {"infinity": 1e-5, "llamacpp": 5e-3}  # of a logit: float32 as ours; llama.cpp's GELU is a table of half floats
BATCH = 8
QUERY = "a b c d"
DOCUMENTS = [" ".join("abcdefghijklmnop"[at % 7 : at % 7 + at // 7 + 1]) for at in range(60)]

Found = tuple[str, str, bool]  # what was checked, what was found, whether it is right


def model_for(name: str, folder: Path) -> Path:
    """The model's folder as that server needs it."""
    model = Path(shutil.copytree(GOLDEN, folder / "judge"))
    if name == "llamacpp":
        weights = bytearray((model / "model.safetensors").read_bytes())
        (size,) = struct.unpack("<Q", weights[:8])
        begin, end = (8 + size + at for at in json.loads(weights[8 : 8 + size])[TYPES]["data_offsets"])
        half = (end - begin) // 2
        weights[begin + half : end] = weights[begin : begin + half]
        (model / "model.safetensors").write_bytes(weights)
    return model


def catalogue_of(model: Path, folder: Path) -> Path:
    """A catalogue with that model alone, as `models inspect` describes it."""
    described = subprocess.run([*EMBEDMESH, "models", "inspect", str(model), "--json"], capture_output=True, check=True)
    entry = dict(msgspec.json.decode(described.stdout)) | {"price": 10**6}
    lines = [f"{key} = {json.dumps(value)}" for key, value in entry.items() if not isinstance(value, dict) and value]
    path = folder / "models.toml"
    path.write_text("[[models]]\n" + "\n".join(lines) + "\n")
    return path


def rerank_checks(live: Live, name: str, port: int, model: Path, key_file: Path) -> Iterator[Found]:
    """Beside our own node, and in its place."""
    truth = _scores(live, model.name)
    expected = "as ours" if len(set(truth.tolist())) > len(DOCUMENTS) // 2 else "all alike"
    yield "our own scores differ", expected, expected == "as ours"
    options = ("--name", name, "--model", f"{model.name}=theirs", "--batch", str(BATCH), "--token-file", str(key_file))
    done = live.command("nodes", "add", f"http://{HOST}:{port}", *options)
    added = dict(msgspec.json.decode(done.stdout)) if done.stdout else {"state": done.stderr}
    yield "added, and its first scores compared with ours", str(added["state"]), added["state"] == "ready"
    live.command("nodes", "drain", "local")
    off = float(np.abs(_scores(live, model.name) - truth).max())
    yield f"{len(DOCUMENTS)} documents, at most {BATCH} a call", f"off by {off:.1e}", off <= CLOSE[name]
    live.command("nodes", "resume", "local")
    node = dict(msgspec.json.decode(live.command("nodes", "show", name).stdout))
    compared, canaries = node["quarantined"] is None, node["canaries"]
    yield "canaries", str(canaries), compared and canaries["failed"] == 0 and canaries["passed"] > 0
    yield "failures", str(node["failures"]), not node["failures"]


def _scores(live: Live, model: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Of all documents, as callers are told them, in their order; as logits, where these are asked for."""
    body = {"model": model, "query": QUERY, "documents": DOCUMENTS, "raw_scores": True}
    with live.wire() as wire:
        reply = wire.ask(http_request("POST", "/v1/rerank", msgspec.json.encode(body), key=live.api_key))
    assert reply.status == 200, reply.outcome
    scores = {each["index"]: each["relevance_score"] for each in reply.json()["results"]}
    return np.array([scores[at] for at in range(len(DOCUMENTS))])
