"""A real node process on a small model, and a client on its socket."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from embedmesh.rules.embeddings import COMPACT, EmbedVectors, pack_ids
from embedmesh.rules.models import Model

START_S = 60.0  # a second on a quiet machine; on a busy one a pause before the next try of a start may be of ten


def write_catalogue(file: Path, models: Iterable[Model]) -> Path:
    """A catalogue of these models (a JSON string is a TOML string)."""
    entries = []
    for model in models:
        defaults = {field.name: field.default for field in msgspec.structs.fields(Model)}
        members = {name: value for name, value in msgspec.structs.asdict(model).items() if value != defaults[name]}
        members.pop("prompts", None)
        if model.reranks:
            del members["width"]
        entries.append("[[models]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in members.items()))
    file.write_text("\n".join(entries))
    return file


class Node:
    """A node process on a Unix socket. Options without a value are given as True."""

    def __init__(self, models: Model | Iterable[Model], uds: Path, *, pass_fds: tuple[int, ...] = (), **options: Any):
        every = [models] if isinstance(models, Model) else list(models)
        catalogue = write_catalogue(uds.with_suffix(".toml"), every)
        command = [sys.executable, "-m", "embedmesh", "node", "--uds", str(uds), "--catalogue", str(catalogue)]
        self.data_dir = Path(options.pop("data_dir", uds.with_suffix(".data")))
        command += ["--data-dir", str(self.data_dir)]
        for name, value in ({"threads": 1} | options).items():
            for one in value if isinstance(value, list) else [value]:
                command += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=pass_fds)
        self.uds = uds
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), base_url="http://node", timeout=START_S)

    def until(self, status: int) -> float:
        """Seconds until /readyz answers this."""
        begun = time.monotonic()
        while self.readyz() != status:
            assert time.monotonic() - begun < START_S
            time.sleep(0.02)
        return time.monotonic() - begun

    def readyz(self) -> int | None:
        try:
            return self.http.get("/readyz").status_code
        except httpx.TransportError:
            return None

    def embed(self, **body: Any) -> httpx.Response:
        """The public form."""
        asked = {"model": "tests/tiny", "input": ["w1"], "encoding_format": "base64"} | body
        return self.http.post("/v1/embeddings", json=asked)

    def compact(self, ids: list[list[int]], model: str = "tests/tiny") -> httpx.Response:
        """The gateway's form."""
        body = msgspec.msgpack.encode(pack_ids(model, ids))
        return self.http.post("/v1/embeddings", content=body, headers={"Content-Type": COMPACT})

    def worker(self) -> int:
        """The first worker's process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def end_by_itself(self) -> tuple[int, str]:
        """Exit code and what it wrote, of a node that is to refuse to start."""
        try:
            _, said = self.process.communicate(timeout=START_S)
        finally:
            self.process.kill()
        self.http.close()
        return self.process.returncode, said

    def end(self) -> tuple[int, str]:
        """Exit code and what it wrote, after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            _, said = self.process.communicate(timeout=START_S)
        finally:
            self.process.kill()
        self.http.close()
        return self.process.returncode, said


def vectors(reply: httpx.Response) -> list[np.ndarray]:
    """Of a public reply with base64."""
    assert reply.status_code == 200, reply.text
    assert [item["index"] for item in reply.json()["data"]] == list(range(len(reply.json()["data"])))
    return [np.frombuffer(base64.b64decode(item["embedding"], validate=True), "<f4") for item in reply.json()["data"]]


def rows(reply: httpx.Response, width: int = 16) -> np.ndarray:
    """Of a compact reply."""
    assert reply.status_code == 200, reply.text
    return np.frombuffer(msgspec.msgpack.decode(reply.content, type=EmbedVectors).data, "<f4").reshape(-1, width)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a worker."""
    os.kill(pid, number)
