"""Requests and replies of the bench: real short texts, one unit vector, as the program `ends` reads them."""

import base64
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from bench.rig.corpus import corpus
from bench.rig.http import MODEL, http_request
from bench.rig.install import HOME, run_step
from embedmesh.catalogue import load_catalogue
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.embeddings import ServedModel, ServedModels

TEXTS = 512  # different ones: what a gateway remembers of words may help it, what it remembers of texts may not
SEED = 6


def build() -> Path:
    """The C program `ends`, built with this machine's compiler into `.bench`. Raises NotInstalled."""
    program, source = HOME / "gateway" / "ends", Path(__file__).with_name("ends.c")
    program.parent.mkdir(parents=True, exist_ok=True)
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        run_step(["cc", "-O2", "-o", str(program), str(source)])
    return program


@contextmanager
def made_material() -> Iterator["Material"]:
    """In a folder that is removed in the end. Raises NotInstalled."""
    with tempfile.TemporaryDirectory(prefix="embedmesh-gateway-") as folder:
        yield Material(Path(folder), build())


class Material:
    """Files in `folder`. `expected` has one vector a line, as it stands in a reply: base64 between its quotes."""

    def __init__(self, folder: Path, program: Path) -> None:
        """`program` is `ends`."""
        self.folder, self.program = folder, program
        model = load_catalogue(None, assets=assets_dir()).models[0]
        self.texts = corpus("Q", TEXTS)
        dice = np.random.default_rng(SEED)
        vector = dice.standard_normal(model.width)
        self.vector = (vector / np.linalg.norm(vector)).astype("<f4")
        self.base64 = base64.b64encode(self.vector.tobytes()).decode("ascii")
        (folder / "vector").write_bytes(self.vector.tobytes())
        offer = ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier)
        (folder / "models").write_bytes(_response(msgspec.json.encode(ServedModels([offer]))))

    def reply(self, inputs: int) -> Path:
        """The reply of an OpenAI-compatible server, with base64: for peers."""
        data = [{"object": "embedding", "index": at, "embedding": self.base64} for at in range(inputs)]
        usage = {"prompt_tokens": 28 * inputs, "total_tokens": 28 * inputs}
        body = {"object": "list", "data": data, "model": MODEL, "usage": usage}
        return self._file(f"reply-{inputs}", _response(msgspec.json.encode(body)))

    def requests(self, name: str, inputs: int, key: str | None, headers: Mapping[str, str] | None = None) -> Path:
        """TEXTS requests of `inputs` texts each, for the gateway of that name."""
        requests = []
        for at in range(TEXTS):
            several = [self.texts[(at * inputs + each) % TEXTS] for each in range(inputs)]
            body = {"model": MODEL, "input": several if inputs > 1 else several[0], "encoding_format": "base64"}
            requests.append(http_request("POST", "/v1/embeddings", msgspec.json.encode(body), key=key, headers=headers))
        return self._file(f"requests-{name}-{inputs}", b"".join(each + b"\0" for each in requests))

    def expected(self, inputs: int) -> Path:
        """Every vector in full, so of the right width, and as many as there are inputs."""
        return self._file(f"expected-{inputs}", "".join(f'"{self.base64}"\n' for _ in range(inputs)).encode())

    def _file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def _response(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
