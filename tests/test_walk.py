"""The walk of a request: which file of embedmesh calls which, in order, from the accepting socket to the last byte.

Real requests go over real sockets through a real gateway with a real store to a node that is played by hand, under a
profiler: an ordinary one, which goes straight, and one of the hard way. docs/life-of-a-request.md has the walk of the
first as two tables, docs/life-of-a-hard-request.md that of the other. To write them:
`python -m tests.test_walk --write`.

A *step* is the first time that a file is entered, from another one. rules/ and the modules beside the rooms are left
out: every room uses them. What goes through a *port* is no step: it comes back to its caller, and what happens inside
is its own. Ports are those of rules/ports.py and
rules/forwarding.py and rules/straight.py, the exchange that http/ hands in, and what the gateway hands to the flow.
"""

import asyncio
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

import embedmesh
from embedmesh.fleet.load import Load
from embedmesh.fleet.registry import Node
from embedmesh.gateway.nodes.coalesce import CoalescingLink
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.http.exchange import Exchange
from embedmesh.rules import forwarding, ports, straight
from embedmesh.rules.embeddings import EmbedIds, EmbedVectors, unpack_ids
from embedmesh.rules.spending import TabSize
from embedmesh.upstream.pools import unix_pool
from tests.flow.world import CATALOGUE, right_reply
from tests.gateway.mesh import gateway
from tests.http.raw import request, send

PACKAGE = str(Path(embedmesh.__file__).parent) + "/"
DOCS = Path(__file__).parent.parent / "docs"
PAGES = {True: DOCS / "life-of-a-request.md", False: DOCS / "life-of-a-hard-request.md"}  # by whether it goes straight
FROM, TO = "## Which file calls which", "\n## "
LOOP = "the event loop"
START = "http/"  # where the loop calls when a connection is made, or has bytes
NODE = "upstream/http1.py"  # the same for a node's; on the straight way nothing waits there
HANDED_IN = {
    "receive",
    "deliver",
    "on_model",
    "spend",
    "has_tab",
    "TabKeeper.capture",
    "try_now",
    "answered_now",
}  # by the store, the fleet
PROTOCOLS: dict[str, frozenset[str]] = {
    name: frozenset(member for member in vars(port) if not member.startswith("_"))
    for name, port in (vars(ports) | vars(forwarding) | vars(straight) | {"Exchange": Exchange}).items()
    if isinstance(port, type) and getattr(port, "_is_protocol", False) and name != "Protocol"
}
WALKED_STRAIGHT = {
    *vars(straight),
    "AttemptOwner",
    "Observer",
}  # the last looks like the one before: ports through which the straight walk itself leads

Steps = list[tuple[str, str]]
Ports = list[tuple[str, str, str]]


class Walk:
    """What a profiler saw: `steps` are (file, entered from), `ports` are (port, called from, answered by)."""

    def __init__(self, *, is_straight: bool) -> None:
        self.starts = (START, NODE) if is_straight else (START,)
        self.ports_of = {
            name: members for name, members in PROTOCOLS.items() if not (is_straight and name in WALKED_STRAIGHT)
        }
        self.steps: Steps = []
        self.calls: set[tuple[str, str]] = set()  # (caller, file): each that was made, not only the first of a file
        self.ports: Ports = []
        self._frames: dict[FrameType, bool] = {}  # each is seen again when its coroutine goes on; True: on the walk

    def saw(self, frame: FrameType, event: str, _: Any) -> None:
        """The profiler's callback."""
        if event != "call" or frame in self._frames or (file := file_of(frame)) is None:
            return
        above = frame.f_back
        while above is not None and file_of(above) is None:
            above = above.f_back
        if above is None:
            self._frames[frame] = file.startswith(self.starts)
            if file.startswith(self.starts):
                self.note(file, LOOP)
            return
        caller = file_of(above)
        assert caller is not None
        walking = self._frames.get(above, False)
        if walking and caller != file and not is_everybodys(file):
            port = port_of(frame, self.ports_of)
            if port is not None:
                walking = False
                self.ports += [(port, caller, file)] if (port, caller, file) not in self.ports else []
            elif not is_everybodys(caller):
                self.note(file, caller)
        self._frames[frame] = walking

    def note(self, file: str, caller: str) -> None:
        self.calls.add((caller, file))
        if file not in (known for known, _ in self.steps):
            self.steps.append((file, caller))


def file_of(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    return name.removeprefix(PACKAGE) if name.startswith(PACKAGE) else None


def is_everybodys(file: str) -> bool:
    return file.startswith("rules/") or "/" not in file


def port_of(frame: FrameType, ports_of: dict[str, frozenset[str]]) -> str | None:
    """The port that is called: its method, of an object that has all of the port's methods, or what is handed in."""
    code = frame.f_code
    if code.co_name in HANDED_IN or code.co_qualname in HANDED_IN:
        return code.co_name
    if not code.co_argcount or code.co_varnames[0] != "self":
        return None
    has = set(dir(frame.f_locals["self"]))
    return next((name for name, methods in ports_of.items() if code.co_name in methods and methods <= has), None)


@contextmanager
def recorded(*, is_straight: bool) -> Iterator[Walk]:
    walk = Walk(is_straight=is_straight)
    before = sys.getprofile()
    sys.setprofile(walk.saw)
    try:
        yield walk
    finally:
        sys.setprofile(before)


async def answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    reply: Callable[[list[list[int]]], EmbedVectors] = right_reply,
) -> None:
    """A node, played by hand: it answers one call after another."""
    while head := await read_head(reader):
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length is not None
        ids = unpack_ids(msgspec.msgpack.decode(await reader.readexactly(int(length[1])), type=EmbedIds))
        body = msgspec.msgpack.encode(reply(ids))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    writer.close()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


