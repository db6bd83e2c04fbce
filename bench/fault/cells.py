"""One bad node, or two, beside good ones: what is tried, and what is seen of each try."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.fault.figures import NEIGHBOURS, CellRow, Times, median_p99
from bench.fault.load import Load
from bench.faultnode.acts import PHASE_S
from bench.faultnode.modes import MODES
from bench.rig.fleet import Fleet, Node, Speed

BEFORE_S, AFTER_S, MORE_S = 1, 2, 5  # seconds of load: good nodes alone, the bad one out, and again if in doubt
CALM_S = 0.3  # that a new node works well before it is ordered not to
SETTLE_S = 0.3  # after it is out: what had been sent to it is sent to others
WATCH_S, WATCH_STAYS_S, WATCH_DEAD_S, WATCH_LIES_S = 8.0, 5.0, 16.0, 14.0  # how long we wait until it is out
LOOK_S = 0.05
GOOD, BAD = Speed(), Speed(24_000.0, 1.6)  # the bad one is faster, and so it gets work before the others
OUT = ("ejected", "quarantined")
PART = 0.3  # the share where not all requests are answered wrongly
DOUBT = 1.15  # p99 after over before: from here on it is looked at for longer


class Cell(NamedTuple):
    """One try: nodes in a mode, beside the trusted node and perhaps an honest one that is not trusted."""

    mode: str
    share: float = 1.0
    dials_out: bool = False
    copies: int = 1
    third: bool = False
    spare_probes: bool = False
    at_once: bool = False  # before it has joined, not once it works well

    @property
    def name(self) -> str:
        """For the table."""
        copies = f" x{self.copies}" if self.copies > 1 else ""
        more = ", spares probes" if self.spare_probes else ", from its start" if self.at_once else ""
        return self.mode + copies + more


def plan(only: Sequence[str], *, quick: bool) -> list[Cell]:
    """Every mode always; where it makes sense also for some requests, over the node's own connections; then pairs."""
    cells = [Cell(name, third=mode.family == "lies", at_once=mode.from_start) for name, mode in MODES.items()]
    if not quick:
        cells += [
            Cell(name, PART, dials_out=True, third=mode.family == "lies")
            for name, mode in MODES.items()
            if mode.in_part
        ]
        cells += [Cell(name, copies=2) for name in ("hang", "error-500", "wedge", "other-model")]
        cells += [Cell("reset", copies=2), Cell("busy-429", copies=3)]
        cells += [Cell("hang", spare_probes=True), Cell("error-500", spare_probes=True)]
        cells += [Cell(name, third=True, at_once=True) for name in ("other-model", "wrong-order", "lie-on-large")]
    if only:
        cells = [cell for cell in cells if cell.mode in only]
    return sorted(cells, key=lambda cell: cell.third)


@dataclass
class Seen:
    """What was seen of one bad node. Times on the loop's clock; `out_at` is the first time it got no work."""

    node: Node
    answers: int
    failures: Counter[str]
    out_at: float | None = None
    out_answers: int = 0
    became: str = ""
    last: dict[str, Any] = field(default_factory=dict)
    back: list[float] = field(default_factory=list)  # when it was seen to get work though it had been out


