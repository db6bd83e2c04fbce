"""A whole gateway in this process, in front of a cheap node, with callers that ask all at once.

The gateway is put together as `embedmesh gateway` does it, over a real store and real sockets. Callers and node are on
its own event loop, and stand still while it works: it does the same from run to run, however busy the machine is.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from bench.gateway import ours
from bench.gateway.still_node import StillNode
from bench.gateway.still_time import StillLoop, still_clock
from bench.rig.command import model_folder
from bench.rig.heads import SDK_HEADERS
from bench.rig.http import MODEL, Reply, Wire, http_request
from bench.rig.processes import HOST
from embedmesh.gateway import build as building
from embedmesh.gateway.main import stop
from embedmesh.gateway.models import load_models
from embedmesh.gateway.network import listening_socket
from embedmesh.gateway.parts import Gateway
from embedmesh.provision.bootstrap import BOOTSTRAP_CREDIT_NANOUSD, bootstrap, open_books
from embedmesh.settings import GatewaySettings, secret_path, store_dsn
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.secrets.secret import load_secret
from embedmesh.storage.store import Store

Variant = Literal[
    "text", "inputs", "floats", "limits", "accounts", "nodes", "signed", "postgres"
]  # fmt: skip


class Case(NamedTuple):
    """What is not as in the plainest case."""

    words: str
    inputs: int = 1
    floats: bool = False
    limits: Limits = Limits()
    accounts: int = 1
    nodes: int = 1
    signed: bool = False


PLENTY = 10**9  # a minute: a limit that is counted and never reached
VARIANTS: dict[Variant, Case] = {
    "text": Case("one text, base64"),
    "inputs": Case("16 texts", inputs=16),
    "floats": Case("one text, floats", floats=True),
    "limits": Case("a key with limits a minute", limits=Limits(requests_a_minute=PLENTY, tokens_a_minute=PLENTY)),
    "accounts": Case("32 accounts", accounts=32),
    "nodes": Case("four nodes", nodes=4),
    "signed": Case("a node that signs", signed=True),
    "postgres": Case("PostgreSQL"),
}
BURST = 32  # requests at once, each on a connection of its own
DIFFERENT_BURSTS = 4  # then they come again
REQUESTS = DIFFERENT_BURSTS * BURST
RATE = 1_000.0  # requests a second, as time goes for the gateway
LOOK_S = 0.001  # of real time, in which whatever is under way comes
NODE_S = 0.002  # what a node takes, whatever it was asked
TIMERS_S = 0.002  # between two looks at the timers, while no node is asked
SETTLED_S, REPLY_S = 60.0, 70.0  # milliseconds, and some more under a tracer on a busy machine
VISITS = ("Prober.run", "Canaries.run")  # nodes are asked for requests' sake alone
SEED = 15
WORDS = (
    "the a library keeps copies of papers that people wrote about how small rivers change when cities grow along their "
    "banks and what farmers do with water in dry years some of it was measured by hand before there were instruments "
    "now sensors report temperature pressure and depth every hour while volunteers photograph birds fish and insects "
    "so that researchers can compare seasons over many decades and explain hydrology biogeochemistry sedimentation"
)
WORDS_A_TEXT = 26


def texts(count: int) -> list[str]:
    """Ordinary English, always the same, each text another: a few of the words are unknown to the vocabulary."""
    dice, words = Random(SEED), WORDS.split()
    return [" ".join(dice.choices(words, k=WORDS_A_TEXT)) for _ in range(count)]


class InProcess:
    """A running gateway. `ask` has BURST callers ask at once, and returns when all were answered and charged."""

    def __init__(
        self, gateway: Gateway, nodes: Sequence[StillNode], port: int, requests: Sequence[bytes], case: Case
    ) -> None:
        self.gateway = gateway
        self.background = {_name(each) for each in gateway.background}
        self._nodes = nodes
        self._requests = requests
        self._case = case
        self._turn = 0
        self._wires = [Wire((HOST, port), REPLY_S) for _ in range(BURST)]

    async def ask(self, steps: Callable[[], int]) -> None:
        """BURST requests. `steps` is how often the loop has done something for the gateway so far.

        Raises RuntimeError for an answer that is not right, or was not charged.
        """
        loop, store = asyncio.get_running_loop(), self.gateway.store
        assert isinstance(loop, StillLoop)
        charged, ends_s = store.stats.captured + BURST, loop.time() + BURST / RATE
        asked = []
        for wire in self._wires:  # all are there before the loop looks again
            asked.append((wire, wire.send(self._requests[self._turn % len(self._requests)])))
            self._turn += 1
        until_s = time.monotonic() + SETTLED_S
        while (store.stats.captured < charged or loop.time() < ends_s) and time.monotonic() < until_s:
            await store.drain()
            before = steps()
            await loop.pause(LOOK_S)
            if steps() != before:
                continue  # it has something to do yet
            if asked_nodes := [node for node in self._nodes if node.is_asked()]:
                loop.passes(NODE_S)
                for node in asked_nodes:
                    node.answer()
            else:
                loop.passes(loop.next_timer_s(TIMERS_S))
        right = sum(self._is_right(wire.receive(until)) for wire, until in asked)
        if right != BURST or store.stats.captured != charged:
            missing = charged - store.stats.captured
            raise RuntimeError(f"of {BURST} answers {right} are right; {missing} were not charged")

    def _is_right(self, reply: Reply) -> bool:
        return reply.status == 200 and len(reply.json()["data"]) == self._case.inputs

    def close(self) -> None:
        """Hang up."""
        for wire in self._wires:
            wire.close()


@asynccontextmanager
async def in_process(variant: Variant, dsn: str | None = None) -> AsyncIterator[InProcess]:
    """Started on a StillLoop, its node known as ready. `dsn`: of a new database, for `postgres`. Raises CannotRun."""
    model_folder()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, StillLoop)
    with tempfile.TemporaryDirectory(prefix="embedmesh-cost-") as name, ExitStack() as stack:
        folder, clock = Path(name), stack.enter_context(still_clock(loop))
        case = VARIANTS[variant]
        paths = [folder / f"node-{number}.sock" for number in range(case.nodes)]
        settings = GatewaySettings(
            data_dir=folder / "data", port=0, store=dsn or "", nodes=tuple(f"unix:{path}" for path in paths)
        )
        models = load_models(None)
        model = models.catalogue.models[0]
        listener = listening_socket(settings)
        port = listener.getsockname()[1]
        keys = _keys(settings, case, port)
        nodes = [StillNode(path, _vector(model.width), signed=case.signed) for path in paths]
        for still in nodes:
            stack.callback(still.close)
        stack.enter_context(_changed(case))
        secret = partial(load_secret, secret_path(settings.data_dir))
        store = await Store.open(store_dsn(settings), folder=settings.data_dir, clock=clock, secret=secret)
        gateway = building.build(settings, models, store, clock)
        running: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(each) for each in gateway.background if not _visits(each)
        ]
        await gateway.fleet.roster.reload()
        for node in gateway.fleet.registry:
            gateway.fleet.registry.answered_right(node, [model.id])
        await gateway.app.server.start(listener)
        made = InProcess(gateway, nodes, port, _requests(keys, case), case)
        loop.stand_still()
        try:
            yield made
        finally:
            loop.go_on()
            made.close()
            await stop(gateway, running, drain_s=1.0)


def _vector(width: int) -> bytes:
    vector = np.random.default_rng(SEED).standard_normal(width)
    return (vector / np.linalg.norm(vector)).astype("<f4").tobytes()


def _keys(settings: GatewaySettings, case: Case, port: int) -> list[str]:
    """Each of an account of its own, in a new store."""
    first = bootstrap(settings.data_dir, f"http://{HOST}:{port}/v1", settings.store or None).account
    accounts = [first, *(f"account-{number}" for number in range(1, case.accounts))]
    keys = []
    with open_books(settings.data_dir, store_dsn(settings)) as books:
        for account in accounts:
            if account != first:
                books.accounts.create(account)
                books.accounts.credit(account, BOOTSTRAP_CREDIT_NANOUSD, account)
            keys.append(books.keys.create(account, ["embeddings"], limits=case.limits)[1])
    return keys


def _requests(keys: Sequence[str], case: Case) -> list[bytes]:
    """Of the keys in turns."""
    given, requests = texts(REQUESTS * case.inputs), []
    for at in range(REQUESTS):
        several = given[at * case.inputs : (at + 1) * case.inputs]
        body = {
            "input": several if case.inputs > 1 else several[0],
            "model": MODEL,
            "encoding_format": "float" if case.floats else "base64",
        }
        key = keys[at % len(keys)]
        requests.append(http_request("POST", "/v1/embeddings", msgspec.json.encode(body), key=key, headers=SDK_HEADERS))
    return requests


def _visits(coroutine: Any) -> bool:
    """Whether it would ask nodes for its own sake; it is closed then."""
    if _name(coroutine) not in VISITS:
        return False
    coroutine.close()
    return True


def _name(coroutine: Any) -> str:
    return getattr(coroutine, "__qualname__", "")


@contextmanager
def _changed(case: Case) -> Iterator[None]:
    """The gateway of this case; in the end as it was."""
    before = vars(building).copy()
    if case.signed:
        ours.leave_out(ours.SIGNED)
    try:
        yield
    finally:
        vars(building).update(before)
