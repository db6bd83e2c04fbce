"""What the node of this bench can do wrong besides `bench.faultnode.modes`: in OpenAI's own form, over plain HTTP.

A fault changes the reply before it is encoded (`reply`), or its bytes (`raw`), or comes instead of all (`mode`, one of
the fault node's, which may change rows and tokens, too). Some change what the node accepts.
"""

import base64
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from aiohttp import web

from bench.rig.http import Vectors

WIDTH_OTHER = 256  # of another model; the right one has 384
LONG = 3.0  # length of a vector that is not of unit length
INPUTS_FEW = 32  # that a node takes at once: the default of TEI
TOKENS_ABSURD = 10**9
NODE_S = 0.02  # that a node takes for a request: a few texts on a processor
LATE_S = 2.0
ELSEWHERE = "ELSEWHERE"  # stands for a third server's address in `redirect`

Reply = dict[str, Any]


class Fault(NamedTuple):
    """One way to be wrong, or to be unusual."""

    says: str
    mode: str = "honest"
    rows: Callable[[Vectors], Vectors] = lambda rows: rows
    reply: Callable[[Reply], object] = lambda reply: None  # changes it
    raw: Callable[[bytes], web.Response] = lambda body: as_json(body)
    form: str = ""  # that vectors have, whatever was asked
    any_model: bool = False  # answers every name with the vectors of its one model
    inputs_max: int = 2_048
    late_s: float = NODE_S  # before it does anything


def as_json(body: bytes, status: int = 200, **headers: str) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def _set(**members: Any) -> Callable[[Reply], object]:
    return lambda reply: reply.update(members)


def _first(change: Callable[[Any], Any]) -> Callable[[Reply], object]:
    """Change the first vector."""

    def changed(reply: Reply) -> None:
        reply["data"][0]["embedding"] = change(reply["data"][0]["embedding"])

    return changed


def _without_first(reply: Reply) -> None:
    del reply["data"][0]
    for at, item in enumerate(reply["data"]):
        item["index"] = at


def _one_more(reply: Reply) -> None:
    reply["data"].append(reply["data"][0] | {"index": len(reply["data"])})


def _same_index(reply: Reply) -> None:
    for item in reply["data"]:
        item["index"] = 0


def _backwards(encoded: str) -> str:
    return base64.b64encode(np.frombuffer(base64.b64decode(encoded), "<f4").astype(">f4").tobytes()).decode()


def _narrow(rows: Vectors) -> Vectors:
    rows = rows[:, :WIDTH_OTHER]
    scaled: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("<f4")
    return scaled


def _error_in_200(body: bytes) -> web.Response:
    error = {"message": "CUDA out of memory", "type": "server_error", "param": None, "code": 500}
    return as_json(json.dumps({"error": error}).encode())


def _cut(body: bytes) -> web.Response:
    return as_json(body[: len(body) // 2])


def _redirect(body: bytes) -> web.Response:
    return web.Response(status=307, headers={"Location": ELSEWHERE})


FAULTS: dict[str, Fault] = {
    "honest": Fault("answers right"),
    "other-model": Fault("vectors of another model of the same width", "other-model"),
    "other-width": Fault(f"vectors of another model, of {WIDTH_OTHER} components", rows=_narrow),
    "any-model": Fault("answers every model's name with its own model's vectors", any_model=True),
    "other-name": Fault("calls the model by another name in its reply", reply=_set(model="/models/snapshots/5c38ec7")),
    "long": Fault("vectors three times as long", rows=lambda rows: (rows * np.float32(LONG)).astype("<f4")),
    "too-few": Fault("one vector too few", reply=_without_first),
    "too-many": Fault("one vector too many", reply=_one_more),
    "same-index": Fault("every vector has index 0", reply=_same_index),
    "shuffled": Fault("vectors in reverse order, with their right index", reply=lambda reply: reply["data"].reverse()),
    "nan": Fault("one component is not a number", "nan"),
    "inf": Fault("one component is infinite", "inf"),
    "null": Fault("one component is null", form="float", reply=_first(lambda row: [None, *row[1:]])),
    "zero": Fault("one vector is all zeros", "zero"),
    "floats": Fault("floats where base64 was asked", form="float"),
    "base64": Fault("base64 where floats were asked", form="base64"),
    "big-endian": Fault("base64 of big-endian floats", form="base64", reply=_first(_backwards)),
    "cut-base64": Fault("base64 that ends too early", form="base64", reply=_first(lambda text: text[:-7])),
    "cut-json": Fault("JSON that ends in the middle", raw=_cut),
    "error-in-200": Fault("an error object with status 200", raw=_error_in_200),
    "html": Fault("a web page with status 200", "html"),
    "no-usage": Fault("a reply without usage", reply=lambda reply: reply.pop("usage")),
    "absurd-usage": Fault(
        "a usage of a billion tokens", reply=_set(usage={"prompt_tokens": TOKENS_ABSURD, "total_tokens": TOKENS_ABSURD})
    ),
    "few-inputs": Fault(f"refuses more than {INPUTS_FEW} inputs (413)", inputs_max=INPUTS_FEW),
    "redirect": Fault("redirects to a third server", raw=_redirect),
    "oversize": Fault("a body of 64 MB", "oversize"),
    "error-500": Fault("500 at once", "error-500"),
    "busy": Fault("429 with Retry-After", "busy-429"),
    "hang": Fault("takes the request and never answers", "hang"),
    "drip": Fault("answers one byte every 0.2 s", "drip"),
    "reset": Fault("a TCP reset when the request has come", "reset"),
    "late": Fault(f"answers right, after {LATE_S:g} s", late_s=LATE_S),
    "close-mid-body": Fault("computes, and hangs up 100 bytes before its answer's end", "close-mid-body"),
}