async def walk_of_a_request(*, is_straight: bool) -> Walk:
    """Of the second request: what is made once, and then kept, is made for the first."""
    with tempfile.TemporaryDirectory(prefix="embedmesh-") as folder:
        path = str(Path(folder) / "node.sock")
        server = await asyncio.start_unix_server(answer, path)
        async with gateway(Path(folder)) as gw:
            gw.registry.answered_right(gw.registry.add(Node("n0", f"unix:{path}")), [m.id for m in CATALOGUE.models])
            load = Load()
            load.fit.fixed_s = 0.0  # a quick node, for which calls are not shared
            gw.clients.add("n0", CoalescingLink(OwnLink(unix_pool(path), gw.clock), load))
            token = gw.key("embeddings")
            more = b"" if is_straight else b',"dimensions":3'
            raw = request(body=b'{"model":"tiny","input":["ab","c"]%s}' % more, key=token)
            assert (await send(gw.port, raw)).status == 200
            keeper, caller = gw.store.tabs, await gw.store.keys.find(token)
            assert caller is not None
            if is_straight:
                watching = asyncio.ensure_future(keeper.watch())
                await asyncio.sleep(0)
                keeper._want(caller.account_id, caller.key_id, TabSize(10**6, 1))
                async with asyncio.timeout(20):
                    while not keeper._open:
                        await asyncio.sleep(0.01)
                watching.cancel()  # it would be on the walk
                await asyncio.gather(watching, return_exceptions=True)
                keeper._spendable = keeper._open
            with recorded(is_straight=is_straight) as walk:
                assert (await send(gw.port, raw)).status == 200
                await asyncio.sleep(0.05)  # until it is charged
        server.close()
    return walk


@pytest.fixture(scope="module")
def walks() -> dict[bool, Walk]:
    return {way: asyncio.run(walk_of_a_request(is_straight=way)) for way in PAGES}


def tables(text: str) -> tuple[Steps, Ports]:
    """The rows of the page's two tables."""
    rows = [re.findall(r"`([^`]+)`|(the event loop)", line) for line in text.splitlines() if line.startswith("| ")]
    cells = [tuple(code or words for code, words in row) for row in rows]
    steps = [(cell[0], cell[1]) for cell in cells if len(cell) == 2 and cell[0].endswith(".py")]
    return steps, [(cell[0], cell[1], cell[2]) for cell in cells if len(cell) == 3]


@pytest.mark.parametrize("is_straight", PAGES)
def test_the_page_says_how_a_request_walks(walks: dict[bool, Walk], is_straight: bool) -> None:
    text = PAGES[is_straight].read_text(encoding="utf-8").partition(FROM)[2].partition(TO)[0]
    steps, through = tables(text)
    assert walks[is_straight].steps == steps
    assert walks[is_straight].ports == through


def room_of(file: str) -> str:
    """The folder of a file; gateway/ is of several rooms."""
    return file.rpartition("/")[0]


def test_a_hard_request_climbs_back_up_nowhere_and_returns_to_no_room_that_it_has_left(walks: dict[bool, Walk]) -> None:
    """Each room is entered from one other room, which it never calls. To return to a caller is not to enter."""
    walk = walks[False]
    entered = list(dict.fromkeys(room_of(file) for file, _ in walk.steps))
    doors: dict[str, set[str]] = {room: set() for room in entered}
    for caller, file in walk.calls:
        if room_of(caller) != room_of(file):
            doors[room_of(file)].add(room_of(caller))
    assert {room: len(callers) for room, callers in doors.items()} == dict.fromkeys(entered, 1)
    first, *others = entered
    assert doors[first] == {""}, LOOP
    assert all(entered.index(caller) < entered.index(room) for room in others for caller in doors[room])


def drawn(walk: Walk) -> str:
    """The tables of a page."""
    lines = ["| file | entered from |", "|---|---|"]
    lines += [f"| `{file}` | {caller if caller == LOOP else f'`{caller}`'} |" for file, caller in walk.steps]
    lines += ["", "| port | called from | answered by |", "|---|---|---|"]
    lines += [f"| `{port}` | `{caller}` | `{file}` |" for port, caller, file in walk.ports]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.test_walk --write")
    for way, page in PAGES.items():
        before, _, rest = page.read_text(encoding="utf-8").partition(FROM)
        said, _, after = rest.partition(TO)
        words = said.partition("| file |")[0]
        new = drawn(asyncio.run(walk_of_a_request(is_straight=way)))
        page.write_text(before + FROM + words + new + (TO + after if after else ""), encoding="utf-8")
