"""Who takes part, and how each is started."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from bench.engine.contenders import Contender, Runner, Server
from bench.engine.figures import EXACT, FAST, FASTEMBED, INFINITY, ST
from bench.engine.models import as_onnx
from bench.engine.runner import QUERY
from bench.rerank.model import RERANKER, catalogue_of
from bench.rig.http import Address, Reply, Vectors, Wire, http_request
from bench.rig.install import infinity, install
from bench.rig.processes import EMBEDMESH, HOST, free_port
from embedmesh.engine.precision import tiers_here
from embedmesh.provision.bootstrap import bootstrap

GATEWAY = "exact, gateway over HTTP"
OURS = (EXACT, GATEWAY)  # in float32, as the peers
PEERS = (FASTEMBED, INFINITY)
ANSWER_S = 900.0  # 1,000 documents of 512 tokens, on cores with other work


def scores_of(reply: Reply) -> Vectors:
    """[documents, 1], in the request's order, of a reply in Jina's form that has all of them."""
    results = reply.json()["results"]
    scores = np.full((len(results), 1), np.nan, np.float32)
    for each in results:
        scores[each["index"]] = each["relevance_score"]
    return scores


class Reranker(Server):
    """A server that gets all documents in one request, and answers in Jina's form."""

    def __init__(
        self, name: str, command: Sequence[str], address: Address, folder: Path, threads: int, path: str, key: str = ""
    ) -> None:
        """Starts it, and waits for its first score."""
        self._key = key
        super().__init__(name, command, address, folder, threads, path)

    def request(self, texts: Sequence[str]) -> bytes:
        body = {"model": RERANKER, "query": QUERY, "documents": list(texts), "raw_scores": True}
        return http_request("POST", self._path, msgspec.json.encode(body), key=self._key or None)

    def seconds(self, texts: Sequence[str]) -> float:
        request = self.request(texts)
        with Wire(self.address, self.answer_s) as wire:
            return self.ask(wire, request)[0]

    def vectors(self, texts: Sequence[str]) -> Vectors:
        with Wire(self.address, self.answer_s) as wire:
            return scores_of(self.ask(wire, self.request(texts))[1])


class Rerankers:
    """The contenders by name; each starts when it is called, and may raise NotInstalled or Broke."""

    def __init__(self, model: Path, threads: int, folder: Path) -> None:
        """`folder`, of a short name, is for sockets and logs."""
        self._model, self._threads, self._folder = model, threads, folder
        self.starters: dict[str, Callable[[], Contender]] = {
            ST: lambda: self._runner(ST, install(ST), ST, model),
            EXACT: lambda: self._runner(EXACT, Path(sys.executable), EXACT, model),
            GATEWAY: self._gateway,
            **({FAST: lambda: self._runner(FAST, Path(sys.executable), FAST, model)} if FAST in tiers_here() else {}),
            FASTEMBED: lambda: self._runner(FASTEMBED, install("fastembed"), "fastembed", as_onnx(model)),
            INFINITY: self._infinity,
        }

    def start(self, name: str) -> Contender:
        """One of them, with time for the longest work."""
        contender = self.starters[name]()
        contender.answer_s = ANSWER_S
        return contender

    def _runner(self, name: str, python: Path, kind: str, model: Path) -> Runner:
        return Runner(name, python, f"{kind}-pairs", model, self._folder, self._threads)

    def _gateway(self) -> Reranker:
        """`embedmesh serve`: a gateway that counts and charges, and a node behind it."""
        port, data_dir = free_port(), self._folder / "data"
        catalogue = self._folder / "catalogue.toml"
        catalogue.write_text(catalogue_of(self._model))
        key = bootstrap(data_dir, f"http://{HOST}:{port}/v1").api_key
        command = [*EMBEDMESH, "serve", "--port", str(port), "--data-dir", str(data_dir)]
        command += ["--catalogue", str(catalogue), "--threads", str(self._threads)]
        return Reranker(GATEWAY, command, (HOST, port), self._folder, self._threads, "/v1/rerank", key)

    def _infinity(self) -> Reranker:
        port = free_port()
        command = infinity(self._model, RERANKER, port)
        return Reranker(INFINITY, command, (HOST, port), self._folder, self._threads, "/rerank")
