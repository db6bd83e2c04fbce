"""A node that misbehaves: `python -m bench.faultnode --gateway URL --join TOKEN --data-dir D [--mode MODE]`.

It joins and signs as ours does, and misbehaves on command.
"""

import argparse
import asyncio
import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import uvloop

from bench.faultnode.acts import AFTER, State
from bench.faultnode.modes import MODES, listed
from bench.faultnode.node import FaultNode, Faults, Scripted
from bench.faultnode.openai import OpenAiForm
from bench.faultnode.scripted import Pace
from bench.rig.command import CannotRun, check_names, given, options_of
from bench.rig.processes import HOST
from embedmesh.catalogue import load_catalogue
from embedmesh.fleet.examiner import PROBE_TEXT
from embedmesh.http.server import HttpServer
from embedmesh.logs.setup import start_logging
from embedmesh.process import EXIT_SETUP, bind, quieten_gc
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from embedmesh.system import raise_file_limit

PR_SET_PDEATHSIG = 1
HELP = {
    "gateway": "to join, as http://HOST:PORT",
    "join": "join token; later starts need none",
    "data_dir": "for its identity (default: a new one, removed in the end)",
    "address": "https://127.0.0.1:PORT; without it the node dials out",
    "openai_port": "answer the public OpenAI form there, plain HTTP",
    "models": "of the built-in catalogue (default: the first)",
    "mode": "see below",
    "share": "of the requests that misbehave, by seeded dice",
    "tokens_per_s": "scripted speed (default: no limit)",
    "fixed_ms": "the time of a batch besides its tokens",
    "fifo": "one call after another; short ones do not pass long ones",
    "slow_factor": "of the modes slow and slow-start",
    "after": "requests until `crash` and `wedge` happen",
    "spare_probes": "answer the gateway's known probe right in any mode",
    "control": "read orders from standard input (`join`, `MODE [SHARE]`), answer each in JSON; end when it closes",
}


def models_of(names: Sequence[str]) -> list[Model]:
    """Models of the built-in catalogue. Raises SetupError."""
    catalogue = load_catalogue(None, assets=assets_dir())
    found = [catalogue.find(name) for name in names] or [catalogue.models[0]]
    if None in found:
        raise SetupError(f"The built-in catalogue has {', '.join(model.id for model in catalogue.models)}.")
    return [model for model in found if model is not None]


def say(**what: object) -> None:
    """A line of JSON."""
    print(json.dumps(what), flush=True)


async def obey(node_id: str | None, faults: Faults, joining: asyncio.Event) -> None:
    """Orders until standard input closes."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say(ready=True, node_id=node_id)
    while line := await reader.readline():
        match line.decode().split():
            case ["join"]:
                joining.set()
            case [mode] if mode in MODES:
                faults.order(mode)
            case [mode, share] if mode in MODES:
                faults.order(mode, float(share))
        say(requests=faults.requests, wrong=faults.wrong)


async def serve(
    gateway: str = "",
    join: str = "",
    data_dir: Path | None = None,
    address: str = "",
    openai_port: int = 0,
    models: Sequence[str] = (),
    mode: str = "honest",
    share: float = 1.0,
    seed: int = 1,
    tokens_per_s: float = 0.0,
    fixed_ms: float = 0.0,
    fifo: bool = False,
    slow_factor: float = 10.0,
    after: int = AFTER,
    spare_probes: bool = False,
    control: bool = False,
) -> None:
    """Its life."""
    check_names([mode], list(MODES))
    stop, joining = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    faults = Faults(State(Random(seed), after=after, slow_factor=slow_factor))
    scripted = Scripted(models_of(models), Pace(tokens_per_s, fixed_ms / 1000, fifo=fifo), faults)
    if spare_probes:
        faults.spared = [each.ids([PROBE_TEXT])[0] for each in scripted.tokenizers.values()]
    faults.order(mode, share)
    lives: list[Coroutine[Any, Any, object]] = [stop.wait()]
    if openai_port:
        await HttpServer(OpenAiForm(scripted).routes()).start(bind(HOST, openai_port))
    with tempfile.TemporaryDirectory(prefix="embedmesh-faultnode-") as folder:
        node = FaultNode(scripted, data_dir or Path(folder), gateway, join, address) if gateway else None
        if node is not None:
            await node.listen()
            lives.append(node.run(joining))
        if control:
            lives.append(obey(node.node_id if node is not None else None, faults, joining))
        else:
            joining.set()
        quieten_gc()
        tasks = [asyncio.create_task(each) for each in lives]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if node is not None:
            await node.stop()
    for task in done:
        task.result()


def main() -> int:
    """The command."""
    made = options_of(serve, HELP)
    made.epilog, made.formatter_class = "modes:\n" + listed(), argparse.RawDescriptionHelpFormatter
    options = given(made)
    if not options.get("gateway") and not options.get("openai_port"):
        made.error("give --gateway URL --join TOKEN, or --openai-port PORT")
    if options.get("control"):  # a node that has stopped itself must not outlive the bench either
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    start_logging("faultnode")
    raise_file_limit()
    try:
        uvloop.run(serve(**options))
    except (SetupError, CannotRun) as error:
        print(f"faultnode: {error}", file=sys.stderr)
        return EXIT_SETUP
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)
