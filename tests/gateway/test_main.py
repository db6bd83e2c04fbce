"""How a gateway is put together, and how it ends."""

import asyncio
import fcntl
import gc
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import embedmesh
from embedmesh.gateway.build import build
from embedmesh.gateway.main import Ending, open_store, run, stop
from embedmesh.gateway.models import Models
from embedmesh.gateway.parts import Gateway
from embedmesh.process import EXIT_OK
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError
from embedmesh.settings import GatewaySettings, store_path
from embedmesh.storage.books.new_keys import NewKeys
from tests.flow.world import CATALOGUE, LetterTokenizer
from tests.http.raw import request, send

PACKAGE = Path(embedmesh.__file__).parent
ROOMS = ("gateway", "fleet", "flow", "http", "signing", "storage")


ASSIGNMENT = re.compile(r"^[ \t]*((?!self\.\w+\b(?!\.))\w[\w.]*\.\w+(?:: [^=\n]+)? = (.+))$", re.MULTILINE)
"""To an attribute of another object than `self`. Not by `ast`: in CPython 3.11 that fails in a process that has met a
RecursionError, as other tests do."""


def wirings(source: str, *, any_value: bool = False) -> Iterator[str]:
    """Assignments of a function to an attribute of another object; with `any_value`, of anything."""
    functions = {
        name if not indent else f"self.{name}"
        for indent, name in re.findall(r"^( *)(?:async )?def (\w+)", source, re.M)
    }
    for found in ASSIGNMENT.finditer(source):
        value = found[2]
        is_function = value.startswith("lambda") or "partial(" in value or value in functions
        if any_value or is_function:
            yield found[1]


EXAMPLES = [
    ("registry.on_change = lambda: None", ["registry.on_change = lambda: None"]),
    ("def f(): ...\nmembers.prove = f", ["members.prove = f"]),
    ("class A:\n def g(self):\n  b.on_end = self.g", ["b.on_end = self.g"]),
    ("class A:\n def g(self):\n  self.b.on_end = self.g", ["self.b.on_end = self.g"]),
    ("a.b = functools.partial(print, 1)", ["a.b = functools.partial(print, 1)"]),
    ("class A:\n def __init__(self, call):\n  self.call = call", []),
    ("class A:\n def call(self): ...\n def g(self):\n  self.once = self.call", []),
    ("node.draining = record.draining", []),
]


@pytest.mark.parametrize(("source", "found"), EXAMPLES)
def test_a_wiring_is_recognised(source: str, found: list[str]) -> None:
    assert list(wirings(source)) == found


@pytest.mark.parametrize("room", ROOMS)
def test_no_part_gets_a_callback_after_its_construction(room: str) -> None:
    found = {str(path): list(wirings(path.read_text())) for path in (PACKAGE / room).rglob("*.py")}
    assert found, "the room has moved"
    assert {path: words for path, words in found.items() if words} == {}


@pytest.mark.parametrize("module", ["build", "main"])
def test_the_composition_root_sets_no_attribute(module: str) -> None:
    source = (PACKAGE / "gateway" / f"{module}.py").read_text()
    assert list(wirings(source, any_value=True)) == []


# -- how it ends -------------------------------------------------------------------------------------------------------

MODELS = Models(CATALOGUE, {model.id: LetterTokenizer() for model in CATALOGUE.models}, frozenset())


@pytest.fixture(autouse=True)
def garbage() -> Iterator[None]:
    """A gateway that runs has settings of its own for it."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)  # what it has frozen stays so, with all that tests import: no collection looks at it


def told_to_stop(gateway: Gateway, ending: Ending) -> None:
    ending.stop_event.set()


def store_lost(gateway: Gateway, ending: Ending) -> None:
    ending.store_lost("fsync failed")


def probes_ended(gateway: Gateway, ending: Ending) -> None:
    gateway.fleet.connected.broken.set_exception(RuntimeError("a bug"))


@pytest.mark.parametrize(("event", "exit_code"), [(told_to_stop, EXIT_OK), (store_lost, 70), (probes_ended, 70)])
async def test_it_serves_until_something_ends_it(
    event: Callable[[Gateway, Ending], None], exit_code: int, tmp_path: Path
) -> None:
    """And closes all its parts, whatever it was: another gateway can open the store at once."""
    for _ in range(2):
        settings = GatewaySettings(data_dir=tmp_path)
        ending, clock = Ending(settings), SystemClock()
        store = await open_store(settings, clock, ending)
        assert store is not None
        gateway = build(settings, MODELS, store, clock)
        gateway.runner.counts.on_bug()
        assert b"\nembedmesh_internal_errors_total 1.0\n" in gateway.app.metrics.text(), "one that a batch has met"
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        port = listener.getsockname()[1]
        running = asyncio.create_task(run(gateway, listener, NewKeys(), ending, local_nodes=False))
        async with asyncio.timeout(30):
            await asyncio.wait([running], timeout=0.2)
            assert (await send(port, request("GET", "/health", b"", key=None))).status == 200
            event(gateway, ending)
            tasks = await running
            await stop(gateway, tasks, drain_s=0.0)
        assert ending.exit_code == exit_code
        assert all(task.done() for task in tasks)
        with pytest.raises(ConnectionRefusedError):
            await send(port, request("GET", "/health", b"", key=None))


async def test_files_give_up_while_a_drain_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time is not added to that of the drain: `serve` waits for both together."""
    for module in ("gateway.main", "jobs.files"):
        monkeypatch.setattr(f"embedmesh.{module}.CLOSE_S", 0.05)
    settings = GatewaySettings(data_dir=tmp_path)
    store = await open_store(settings, SystemClock(), Ending(settings))
    assert store is not None
    gateway = build(settings, MODELS, store, SystemClock())
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(each) for each in gateway.background]
    cut = asyncio.Event()

    async def drain(timeout_s: float) -> None:
        await asyncio.wait_for(cut.wait(), 30)

    monkeypatch.setattr(gateway.files.folder.backend, "cut", cut.set)
    monkeypatch.setattr(gateway.app.server, "drain", drain)
    await stop(gateway, tasks, drain_s=0.1)


async def test_told_to_stop_while_another_gateway_is_alone_with_the_store_it_leaves(tmp_path: Path) -> None:
    settings = GatewaySettings(data_dir=tmp_path)
    with Path(f"{store_path(tmp_path)}.lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ending = Ending(settings)
        opening = asyncio.create_task(open_store(settings, SystemClock(), ending))
        await asyncio.wait([opening], timeout=0.2)
        assert not opening.done()
        ending.stop_event.set()
        async with asyncio.timeout(30):
            assert await opening is None


async def test_a_setting_that_cannot_be_parsed_is_named(tmp_path: Path) -> None:
    """With what to correct, before anything runs."""
    clock = SystemClock()
    store = await open_store(settings := GatewaySettings(data_dir=tmp_path), clock, Ending(settings))
    assert store is not None
    for wrong, option in (
        (GatewaySettings(data_dir=tmp_path, node_networks=("10.0.0.1/8",)), "node-networks"),
        (GatewaySettings(data_dir=tmp_path, cors_origin=("x",)), "cors-origin"),
        (GatewaySettings(data_dir=tmp_path, nodes=("http://x",)), "nodes"),
    ):
        with pytest.raises(SetupError, match=f"Mend --{option}"):
            build(wrong, MODELS, store, clock)
    await store.close()
