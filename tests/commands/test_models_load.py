"""`embedmesh models load` at a terminal: how far the node is, until it is done."""

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import pytest

from embedmesh.engine.progress import STEPS

pytestmark = pytest.mark.story

LOADED = {"id": "large", "tier": "exact"}


@contextmanager
def node(path: Path) -> Iterator[None]:
    """It has loaded the model once it was asked for every step."""
    steps, done = iter(STEPS.items()), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "unix"

        def do_GET(self) -> None:
            at = next(steps, None)
            if at is None:  # the last one was told, and shown before this was asked
                done.set()
            step, percent = at or max(STEPS.items(), key=lambda item: item[1])
            self.reply({**LOADED, "loading": {"step": step, "percent": percent}})

        def do_POST(self) -> None:
            done.wait(60)
            self.reply(LOADED)

        def reply(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingUnixStreamServer(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def test_at_a_terminal_it_shows_the_steps(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "embedmesh", "models", "load", "large", "--node", str(tmp_path / "s")]
    with node(tmp_path / "s"):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:
            pass  # the other end is closed
        said, _ = run.communicate(timeout=60)
    assert said == "large is served now, in the tier exact.\n"
    for step in STEPS:
        assert f"the engine {step}".encode() in shown
