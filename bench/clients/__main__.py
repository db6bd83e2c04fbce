"""Clients of Ollama, Cohere, Voyage, Mistral, Google and Hugging Face, unmodified, before a real gateway.

`python -m bench.clients [--json]`. They are installed in `.bench/clients`. Exit code 0 only if each gets the vectors of
`POST /v1/embeddings`, and the ledger adds up to what they were charged.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import msgspec

from bench.rig.command import bench
from bench.rig.http import MODEL
from bench.rig.install import install
from bench.rig.live import serving
from bench.rig.processes import clean_environment

TEXTS = ["Hello, world", "Bonjour le monde", "こんにちは世界"]
WITHIN = 2e-5  # of a component
RUN_S = 600.0


class ClientRow(msgspec.Struct, frozen=True):
    """One way: its largest difference, or why it did not work."""

    way: str
    difference: float | None
    why: str


class Figures(msgspec.Struct, frozen=True):
    """All ways."""

    clients: list[ClientRow]
    ledger: str

    @property
    def broken(self) -> list[str]:
        """What did not work, in words."""
        found = [f"{row.way}: {row.why or row.difference}" for row in self.clients if not _good(row)]
        return found + ([f"ledger check: {self.ledger}"] if self.ledger != "right" else [])


def _good(row: ClientRow) -> bool:
    return row.difference is not None and row.difference <= WITHIN


def measure() -> Figures:
    """Raises CannotRun where the clients do not install."""
    python = install("clients")
    with serving() as live, tempfile.TemporaryDirectory(prefix="embedmesh-clients-") as folder:
        with live.wire() as wire:
            reply = wire.ask(live.embed({"input": TEXTS})).json()
        job = {
            "base": live.base_url.removesuffix("/v1"),
            "key": live.api_key,
            "model": MODEL,
            "texts": TEXTS,
            "vectors": [each["embedding"] for each in reply["data"]],
        }
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        done = subprocess.run(
            [str(python), str(Path(__file__).with_name("drive.py")), str(file)],
            env=clean_environment({"HOME": folder}),
            capture_output=True,
            text=True,
            timeout=RUN_S,
            stdin=subprocess.DEVNULL,
            check=True,
        )
        told = json.loads(done.stdout.splitlines()[-1])
        checked = live.command("ledger", "check")
    rows = [
        ClientRow(way, None, found) if isinstance(found, str) else ClientRow(way, found, "")
        for way, found in told.items()
    ]
    return Figures(rows, "right" if checked.returncode == 0 else checked.stdout.decode()[-200:])


if __name__ == "__main__":
    bench(measure, file="clients.json")
