"""Installing and running them, each in an environment of its own under `.bench`."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.engine.install import HOME, install, install_one, python_of
from bench.fault.rig import HOST, free_port
from bench.health import healthy
from bench.upstreams.gguf import convert

XLLAMACPP = "xllamacpp==2026.10.11549"
START_S = 90.0  # infinity imports torch
STOP_S = 5.0  # llama.cpp never answers what is running when it is told to stop
KEY = "upstream-secret"


class Server(NamedTuple):
    """A running one."""

    name: str
    port: int
    process: asyncio.subprocess.Process


@asynccontextmanager
async def running(name: str, model: Path) -> AsyncIterator[Server]:
    """`infinity` or `llamacpp`, with one thread and a key, on a model folder. Raises NotInstalled."""
    port = free_port()
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    quiet |= {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "INFINITY_API_KEY": KEY}
    command = _infinity(model, port) if name == "infinity" else _llamacpp(model, port)
    with (HOME / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True
        )
    try:
        await healthy(port, process, START_S)
        yield Server(name, port, process)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            process.kill()
        await process.wait()


def _infinity(model: Path, port: int) -> list[str]:
    install("infinity")
    command = [str(python_of("infinity").with_name("infinity_emb")), "v2", "--model-id", str(model)]
    command += ["--served-model-name", "theirs", "--host", HOST, "--port", str(port), "--url-prefix", "/v1"]
    return [*command, "--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]


def _llamacpp(model: Path, port: int) -> list[str]:
    python = python_of("xllamacpp")
    install_one("xllamacpp", XLLAMACPP)
    gguf = HOME / f"{model.name}.gguf"
    if not gguf.exists():
        convert(model, gguf)
    return [str(python), str(Path(__file__).with_name("llamacpp.py")), str(gguf), str(port), KEY]
