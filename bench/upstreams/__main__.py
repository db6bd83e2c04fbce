"""`python -m bench.upstreams [--only NAME ...]`: real servers of other makes as nodes of ours, checked from outside.

Each is added with `embedmesh nodes add` to a running `serve`, whose own node is the truth. Then: are vectors the same,
are its batch limit and its key respected, does it agree with canaries, is nobody's request lost when it dies?
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.corpus import corpus
from bench.engine.install import HOME, NotInstalled
from bench.fault.rig import HOST
from bench.live import Live, serving
from bench.upstreams.servers import KEY, Server, running
from tests.data import find_model_folder

NAMES = ("infinity", "llamacpp")
MODEL = "all-MiniLM-L6-v2"
BATCH = 16
TEXTS = 60
EXACT, CLOSE = 1e-5, 2e-3  # of a component: float32 as ours; llama.cpp's GELU is a table of half floats


class Line(NamedTuple):
    """One thing that was looked at."""

    what: str
    found: str
    right: bool


def embedmesh(live: Live, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, on the running gateway's data directory."""
    command = [sys.executable, "-m", "embedmesh", *arguments, "--data-dir", str(live.data_dir), "--json"]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def add(live: Live, server: Server, key_file: Path, *more: str) -> dict[str, Any]:
    """`nodes add`; what it says of the node."""
    theirs = f"{MODEL}=theirs" if server.name == "infinity" else MODEL
    done = embedmesh(
        live, "nodes", "add", f"http://{HOST}:{server.port}", "--name", server.name, "--model", theirs, "--batch",
        str(BATCH), "--token-file", str(key_file), *more,
    )  # fmt: skip
    return dict(msgspec.json.decode(done.stdout)) if done.stdout else {"state": done.stderr}


def ask(live: Live, texts: list[str], **more: Any) -> tuple[np.ndarray, str, dict[str, Any]]:
    """Vectors, the nodes that made them, and the whole reply. Raises RuntimeError."""
    with live.wire() as wire:
        reply = wire.ask(live.embed({"input": texts, **more}))
    if reply.status != 200:
        raise RuntimeError(f"{reply.status} {reply.body[:300]!r}")
    body = reply.json()
    return np.array([item["embedding"] for item in body["data"]], np.float32), reply.headers["x-embedmesh-node"], body


async def look(live: Live, server: Server, folder: Path) -> list[Line]:
    """All of it, for one server."""
    lines: list[Line] = []
    texts = [*corpus("S", TEXTS // 2), *corpus("M", TEXTS // 2)]
    truth, _, said = ask(live, texts)
    key_file, wrong_file = folder / "key", folder / "wrong"
    key_file.write_text(KEY)
    wrong_file.write_text("not-" + KEY)

    refused = add(live, server, wrong_file)
    lines.append(Line("a wrong token", str(refused["last_failure"]), refused["state"] != "ready"))
    added = add(live, server, key_file)
    lines.append(Line("added", str(added["state"]), added["state"] == "ready"))

    embedmesh(live, "nodes", "drain", "local")
    try:
        vectors, nodes, body = ask(live, texts)
        off = float(np.abs(vectors - truth).max())
        allowed = EXACT if server.name == "infinity" else CLOSE
        lines.append(Line(f"{TEXTS} texts, at most {BATCH} a call", f"off by {off:.1e}", off <= allowed))
        lines.append(Line("made by", nodes, nodes == server.name))
        counted = body["usage"]["prompt_tokens"]
        lines.append(Line("tokens are ours", f"{counted}", counted == said["usage"]["prompt_tokens"]))
    finally:
        embedmesh(live, "nodes", "resume", "local")

    shown = msgspec.json.decode(embedmesh(live, "nodes", "show", server.name).stdout)
    canaries = shown["canaries"]
    lines.append(Line("canaries", f"{canaries}", canaries["failed"] == 0 and shown["quarantined"] is None))
    lost = await dies(live, server, texts)
    lines.append(Line("requests lost when it is killed", str(lost), lost == 0))
    return lines


async def dies(live: Live, server: Server, texts: list[str]) -> int:
    """Requests that fail while the server is killed under them."""
    lost = 0
    done = asyncio.Event()

    def one(at: int) -> bool:
        try:
            ask(live, [texts[at % len(texts)]])
        except RuntimeError:
            return False
        return True

    async def caller() -> None:
        nonlocal lost
        at = 0
        while not done.is_set():
            at += 1
            lost += not await asyncio.to_thread(one, at)

    callers = [asyncio.create_task(caller()) for _ in range(4)]
    await asyncio.sleep(2)
    server.process.kill()
    await asyncio.sleep(3)
    done.set()
    await asyncio.gather(*callers)
    return lost


async def check(names: list[str], say: Callable[[str], None]) -> dict[str, list[Line]]:
    """Server -> what was found."""
    model = find_model_folder()
    if model is None:
        raise RuntimeError("the default model's files are not here; run `embedmesh setup`")
    found: dict[str, list[Line]] = {}
    HOME.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="embedmesh-upstreams-") as scratch:
        for name in names:
            say(f"{name}: installing (once) and starting")
            try:
                async with running(name, model) as server:
                    with serving() as live:
                        found[name] = await look(live, server, Path(scratch))
            except NotInstalled as why:
                found[name] = [Line("installed", str(why), False)]
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.upstreams", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    asked = parser.parse_args()
    console = Console()
    found = asyncio.run(check(asked.only, console.print))
    for name, lines in found.items():
        table = Table(title=name)
        for column in ("what", "found", ""):
            table.add_column(column)
        for line in lines:
            table.add_row(line.what, line.found, "ok" if line.right else "WRONG")
        console.print(table)
    wrong = [f"{name}: {line.what}" for name, lines in found.items() for line in lines if not line.right]
    console.print("All servers are good nodes." if not wrong else "Wrong: " + "; ".join(wrong) + ".")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
