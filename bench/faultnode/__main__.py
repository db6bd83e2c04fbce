"""A node that misbehaves: `python -m bench.faultnode --gateway URL --join TOKEN --data-dir D [--mode MODE]`."""

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop

from bench.faultnode.acts import AFTER
from bench.faultnode.modes import MODES, listed
from bench.faultnode.node import FaultNode, Settings
from bench.faultnode.openai import OpenAiForm
from bench.rig.processes import HOST
from embedmesh.catalogue import load_catalogue
from embedmesh.http.server import HttpServer
from embedmesh.process import EXIT_SETUP, bind, log_to_stderr, quieten_gc, raise_file_limit
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model

PR_SET_PDEATHSIG = 1


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = argparse.ArgumentParser(
        prog="python -m bench.faultnode",
        description="A node that joins and signs as ours does, and misbehaves on command.",
        epilog="modes:\n" + listed(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--gateway", default="", help="to join, as http://HOST:PORT")
    made.add_argument("--join", default="", help="join token; later starts need none")
    made.add_argument("--data-dir", type=Path, help="for its identity (default: a new one, removed in the end)")
    made.add_argument("--address", default="", help="https://127.0.0.1:PORT; without it the node dials out")
    made.add_argument("--openai-port", type=int, default=0, help="answer the public OpenAI form there, plain HTTP")
    made.add_argument("--models", nargs="+", default=[], help="of the built-in catalogue (default: the first)")
    made.add_argument("--mode", choices=MODES, default="honest", metavar="MODE", help="see below")
    made.add_argument("--share", type=float, default=1.0, help="of the requests that misbehave, by seeded dice")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--tokens-per-s", type=float, default=0.0, help="scripted speed (default: as fast as it goes)")
    made.add_argument("--fixed-ms", type=float, default=0.0, help="the time of a batch besides its tokens")
    made.add_argument("--fifo", action="store_true", help="one call after another; short ones do not pass long ones")
    made.add_argument("--slow-factor", type=float, default=10.0, help="of the modes slow and slow-start")
    made.add_argument("--after", type=int, default=AFTER, help="requests until `crash` and `wedge` happen")
    made.add_argument("--spare-probes", action="store_true", help="answer the gateway's known probe right in any mode")
    made.add_argument(
        "--control",
        action="store_true",
        help="read orders from standard input (`join`, `MODE [SHARE]`), answer each in JSON; end when it closes",
    )
    return made


def models_of(names: list[str]) -> list[Model]:
    """Models of the built-in catalogue. Raises SetupError."""
    catalogue = load_catalogue(None, assets=assets_dir())
    found = [catalogue.find(name) for name in names] or [catalogue.models[0]]
    if None in found:
        raise SetupError(f"The built-in catalogue has {', '.join(model.id for model in catalogue.models)}.")
    return [model for model in found if model is not None]


async def orders() -> asyncio.StreamReader:
    """Standard input, line by line."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def say(**what: object) -> None:
    """A line of JSON."""
    print(json.dumps(what), flush=True)


async def obey(node: FaultNode, joining: asyncio.Event) -> None:
    """Orders until standard input closes."""
    reader = await orders()
    say(ready=True, node_id=getattr(node, "node_id", None))
    while line := await reader.readline():
        match line.decode().split():
            case ["join"]:
                joining.set()
            case [mode] if mode in MODES:
                node.faults.order(mode)
            case [mode, share] if mode in MODES:
                node.faults.order(mode, float(share))
        say(requests=node.faults.requests, wrong=node.faults.wrong)


async def serve(options: Any, data_dir: Path) -> None:
    """Its life."""
    given = {name: getattr(options, name) for name in Settings._fields if hasattr(options, name)}
    settings = Settings(**given | {"data_dir": data_dir, "fixed_s": options.fixed_ms / 1000})
    stop, joining = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    node = FaultNode(settings, models_of(options.models))
    lives: list[Coroutine[Any, Any, object]] = [stop.wait()]
    if options.openai_port:
        await HttpServer(OpenAiForm(node.scripted).routes()).start(bind(HOST, options.openai_port))
    if options.control:
        lives.append(obey(node, joining))
    else:
        joining.set()
    if options.gateway:
        await node.listen()
        lives.append(node.run(joining))
    quieten_gc()
    tasks = [asyncio.create_task(each) for each in lives]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if options.gateway:
        await node.stop()
    for task in done:
        task.result()


def main(arguments: list[str]) -> int:
    """The command."""
    options: Any = parser().parse_args(arguments)
    if not options.gateway and not options.openai_port:
        print("Give --gateway URL --join TOKEN, or --openai-port PORT.", file=sys.stderr)
        return 2
    if options.control:  # a node that has stopped itself must not outlive the bench either
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log_to_stderr()
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="embedmesh-faultnode-") as folder:
        try:
            uvloop.run(serve(options, options.data_dir or Path(folder)))
        except SetupError as error:
            print(f"faultnode: {error}", file=sys.stderr)
            return EXIT_SETUP
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
