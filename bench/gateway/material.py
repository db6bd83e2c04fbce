"""Requests and replies of the bench: real short texts, one unit vector, as the program `ends` reads them."""

import base64
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from bench.rig.corpus import corpus
from bench.rig.heads import SDK_HEADERS
from bench.rig.http import MODEL, http_request
from bench.rig.install import HOME, run_step
from embedmesh.catalogue import load_catalogue
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.embeddings import ServedModel, ServedModels

TEXTS = 512  # different ones: what a gateway remembers of words may help it, what it remembers of texts may not
REQUESTS_A_KEY = 4  # of many keys
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
    """Files in `folder`, and what they are made of."""

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

    def reply(self, inputs: int, *, floats: bool = False) -> Path:
        """The reply of an OpenAI-compatible server: for peers."""
        embedding = self.vector.tolist() if floats else self.base64
        data = [{"object": "embedding", "index": at, "embedding": embedding} for at in range(inputs)]
        usage = {"prompt_tokens": 28 * inputs, "total_tokens": 28 * inputs}
        body = {"object": "list", "data": data, "model": MODEL, "usage": usage}
        return self._file(f"reply-{inputs}-{floats}", _response(msgspec.json.encode(body)))

    def requests(
        self,
        folder: Path,
        inputs: int,
        keys: Sequence[str | None],
        headers: Mapping[str, str],
        *,
        floats: bool = False,
    ) -> Path:
        """Requests of `inputs` texts each, as an SDK sends them: TEXTS different ones, or some for each key."""
        count = max(TEXTS, len(keys) * REQUESTS_A_KEY)
        encoding = "float" if floats else "base64"
        requests = []
        for at in range(count):
            several = [self.texts[(at * inputs + each + at // TEXTS) % TEXTS] for each in range(inputs)]
            body = {"input": several if inputs > 1 else several[0], "model": MODEL, "encoding_format": encoding}
            head = {**SDK_HEADERS, **headers}
            encoded = msgspec.json.encode(body)
            requests.append(http_request("POST", "/v1/embeddings", encoded, key=keys[at % len(keys)], headers=head))
        path = folder / "requests"
        path.write_bytes(b"".join(each + b"\0" for each in requests))
        return path

    def _file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def _response(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
