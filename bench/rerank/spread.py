"""One query with 1,000 documents over two real nodes, one a core; beside one alone: `python -m bench.rerank.spread`."""

import tempfile
from pathlib import Path

import msgspec

from bench.choosing.real import Figures, one_and_two
from bench.engine.runner import QUERY
from bench.rerank.field import scores_of
from bench.rerank.model import RERANKER, catalogue_of, cross_encoder
from bench.rig.command import bench, model_folder
from bench.rig.corpus import corpus

DOCUMENTS = 1_000


async def measure(rounds: int = 3) -> Figures:
    """The whole run."""
    body = {"model": RERANKER, "query": QUERY, "documents": corpus("M", DOCUMENTS)}
    with tempfile.TemporaryDirectory(prefix="embedmesh-rerank-") as folder:
        catalogue = Path(folder) / "catalogue.toml"
        catalogue.write_text(catalogue_of(cross_encoder(model_folder())))
        options = ("--catalogue", str(catalogue))
        return await one_and_two(rounds, "/v1/rerank", msgspec.json.encode(body), scores_of, options)


if __name__ == "__main__":
    bench(measure, file="rerank-spread.json")
