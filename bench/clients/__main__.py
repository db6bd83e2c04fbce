"""Clients of Azure, Cohere, Google, Hugging Face, Jina, Mistral, Ollama and Voyage, unmodified, before a real gateway.

`python -m bench.clients [--only NAME …] [--json]`. They are installed under `.bench`. Exit code 0 only if each gets the
vectors of `POST /v1/embeddings`, or CrossEncoder's scores; if each of its requests is charged once and exactly; and if
the ledger adds up.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.clients.drive import COHERES, WAYS, Way
from bench.rerank.model import DOCUMENTS, LOGITS, PRICE, QUESTION, RERANKER, catalogue_of, cross_encoder
from bench.rig.command import bench, check_names, model_folder
from bench.rig.corpus import token_counts
from bench.rig.http import MODEL, http_request
from bench.rig.install import install
from bench.rig.live import Live, serving
from bench.rig.processes import clean_environment, wait_for
from bench.site.snippets import node_modules
from embedmesh.provision.bootstrap import open_books
from tests.data import CHECKOUT

TEXTS = ["Hello, world", "Bonjour le monde", "こんにちは世界"]
WITHIN = 2e-5  # of a component
SCORES_WITHIN = 1e-5
RUN_S = 900.0
SETTLED_S = 10.0  # charges follow replies by some milliseconds
CREDIT = 10**12
BUILT_IN = CHECKOUT / "embedmesh" / "data" / "catalogue.toml"
AZURE_NODE = "azure_node"  # the way that is no Python
TOLD = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


class ClientRow(msgspec.Struct, frozen=True):
    """One way: its largest difference; and what is wrong, also with what it was charged."""

    way: str
    difference: float | None
    wrong: str = ""


class Figures(msgspec.Struct, frozen=True):
    """All ways."""

    clients: list[ClientRow]
    ledger: str

    @property
    def broken(self) -> list[str]:
        """What did not work, in words."""
        found = [f"{row.way}: {row.wrong}" for row in self.clients if row.wrong]
        return found + ([f"ledger check: {self.ledger}"] if self.ledger != "right" else [])


def measure(only: list[str] | None = None) -> Figures:
    """Raises CannotRun where the clients do not install."""
    ways = WAYS | {AZURE_NODE: Way(list)}
    check_names(only or (), list(ways))
    names = [name for name in ways if only is None or name in only]
    homes = {home: install(home) for home in sorted({ways[name].home for name in names})}
    modules = node_modules() if AZURE_NODE in names else None
    with tempfile.TemporaryDirectory(prefix="embedmesh-clients-") as folder:
        catalogue = Path(folder) / "catalogue.toml"
        catalogue.write_text(both_models())
        with serving(["--catalogue", str(catalogue)]) as live:
            job = job_of(live)
            keys = keys_of(live, names)
            told: dict[str, Any] = {}
            for home, python in homes.items():
                there = {name: key for name, key in keys.items() if name in WAYS and ways[name].home == home}
                told |= run_python(python, job | {"keys": there}, Path(folder))
            if modules is not None:
                told[AZURE_NODE] = run_node(modules, job | {"key": keys[AZURE_NODE]}, Path(folder))
            rows = [row_of(live, name, ways[name], keys[name], told[name]) for name in names]
            checked = live.command("ledger", "check")
    return Figures(rows, "right" if checked.returncode == 0 else checked.stdout.decode()[-200:])


def both_models() -> str:
    """A catalogue of the default model and of the reranker."""
    folder = model_folder()
    entries = BUILT_IN.read_text().replace(f'folder = "{folder.name}"', f'folder = "{folder}"')
    entries = entries.replace(f'aliases = ["{MODEL}"]', f'aliases = ["{MODEL}", "{COHERES}"]')
    return f"{entries}\n{catalogue_of(cross_encoder(folder))}"


def job_of(live: Live) -> dict[str, Any]:
    """What all ways ask, and what is right."""
    with live.wire() as wire:
        reply = wire.ask(live.embed({"input": TEXTS})).json()
    vectors = [each["embedding"] for each in reply["data"]]
    scores = 1 / (1 + np.exp(-np.array(LOGITS)))
    asked = {"model": MODEL, "texts": TEXTS, "reranker": RERANKER, "query": QUESTION, "documents": DOCUMENTS}
    return {"base": live.base_url.removesuffix("/v1"), "right": {"vectors": vectors, "scores": list(scores)}, **asked}


def keys_of(live: Live, names: Sequence[str]) -> dict[str, str]:
    """A key for each way, of an account of its own."""
    made = {}
    with open_books(live.data_dir, live.store) as books:
        for name in names:
            books.accounts.create(name)
            books.accounts.credit(name, CREDIT, name)
            _, made[name] = books.keys.create(name, ["embeddings"])
    return made


def run_python(python: Path, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What drive.py says of each way."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    said = _run([str(python), str(Path(__file__).with_name("drive.py")), str(file)], folder)
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    return told


def run_node(modules: Path, job: Mapping[str, Any], folder: Path) -> float | str:
    """The same of azure.mjs."""
    (folder / "node_modules").symlink_to(modules)
    script = Path(shutil.copy(Path(__file__).with_name("azure.mjs"), folder))
    (folder / "job.json").write_text(json.dumps(job))
    try:
        vectors = json.loads(_run(["node", str(script), str(folder / "job.json")], folder))
    except subprocess.CalledProcessError as error:
        return str(error.stderr)[-300:]
    return float(np.abs(np.array(vectors) - np.array(job["right"]["vectors"])).max())


def row_of(live: Live, name: str, way: Way, key: str, told: float | str) -> ClientRow:
    """What a way found, and whether it was charged for it once and exactly."""
    if isinstance(told, str):
        return ClientRow(name, None, told)
    tokens = way.passes * (pair_tokens() if way.reranks else sum(token_counts(TEXTS)))
    owed = way.requests, tokens, tokens * PRICE // 1_000_000
    charged = charged_to(live, key, owed)
    within = SCORES_WITHIN if way.reranks else WITHIN
    wrong = "" if told <= within else f"differs by {told:.3g}"
    return ClientRow(name, told, wrong if charged == owed else f"{wrong} charged {charged}, not {owed}".strip())


def pair_tokens() -> int:
    """Of the query with each document, special tokens included: one more than both have, since one pair has three."""
    query, *documents = token_counts([QUESTION, *DOCUMENTS])
    return sum(query + each - 1 for each in documents)


def charged_to(live: Live, key: str, owed: tuple[int, int, int]) -> tuple[int, int, int]:
    """Requests, tokens and nano-USD of an account's usage; and its money must have gone down by as much."""
    found = 0, 0, 0

    def settled() -> bool:
        nonlocal found
        with live.wire() as wire:
            usage, account = (
                wire.ask(http_request("GET", f"/v1/account{path}", key=key)).json() for path in ("/usage", "")
            )
        rows = usage["data"]
        found = (
            sum(row["requests"] for row in rows),
            sum(row["tokens"] for row in rows),
            CREDIT - account["balance_nanousd"],
        )
        return found == owed and sum(row["cost_nanousd"] for row in rows) == owed[2]

    wait_for(settled, SETTLED_S)
    return found


def _run(command: Sequence[str], folder: Path) -> str:
    """Raises CalledProcessError."""
    environment = clean_environment(TOLD | {"HOME": str(folder)})
    given: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": RUN_S}
    return str(subprocess.run(command, stdin=subprocess.DEVNULL, check=True, **given).stdout)


if __name__ == "__main__":
    bench(measure, file="clients.json", only="ways by name")
