"""What stands between readers and the cheap node: nothing, our gateway, nginx as a plain proxy, or a router."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.gateway.measure import GATEWAY_CORE, OTHER_CORE
from bench.gateway.peers import START_S, nginx, sglang_router, vllm_router
from bench.generation.node import Spoken
from bench.generation.readers import Target, connected
from bench.rig.command import CannotRun, run_async
from bench.rig.http import Wire, http_request
from bench.rig.live import embedmesh
from bench.rig.processes import EMBEDMESH, HOST, Process, cpu_s, family_of, free_port, wait_for
from embedmesh.provision.bootstrap import bootstrap

DIRECT, OURS = "direct", "embedmesh"
ROUTERS = {"vllm-router": vllm_router, "sglang-router": sglang_router}
PEERS = {"nginx": nginx} | ROUTERS
MODEL = "bench/chat"
PARALLEL = 512  # streams of our only node
PROMPT_PRICE, OUTPUT_PRICE = 1_000_000, 3_000_000
CATALOGUE = f"""
[[models]]
id = "{MODEL}"
modalities = ["chat"]
max_tokens = 2_000_000
output_max = 1_024
price = {PROMPT_PRICE}
output_price = {OUTPUT_PRICE}
token_ids = "native"
"""


class Contender(NamedTuple):
    """One that answers."""

    name: str
    target: Target
    process: Process | None = None

    @property
    def cpu_s(self) -> float:
        """Processor seconds of all its processes, by the kernel's account."""
        return 0.0 if self.process is None else cpu_s(family_of(self.process.pid))

    @property
    def resident_kb(self) -> float:
        """Memory of its process."""
        assert self.process is not None
        words = dict(
            line.split(":") for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]
        )
        return float(words["Rss"].split()[0])


@contextmanager
def cheap_node(folder: Path) -> Iterator[tuple[int, int]]:
    """Its port, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "bench.generation.node", str(port)]
    with Process(command, folder / "node.log", core=OTHER_CORE) as process:
        if not wait_for(lambda: _answers(port), START_S, lambda: process.lives):
            raise CannotRun(f"the node does not start: {process.log_tail()}")
        yield port, process.pid
        process.kill()


@contextmanager
def started(name: str, folder: Path, node: int) -> Iterator[Contender]:
    """One contender, on its core. Raises NotInstalled, CannotRun."""
    if name == DIRECT:
        yield Contender(name, Target(node, "scripted"))
        return
    folder = folder / name
    folder.mkdir()
    with ExitStack() as stack:
        if name == OURS:
            process, target = _ours(stack, folder, node)
        else:
            peer = PEERS[name](folder, [node])
            target = Target(peer.port, "scripted")
            process = stack.enter_context(Process(peer.command, folder / "log", core=GATEWAY_CORE))
        wait_for(lambda: _streams(target), START_S, lambda: process.lives)
        yield Contender(name, target, process)


def _ours(stack: ExitStack, folder: Path, node: int) -> tuple[Process, Target]:
    """The gateway as it is, with money and a store on disk."""
    port, data_dir, catalogue = free_port(), folder / "data", folder / "models.toml"
    catalogue.write_text(CATALOGUE)
    credentials = bootstrap(data_dir, f"http://{HOST}:{port}/v1")
    command = [*EMBEDMESH, "gateway", "--data-dir", str(data_dir), "--port", str(port), "--catalogue", str(catalogue)]
    process = stack.enter_context(Process(command, folder / "log", core=GATEWAY_CORE))
    if not wait_for(lambda: _answers(port), START_S, lambda: process.lives):
        raise CannotRun(f"the gateway does not start: {process.log_tail()}")
    added = embedmesh(
        data_dir, "nodes", "add", f"http://{HOST}:{node}", "--model", f"{MODEL}=scripted", "--parallel", str(PARALLEL)
    )
    if added.returncode:
        raise CannotRun(f"no node: {added.stdout.decode()[-300:]} {process.log_tail()}")
    return process, Target(port, MODEL, credentials.api_key)


def _answers(port: int) -> bool:
    with Wire((HOST, port), 1.0) as wire:
        return wire.ask(http_request("GET", "/v1/models")).status > 0


def _streams(target: Target) -> bool:
    async def one() -> None:
        reader = await connected(target.port)
        try:
            await reader.ask(target.request(Spoken(2)))
        finally:
            reader.close()

    try:
        run_async(one())
    except RuntimeError:
        time.sleep(0.2)
        return False
    return True
