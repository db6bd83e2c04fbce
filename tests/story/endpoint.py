"""`embedmesh serve` as people start it, seen from outside only: its output, its HTTP, its books, its processes.

Every process that a story starts inherits a mark in its environment, and is found by it in /proc: also one that lost
its parent, or that has a session of its own.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from click.testing import CliRunner
from numpy.typing import NDArray

from embedmesh.commands.group import cli
from embedmesh.confidential.sdk_scheme import seal
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.base64s import decode64, encode64
from embedmesh.settings import store_path
from embedmesh.storage.books.accounts import Account
from embedmesh.storage.ledger.check import CheckReport

COMMAND = (sys.executable, "-m", "embedmesh")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WIDTH = 384
MARK = "EMBEDMESH_STORY_MARK"

READY_S = 60.0  # 1.3 s when quiet; a cold disk and a busy machine may take ten times that
ASKING_S = 6.0  # who asks whether it is back asks again after this
REQUEST_S = 60.0  # the longest request of a story takes some seconds
STOP_S = 45.0  # `serve` gives the gateway 35 s and then the node 10 s
SETTLE_S = 30.0  # a capture commits in a few milliseconds, an idle tab is closed after some seconds
COMMAND_S = 60.0  # the longest command of a story takes some seconds
POLL_S = 0.02

T = TypeVar("T")
Vectors = NDArray[np.float32]
SAME = 1e-6  # what a vector may differ by when its text shares a batch


def wait_until(what: str, look: Callable[[], T | None], within_s: float) -> T:
    """The first true value of `look`; AssertionError naming `what` when it takes too long."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(POLL_S)
    return found


def run(*arguments: object, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`embedmesh ARGUMENTS`, run to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=COMMAND_S,
        env=os.environ | environment,
        check=False,
    )