class Watch:
    """Looks at the bad nodes all the time."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._task: asyncio.Task[None] | None = None
        self.seen: list[Seen] = []

    async def start(self, nodes: Sequence[Node]) -> None:
        """From now on."""
        for node in nodes:
            found = await self._fleet.look(node)
            self.seen.append(Seen(node, found["answers"], Counter(found["failures"]), last=found))
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def all_out(self) -> bool:
        """Whether each of them has been out."""
        return all(seen.out_at is not None for seen in self.seen)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for seen in self.seen:
                found = await self._fleet.look(seen.node)
                seen.last = found
                if found["state"] not in OUT:
                    if seen.out_at is not None:
                        seen.back.append(loop.time())
                elif seen.out_at is None or (seen.became == "ejected" and found["state"] == "quarantined"):
                    seen.out_at, seen.became = loop.time(), found["state"]
                    seen.out_answers = found["answers"] - seen.answers
            await asyncio.sleep(LOOK_S)


class CellRunner:
    """Runs cells on one rig under one load."""

    def __init__(self, fleet: Fleet, load: Load) -> None:
        self._fleet = fleet
        self._load = load
        self._good: list[Node] = []
        self._seed = 0
        self._before: list[tuple[float, float]] = []
        self._next: asyncio.Task[list[Node]] | None = None

    async def begin(self) -> None:
        """The one node that is trusted."""
        healthy = await self._fleet.start(GOOD)
        await self._fleet.join(healthy)
        await self._fleet.act(healthy, "trust")
        self._good.append(healthy)

    @property
    def good(self) -> Node:
        """That node."""
        return self._good[0]

    async def run(self, cell: Cell, following: Cell | None) -> CellRow:
        """One try, from the good nodes alone to the good nodes alone. Meanwhile the next one's processes start."""
        fleet, load, loop = self._fleet, self._load, asyncio.get_running_loop()
        await self._third(cell.third)
        bad = await (self._next or asyncio.create_task(self._start(cell)))
        before = [await load.second() for _ in range(BEFORE_S)]
        self._before += before
        self._next = asyncio.create_task(self._start(following)) if following is not None else None
        if cell.at_once:
            await self._order(cell, bad)
        await asyncio.gather(*(fleet.join(node, "ready", *OUT) for node in bad))
        if not cell.at_once:
            await asyncio.sleep(CALM_S)
        watch = Watch(fleet)
        await watch.start(bad)
        begun = loop.time()
        if not cell.at_once:
            await self._order(cell, bad)
        try:
            await self._until_out(cell, watch, begun)
            out = loop.time() if watch.all_out else None
            after = await self._after() if out is not None else []
        finally:
            await watch.stop()
        ended = loop.time()
        good = [await fleet.look(node) for node in self._good]
        for node in bad:
            await fleet.drop(node)
        await load.answered(ended)
        return self._row(cell, watch.seen, before, after, begun, out, ended, good)

    async def _start(self, cell: Cell) -> list[Node]:
        self._seed += 1
        options = ("--spare-probes",) if cell.spare_probes else ()
        starting = [
            self._fleet.start(BAD, dials_out=cell.dials_out, seed=10 * self._seed + at, options=options)
            for at in range(cell.copies)
        ]
        return await asyncio.gather(*starting)

    async def _order(self, cell: Cell, bad: Sequence[Node]) -> None:
        for node in bad:
            await node.order(f"{cell.mode} {cell.share}")

    async def _third(self, wanted: bool) -> None:
        if wanted and len(self._good) == 1:
            self._before.clear()  # two good nodes are faster than one
            third = await self._fleet.start(GOOD)
            await self._fleet.join(third)
            self._good.append(third)

    async def _until_out(self, cell: Cell, watch: Watch, begun: float) -> None:
        family = MODES[cell.mode].family
        quits = family not in ("well", "busy", "slow")  # the others are to stay, and are looked at for all the time
        limit_s = {"dead": WATCH_DEAD_S, "lies": WATCH_LIES_S}.get(family, WATCH_S if quits else WATCH_STAYS_S)
        if cell.mode == "slow-start":
            limit_s += PHASE_S
        if cell.spare_probes:
            limit_s = WATCH_S
        loop = asyncio.get_running_loop()
        while loop.time() - begun < limit_s and not (quits and watch.all_out):
            await asyncio.sleep(LOOK_S)
        if watch.all_out:
            await asyncio.sleep(SETTLE_S)

    async def _after(self) -> list[tuple[float, float]]:
        """Seconds without the bad node; more of them where its absence seems to cost something."""
        load = self._load
        after = [await load.second() for _ in range(AFTER_S)]
        await load.answered(after[-1][1])
        if self._p99(after) > DOUBT * self._p99(self._before[-2 * NEIGHBOURS :]):
            after += [await load.second() for _ in range(MORE_S)]
        return after

    def _p99(self, seconds: Sequence[tuple[float, float]]) -> float:
        return median_p99([Times.of(self._load.between(*each)) for each in seconds])

    def _row(
        self,
        cell: Cell,
        seen: Sequence[Seen],
        before: Sequence[tuple[float, float]],
        after: Sequence[tuple[float, float]],
        begun: float,
        out: float | None,
        ended: float,
        good: Sequence[dict[str, Any]],
    ) -> CellRow:
        load = self._load
        records = load.between(begun, ended)
        outs = [one.out_at for one in seen if one.out_at is not None]
        out_at = max(outs) if out is not None else None
        backs = [at for one in seen for at in one.back if out_at is not None and at > out_at]
        calm = [each for each in after if not any(each[0] - SETTLE_S <= at < each[1] for at in backs)]
        failures: Counter[str] = Counter()
        for one in seen:
            failures += Counter(one.last["failures"]) - one.failures
        return CellRow(
            name=cell.name,
            mode=cell.mode,
            share=cell.share,
            via="dials out" if cell.dials_out else "address",
            third=cell.third,
            at_once=cell.at_once,
            spares_probes=cell.spare_probes,
            requests=len(records),
            served=sum(record.served for record in records),
            refused=dict(Counter(record.outcome for record in records if not record.served)),
            wrong_vectors=sum(record.wrong for record in records),
            wrong_when_out=sum(
                record.wrong for record in records if out_at is not None and record.at > out_at + SETTLE_S
            ),
            became=",".join(sorted({one.became for one in seen if one.became})),
            out_s=out_at - begun if out_at is not None else None,
            out_answers=max((one.out_answers for one in seen), default=0) if out_at is not None else None,
            answers=sum(one.last["answers"] - one.answers for one in seen),
            came_back=bool(backs),
            before=[Times.of(load.between(*each)) for each in before],
            during=Times.of([record for record in records if record.at < (out_at if out_at is not None else ended)]),
            after=[Times.of(load.between(*each)) for each in calm],
            failures=dict(failures),
            state=",".join(one.last["state"] for one in seen),
            last_failure=seen[0].last["last_failure"],
            honest_out=sum(found["state"] != "ready" for found in good),
            honest_failed=sum(found["canaries"]["failed"] for found in good),
            users=[record.user for record in records],
        )
