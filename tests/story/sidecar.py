"""`embedmesh serve`, a sidecar node that joined it, and a small server of another make beside that."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.data import find_model_folder
from tests.little_server import LittleServer
from tests.story.endpoint import COMMAND, READY_S, Endpoint, run_json, wait_until

CHAT, PAINTER = "acme/chat", "acme/painter"
OWN_MODEL = """
[[models]]
id = "sentence-transformers/all-MiniLM-L6-v2"
folder = "FOLDER"
width = 384
max_tokens = 256
price = 10_000_000
digest = "8b15441b4c169b78dcc3f86d491663fade918ca0772dae0b58d0eba4f681d569"
"""
CATALOGUE = f"""
[[models]]
id = "{CHAT}"
modalities = ["chat", "completions"]
max_tokens = 32_768
price = 1_000_000_000
output_price = 3_000_000_000
output_max = 512

[[models]]
id = "{PAINTER}"
modalities = ["images"]
max_tokens = 1_000
price = 0
image_prices = {{ "256x256" = 2_000_000, "512x512" = 5_000_000 }}
"""


class Sidecar:
    """`embedmesh node --upstream`."""

    def __init__(self, endpoint: Endpoint, server: LittleServer, folder: Path, *, address: str = "") -> None:
        self.endpoint = endpoint
        self.server = server
        self.data_dir = folder / "sidecar"
        catalogue = folder / "sidecar.toml"
        catalogue.write_text(CATALOGUE)
        key = folder / "admin.key"
        key.write_text(endpoint.admin_key)
        self.operator = ["--gateway", endpoint.base_url, "--admin-key-file", str(key)]
        token = run_json("nodes", "invite", *self.operator)["token"]
        given: list[Any] = ["--upstream", server.url, "--catalogue", catalogue, "--data-dir", self.data_dir]
        given += ["--model", f"{CHAT}=their-chat", "--model", PAINTER]
        given += ["--gateway", endpoint.root, "--join", token]
        if address:
            given += ["--address", address]
        self.log = folder / "sidecar.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*COMMAND, "node", *map(str, given)], stderr=log, env=os.environ)

    def wait_ready(self) -> "Sidecar":
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            nodes = self.endpoint.get("/v1/admin/nodes", self.endpoint.admin_key).json()["data"]
            return any(node["state"] == "ready" and CHAT in node["models"] for node in nodes)

        wait_until("the sidecar gets work", ready, READY_S)
        return self

    @property
    def identity(self) -> Path:
        """The public file of its identity, for pins."""
        return self.data_dir / "node.identity.pub"

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(15) == 0, self.log.read_text()
        log = self.log.read_text()
        assert "Traceback" not in log and "internal error" not in log, log


@contextlib.contextmanager
def sidecar_mesh(folder: Path, *, address: str = "", **of_server: Any) -> Iterator[Sidecar]:
    """All three, ready; the sidecar dials out, if it has no address. At the end the books add up and no bug was met."""
    catalogue = folder / "catalogue.toml"
    catalogue.write_text(OWN_MODEL.replace("FOLDER", str(find_model_folder())) + CATALOGUE)
    endpoint = Endpoint(folder / "data", "--catalogue", catalogue, "--node-networks", "127.0.0.0/8")
    try:
        with LittleServer(**of_server) as server:
            sidecar = Sidecar(endpoint.wait_ready(), server, folder, address=address)
            try:
                yield sidecar.wait_ready()
                endpoint.account()
                endpoint.check_ledger()
                sidecar.stop()
            finally:
                sidecar.process.kill()
                sidecar.process.wait()
        assert endpoint.stop() == 0
    finally:
        endpoint.kill_all()