def run_json(*arguments: object, **environment: str) -> Any:
    """What `embedmesh ARGUMENTS --json` says; it must end well.

    In this process: to start one takes half a second of CPU, and `run` tries that often enough.
    """
    done = CliRunner(env=environment).invoke(cli, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    return json.loads(done.stdout)


class Endpoint:
    """One `embedmesh serve`. `base_url` and the keys are known once `wait_ready` has returned."""

    def __init__(self, data_dir: Path, *arguments: object, as_json: bool = True, **environment: str) -> None:
        self.data_dir = data_dir
        self.said = data_dir.with_name(data_dir.name + ".out")
        self.log = data_dir.with_name(data_dir.name + ".log")
        self._mark = f"{MARK}={uuid.uuid4().hex}".encode()
        given = ["serve", "--data-dir", data_dir, *arguments, *(["--json"] if as_json else [])]
        if "--port" not in arguments:
            given += ["--port", "0"]
        self.began = time.monotonic()
        with self.said.open("wb") as said, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, given)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=log,
                env=os.environ | environment | {MARK: self._mark.decode().partition("=")[2]},
                start_new_session=True,
            )

    def wait_ready(self, sign: str = '"ready"') -> "Endpoint":
        """Wait until it has said so, and read where it is."""
        try:
            wait_until("embedmesh serve is ready", lambda: self._ended() or sign in self.said.read_text(), READY_S)
            assert self.process.poll() is None, f"embedmesh serve ended: {self.log.read_text()}"
        except BaseException:
            self.kill_all()
            raise
        self.ready_s = time.monotonic() - self.began
        told = json.loads((self.data_dir / "bootstrap.json").read_bytes())
        self.base_url: str = told["base_url"]
        self.root = self.base_url.removesuffix("/v1")
        self.api_key: str = told["api_key"]
        self.admin_key: str = told["admin_key"]
        self.http = httpx.Client(headers={"Authorization": f"Bearer {self.api_key}"}, timeout=REQUEST_S)
        return self

    def use_up(self, public_key: str, lock: int) -> None:
        """End a lock by a request that the node refuses: its money is free at once."""
        sealed, _ = seal(b"{}", decode64(public_key, 32))
        body = {
            "ciphertext": encode64(sealed.ciphertext),
            "client_dh_public_key": encode64(sealed.client_key),
            "model_name": MODEL,
            "node_dh_public_key": public_key,
            "nonce": encode64(sealed.nonce),
            "plaintext_body_hash": encode64(sealed.body_hash),
            "salt": encode64(sealed.salt),
            "stack_small_id": lock,
        }
        refused = self.http.post(f"{self.base_url}/confidential/embeddings", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "confidential_refused")

    # -- its HTTP ----------------------------------------------------------------------------------------------------

    def ask(self, *, headers: Mapping[str, str] | None = None, **members: object) -> httpx.Response:
        """`POST /v1/embeddings` with these members, on a connection that is kept."""
        return self.http.post(f"{self.base_url}/embeddings", json={"model": MODEL, **members}, headers=headers)

    def embed(self, texts: str | Sequence[str], **members: Any) -> Vectors:
        """The vectors of texts, shape (texts, width); the reply must be a 200."""
        reply = self.ask(input=texts if isinstance(texts, str) else list(texts), **members)
        assert reply.status_code == 200, reply.text
        return np.array([item["embedding"] for item in reply.json()["data"]], np.float32)

    def answers(self) -> bool:
        """Whether a short request, on a new connection, gets its vector now. No other failure than a 503 is allowed."""
        try:
            reply = httpx.post(
                f"{self.base_url}/embeddings",
                json={"model": MODEL, "input": "are you back?"},
                headers={"Authorization": f"Bearer {self.api_key}"},
                timeout=ASKING_S,
            )
        except httpx.TransportError:
            return False  # its connection was to the gateway that died
        assert reply.status_code in (200, 503), reply.text
        assert reply.status_code == 200 or reply.headers["retry-after"]
        return reply.status_code == 200

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        """GET a path under the root, with a key or with none, on a connection of its own."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(self.root + path, headers=headers, timeout=REQUEST_S)

    def metric(self, name: str) -> float:
        """One number of /metrics, by its name with its labels; 0 for one that was never counted."""
        lines = self.get("/metrics", self.admin_key).text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)

    # -- its books ---------------------------------------------------------------------------------------------------

    def account(self, account_id: str = "local") -> Account:
        """An account once nothing of it is held any more: all that was charged for is written down."""

        def settled() -> Account | None:
            account = books.accounts.find(account_id)
            return account if account.held_nanousd == 0 else None

        with open_books(self.data_dir, store_path(self.data_dir)) as books:
            try:
                return wait_until(f"nothing of {account_id} is held", settled, SETTLE_S)
            except AssertionError as late:
                raise AssertionError(f"{late}; {self._held()}; {self.log.read_text()[-2_000:]}") from None

    def wait_held(self, account_id: str = "local") -> None:
        """Wait until money is held for a request of an account: then a node is asked."""
        with open_books(self.data_dir, store_path(self.data_dir)) as books:
            wait_until("money is held", lambda: books.accounts.find(account_id).held_nanousd > 0, SETTLE_S)

    def _held(self) -> str:
        """What is held yet, row by row: for whoever reads a failure."""
        looked = [
            "SELECT * FROM holds WHERE state = 'open'",
            "SELECT * FROM tabs WHERE ended_ms IS NULL",
        ]
        with contextlib.closing(sqlite3.connect(f"file:{store_path(self.data_dir)}?mode=ro", uri=True)) as store:
            return f"{[store.execute(sql).fetchall() for sql in looked]} at {int(time.time() * 1000)}"

    def check_ledger(self) -> CheckReport:
        """What `ledger check --offline` asks; every promise must be kept."""
        with open_books(self.data_dir, store_path(self.data_dir)) as books:
            report = books.check()
        assert report.ok, report.broken
        return report

    # -- its processes -----------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Its living processes: pid -> serve, gateway, node or worker."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = _role((folder / "cmdline").read_text().split("\0"))
        return found

    def pid(self, role: str) -> int | None:
        """The process of that role, or None while there is none."""
        return next((pid for pid, found in self.processes().items() if found == role), None)

    def resident_mb(self, role: str) -> float:
        """Resident memory of a process in MB."""
        status = Path(f"/proc/{self.pid(role)}/status").read_text()
        return next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmRSS:"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit code. Nothing of it may be left running, and no bug may be in its log."""
        self.process.send_signal(number)
        code = self.process.wait(STOP_S)
        log = self.log.read_text()
        assert self.processes() == {}, log
        assert "Traceback" not in log, log
        assert "internal error" not in log, log
        return code

    def kill_all(self) -> None:
        """End whatever is left of it."""
        if hasattr(self, "http"):
            self.http.close()
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()  # or it stays in the process table
        self.process.wait()

    def _ended(self) -> bool:
        return self.process.poll() is not None


def _role(arguments: Sequence[str]) -> str:
    if "embedmesh.engine.worker" in arguments:
        return "worker"
    return arguments[arguments.index("embedmesh") + 1] if "embedmesh" in arguments else arguments[0]
