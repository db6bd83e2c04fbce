"""Real servers of other makes as nodes of ours, checked from outside: `python -m bench.upstreams [--only NAME ...]`.

Each is added with `embedmesh nodes add` to a running `serve`, whose own node is the truth. Then: are vectors the same,
are its batch limit and its key respected, does it agree with canaries, is no request lost when it dies?
"""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.rig import install
from bench.rig.command import CannotRun, bench, check_names, model_folder, say
from bench.rig.corpus import corpus
from bench.rig.http import MODEL, Reply, Vectors
from bench.rig.install import HOME, NotInstalled, healthy
from bench.rig.live import Live, serving
from bench.rig.processes import HOST, Process, free_port, meanwhile
from bench.upstreams.gguf import convert
from bench.upstreams.rerank import catalogue_of, model_for, rerank_checks

RERANKS = "-reranks"
NAMES = ("infinity", "llamacpp", f"infinity{RERANKS}", f"llamacpp{RERANKS}")
BATCH = 16
TEXTS = 60
CALLERS = 4
EXACT, CLOSE = 1e-5, 2e-3  # of a component: float32 as ours; llama.cpp's GELU is a table of half floats
START_S = 90.0  # infinity imports torch
STOP_S = 5.0  # llama.cpp never answers what is running when it is stopped
KEY = "upstream-secret"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
ENVIRONMENT |= {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "INFINITY_API_KEY": KEY}


class Check(msgspec.Struct, frozen=True):
    """One thing that was checked."""

    what: str
    found: str
    right: bool


class Figures(msgspec.Struct, frozen=True):
    """The checks by server."""

    servers: dict[str, list[Check]]

    @property
    def broken(self) -> list[str]:
        """What was wrong, in words."""
        return [f"{name}: {each.what}" for name, checks in self.servers.items() for each in checks if not each.right]


@contextmanager
def running(name: str, model: Path, folder: Path, *, reranks: bool = False) -> Iterator[tuple[Process, int]]:
    """`infinity` or `llamacpp`, with one thread and a key, on a model folder; and its port. Raises NotInstalled."""
    port = free_port()
    if name == "infinity":
        more = () if reranks else ("--url-prefix", "/v1")  # its form of rerank is found wherever it is
        command = install.infinity(model, "theirs", port, *more)
    else:
        python, gguf = install.install("xllamacpp"), (folder if reranks else HOME) / f"{model.name}.gguf"
        if not gguf.exists():
            convert(model, gguf)
        command = [str(python), str(Path(__file__).with_name("llamacpp.py")), str(gguf), str(port), KEY]
        command += ["reranks"] if reranks else []
    process = Process(command, folder / f"{name}.log", environment=ENVIRONMENT, stop_s=STOP_S)
    with healthy(process, port, START_S):
        yield process, port


def add(live: Live, name: str, port: int, key_file: Path) -> dict[str, Any]:
    """`nodes add`; what it says of the node."""
    theirs = f"{MODEL}=theirs" if name == "infinity" else MODEL
    options = ("--name", name, "--model", theirs, "--batch", str(BATCH), "--token-file", str(key_file))
    done = live.command("nodes", "add", f"http://{HOST}:{port}", *options)
    return dict(msgspec.json.decode(done.stdout)) if done.stdout else {"state": done.stderr, "last_failure": ""}


def embed(live: Live, texts: Sequence[str]) -> Reply:
    """A reply for the texts, in base64."""
    with live.wire() as wire:
        return wire.ask(live.embed({"input": texts, "encoding_format": "base64"}))


def checks(live: Live, name: str, process: Process, port: int, folder: Path) -> Iterator[Check]:
    """All of it, for one server."""
    texts = [*corpus("S", TEXTS // 2), *corpus("M", TEXTS // 2)]
    truth = embed(live, texts)
    key_file, wrong_file = folder / "key", folder / "wrong"
    key_file.write_text(KEY)
    wrong_file.write_text("not-" + KEY)
    refused = add(live, name, port, wrong_file)
    yield Check("a wrong token", str(refused["last_failure"]), refused["state"] != "ready")
    added = add(live, name, port, key_file)
    yield Check("added", str(added["state"]), added["state"] == "ready")
    live.command("nodes", "drain", "local")
    try:
        reply = embed(live, texts)
        if reply.status != 200:
            raise CannotRun(f"{name}: {reply.outcome}")
        off = _difference(reply.vectors(), truth.vectors())
        allowed = EXACT if name == "infinity" else CLOSE
        yield Check(f"{TEXTS} texts, at most {BATCH} a call", f"off by {off:.1e}", off <= allowed)
        nodes = reply.headers["x-embedmesh-node"]
        yield Check("made by", nodes, nodes == name)
        counted, ours = (each.json()["usage"]["prompt_tokens"] for each in (reply, truth))
        yield Check("tokens are ours", f"{counted}", counted == ours)
    finally:
        live.command("nodes", "resume", "local")
    node = msgspec.json.decode(live.command("nodes", "show", name).stdout)
    canaries = node["canaries"]
    yield Check("canaries", f"{canaries}", canaries["failed"] == 0 and node["quarantined"] is None)
    lost = requests_lost(live, process, texts)
    yield Check("requests lost when it is killed", str(lost), lost == 0)


def _difference(ours: Vectors, theirs: Vectors) -> float:
    return float(np.abs(ours - theirs).max())


def requests_lost(live: Live, process: Process, texts: Sequence[str]) -> int:
    """Requests that fail while the server is killed under them."""
    failed: list[str] = []

    def call(stop: threading.Event) -> None:
        at = 0
        while not stop.is_set():
            at += 1
            if (outcome := embed(live, [texts[at % len(texts)]]).outcome) != "200":
                failed.append(outcome)

    with meanwhile(*[call] * CALLERS):
        time.sleep(2)
        process.kill()
        time.sleep(3)
    return len(failed)


def _rerank(name: str, folder: Path) -> list[Check]:
    model, key_file = model_for(name, folder), folder / "key"
    key_file.write_text(KEY)
    options = ("--catalogue", str(catalogue_of(model, folder)))
    with running(name, model, folder, reranks=True) as (_, port), serving(options) as live:
        return [Check(*found) for found in rerank_checks(live, name, port, model, key_file)]


def measure(only: Sequence[str] = NAMES) -> Figures:
    """All servers, one after the other."""
    check_names(only, NAMES)
    model, found = model_folder(), {}
    for name in only:
        say(f"{name}: installing (once) and starting")
        with tempfile.TemporaryDirectory(prefix="embedmesh-upstreams-") as folder:
            try:
                if name.endswith(RERANKS):
                    found[name] = _rerank(name.removesuffix(RERANKS), Path(folder))
                    continue
                with running(name, model, Path(folder)) as (process, port), serving() as live:
                    found[name] = list(checks(live, name, process, port, Path(folder)))
            except NotInstalled as why:
                found[name] = [Check("installed", str(why), False)]
    return Figures(found)


if __name__ == "__main__":
    bench(measure, only=f"of {', '.join(NAMES)}")
