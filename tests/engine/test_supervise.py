"""A real worker process on a small model, killed, stopped and poisoned: nobody waits for ever, and it comes back."""

import asyncio
import contextlib
import functools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench.starved
from embedmesh.engine.folder import digest
from embedmesh.engine.frames import LoadModel, RunBatch, Vectors
from embedmesh.engine.isolate import Rows
from embedmesh.engine.process import Done, Look, OnLoading, Worker, WorkerBroke, WorkerProcess, WorkerStuck
from embedmesh.engine.supervise import DYING_MAX, PROVED_S, Supervisor
from embedmesh.engine.watch import WATCH_LOOK_S, TimeAllowed, Watch
from embedmesh.rules.errors import NodeBroke, SetupError
from tests.engine.tiny import POISON, make_folder, make_weights, textbook

pytestmark = pytest.mark.story

GOOD = [2, 5, 6, 7, 3]
BREAKABLE = Path(bench.starved.__file__).parent / "broken"
BACK_S = 10.0  # a second on a quiet machine; tests share theirs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny")


@asynccontextmanager
async def supervising(
    folder: Path,
    *,
    on_start: Callable[[int], None] = lambda number: None,
    spawn: Callable[[], Awaitable[Worker]] = WorkerProcess.spawn,
    **changes: Any,
) -> AsyncIterator[Supervisor]:
    members = {"digest": digest(folder), "width": 16, "max_tokens": 48} | changes
    load = LoadModel(folder=str(folder), threads=1, **members)  # type: ignore[arg-type]
    sleep = asyncio.sleep if spawn == WorkerProcess.spawn else no_pause
    supervisor = Supervisor(load, on_start=lambda: on_start(1), spawn=spawn, sleep=sleep)
    try:
        yield supervisor
    finally:
        await supervisor.stop()


async def no_pause(seconds: float) -> None: ...


class ScriptedWorker:
    """Answers at once: vectors of ones."""

    pid = 0

    async def load(self, load: LoadModel, look: Look, on_loading: OnLoading) -> None: ...

    def begin(self, batch: RunBatch, look: Look, done: Done) -> None:
        async def run() -> None:
            try:
                done(await self.run(batch, look))
            except WorkerBroke as broke:
                done(broke)

        self.running = asyncio.ensure_future(run())

    async def run(self, batch: RunBatch, look: Look) -> Vectors:
        return Vectors(batch.number, np.ones((len(batch.sequences), 16), "<f4").tobytes())

    def kill(self) -> None: ...

    async def gone(self, within_s: float) -> bool:
        return True


def spawning(kind: type[ScriptedWorker]) -> Callable[[], Awaitable[Worker]]:
    async def spawn() -> Worker:
        return kind()

    return spawn


async def run(supervisor: Supervisor, sequences: list[list[int]], rows: int, length: int) -> Rows:
    """As the queue has it run: `begin`, and the coroutine behind it where something goes wrong."""
    ended: asyncio.Future[Rows | NodeBroke] = asyncio.get_running_loop().create_future()
    supervisor.begin(sequences, rows, length, ended.set_result)
    assert not ended.done()
    outcome = await ended
    if isinstance(outcome, NodeBroke):
        raise outcome
    return outcome


async def embed(supervisor: Supervisor, ids: list[int]) -> np.ndarray:
    async with asyncio.timeout(3 * BACK_S):
        (vector,) = await run(supervisor, [ids], 1, 8)
    assert vector is not None
    return np.frombuffer(vector, "<f4")


def workers_of_ours() -> set[str]:
    """Ids of worker processes that this process has started and not yet seen the end of."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {child for child in children if "engine.worker" in Path(f"/proc/{child}/cmdline").read_text()}


@functools.cache
def right() -> np.ndarray:
    return textbook(GOOD, make_weights(), pooling="mean", normalize=True)


def is_right(vector: np.ndarray) -> bool:
    return bool(np.abs(vector - right()).max() <= 1e-5)


async def until_ready(supervisor: Supervisor, ready: bool) -> float:
    """Seconds until `ready()` says so."""
    begun = time.monotonic()
    while supervisor.ready() is not ready:
        assert time.monotonic() - begun < BACK_S
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


async def test_it_embeds_and_leaves_nothing_behind(folder: Path) -> None:
    async with supervising(folder) as supervisor:
        assert not supervisor.ready()
        await supervisor.start()
        assert supervisor.ready()
        assert is_right(await embed(supervisor, GOOD))
        pid = supervisor.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"digest": "0" * 64}, "not the model that the catalogue names"),
        ({"width": 17}, "width of 17"),
        ({"max_tokens": 49}, "49 tokens"),
    ],
)
async def test_a_folder_that_is_not_the_catalogue_s_is_refused(
    folder: Path, changes: dict[str, Any], says: str
) -> None:
    async with supervising(folder, **changes) as supervisor:
        with pytest.raises(SetupError) as refused:
            await supervisor.start()
    assert says in str(refused.value)


async def test_a_worker_killed_between_batches_costs_nobody_anything(folder: Path) -> None:
    async with supervising(folder) as supervisor:
        await supervisor.start()
        for _ in range(2):
            assert supervisor.pid is not None
            os.kill(supervisor.pid, signal.SIGKILL)
            assert is_right(await embed(supervisor, GOOD))


async def test_a_worker_that_hangs_is_replaced(folder: Path) -> None:
    """The batch that met it is answered by the next one."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGSTOP)
        assert is_right(await embed(supervisor, GOOD))


@pytest.mark.parametrize("fault", [signal.SIGUSR1, signal.SIGUSR2], ids=["runs round and round", "waits for a lock"])
async def test_a_worker_that_never_answers_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: signal.Signals
) -> None:
    """Neither is idle in the same way: one uses CPU time without end, the other none."""
    monkeypatch.setenv("PYTHONPATH", str(BREAKABLE))
    async with supervising(folder) as supervisor:
        await supervisor.start()
        before = supervisor.pid
        assert before is not None
        os.kill(before, fault)
        assert is_right(await embed(supervisor, GOOD))
        assert supervisor.pid != before


@pytest.mark.parametrize(
    ("fault", "words"), [(signal.SIGKILL, "signal 9"), (signal.SIGSEGV, "signal 11 (Segmentation fault)")]
)
async def test_how_a_worker_ended_is_told(folder: Path, fault: signal.Signals, words: str) -> None:
    """For the log: an operator learns whether it was killed, or crashed."""
    worker = await WorkerProcess.spawn()
    os.kill(worker.pid, fault)
    load = LoadModel(folder=str(folder), digest=digest(folder), width=16, max_tokens=48, threads=1)
    allowed = TimeAllowed(cpu_s=BACK_S, still_s=BACK_S, clock_s=BACK_S)
    with pytest.raises(WorkerBroke) as broke:
        await worker.load(load, Watch(allowed, lambda seconds, shortage: None).look)
    assert words in str(broke.value)
    worker.kill()
    assert await worker.gone(BACK_S)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core")
async def test_a_worker_that_gets_no_cpu_is_waited_for_and_said_to_be_starved(folder: Path) -> None:
    """On one core with busy loops that have all the weight: what takes milliseconds takes seconds."""
    core = min(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for loop in loops:
            os.sched_setaffinity(loop.pid, {core})
        async with supervising(folder) as supervisor:
            await supervisor.start()
            pid = supervisor.pid
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
            for _ in range(2_000):
                assert len(await run(supervisor, [GOOD] * 64, 64, 48)) == 64
                if supervisor.shortage:
                    break
            assert supervisor.shortage in ("cpu", "quota")  # a container may have one, too
            assert supervisor.pid == pid
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


async def test_where_the_kernel_tells_nothing_halves_are_tried_with_twice_the_time(folder: Path) -> None:
    """A worker that is late by the clock may only be slow: the next batches are smaller."""
    rows: list[int] = []
    clocks: list[float] = []

    class Blind(ScriptedWorker):
        async def run(self, batch: RunBatch, look: Look) -> Vectors:
            rows.append(len(batch.sequences))
            looks = 1
            while not look(None):
                looks += 1
            clocks.append(looks * WATCH_LOOK_S)
            if len(rows) < 3:
                raise WorkerStuck("did not answer in time")
            return await super().run(batch, look)

    async with supervising(folder, spawn=spawning(Blind)) as supervisor:
        vectors = await run(supervisor, [GOOD] * 8, 8, 8)
    assert None not in vectors[4:]
    assert rows[:4] == [8, 4, 4, 2]
    assert clocks[1] == pytest.approx(2 * clocks[0], rel=0.1)
    assert clocks[2] == pytest.approx(4 * clocks[0], rel=0.1)


async def test_a_batch_that_finds_the_worker_busy_waits_for_its_turn(folder: Path) -> None:
    """Whether it came by the one way or the other; each gets its own vectors."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        batches = [[[2, 4 + at, 3]] for at in range(6)]
        ways = [
            run(supervisor, batch, 1, 8) if at % 2 else supervisor.run(batch, 1, 8) for at, batch in enumerate(batches)
        ]
        for batch, vectors in zip(batches, await asyncio.gather(*ways), strict=True):
            assert vectors == await supervisor.run(batch, 1, 8)


async def test_what_is_wrong_in_a_callback_is_not_lost(folder: Path) -> None:
    """A bug of ours: nobody waits for a batch that begins without a coroutine, so `keep` tells it."""

    def broken(outcome: object) -> None:
        raise ZeroDivisionError

    async with supervising(folder) as supervisor:
        await supervisor.start()
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        supervisor.begin([GOOD], 1, 8, broken)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(supervisor.keep(), BACK_S)


async def test_at_the_end_a_batch_that_is_being_mended_leaves_no_process(folder: Path) -> None:
    async with supervising(folder) as supervisor:
        await supervisor.start()
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        supervisor.begin([GOOD], 1, 8, lambda outcome: pytest.fail("it was answered"))
        while not workers_of_ours():
            await asyncio.sleep(0.001)
    assert workers_of_ours() == set()
    supervisor.begin([GOOD], 1, 8, lambda outcome: pytest.fail("it was answered"))
    await asyncio.sleep(0.01)
    assert workers_of_ours() == set()


async def test_workers_that_do_not_die_are_left_alone_and_there_are_never_many(folder: Path) -> None:
    """As when a disk hangs under them. Nobody waits for them, no exception comes of it, and no third joins them."""
    dead = False

    class Undying(ScriptedWorker):
        async def run(self, batch: RunBatch, look: Look) -> Vectors:
            if not dead:
                raise WorkerBroke("hangs")
            return await super().run(batch, look)

        async def gone(self, within_s: float) -> bool:
            return dead

    started: list[int] = []
    async with supervising(folder, on_start=started.append, spawn=spawning(Undying)) as supervisor:
        for _ in range(4):
            with pytest.raises(NodeBroke):
                await run(supervisor, [GOOD], 1, 8)
        assert len(started) == DYING_MAX
        assert supervisor.down
        dead = True
        assert len(await run(supervisor, [GOOD], 1, 8)) == 1
        assert not supervisor.down


async def test_ready_tells_the_truth_and_idle_workers_come_back(folder: Path) -> None:
    """Nobody asks for anything: probes notice, and mend it."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        keeper = asyncio.create_task(supervisor.keep())
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGSTOP)
        assert await until_ready(supervisor, False) <= PROVED_S + 0.25
        await until_ready(supervisor, True)
        keeper.cancel()


async def test_a_poisoned_text_gets_an_error_and_others_their_vectors(folder: Path) -> None:
    """Its vector is not a number; no caller may ever see one."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        assert await run(supervisor, [[2, POISON, 3]], 1, 8) == [None]
        assert is_right(await embed(supervisor, GOOD))


@pytest.mark.parametrize("at", [0, 3])
async def test_a_poisoned_text_is_found_in_its_batch(folder: Path, at: int) -> None:
    """Its own place is empty; the others of its batch get their right vectors."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        batch = [GOOD] * 4
        batch[at] = [2, POISON, 3]
        vectors = await run(supervisor, batch, 4, 8)
    assert [row for row, vector in enumerate(vectors) if vector is None] == [at]
    assert all(is_right(np.frombuffer(vector, "<f4")) for vector in vectors if vector is not None)


async def test_what_is_not_finite_costs_one_process(folder: Path) -> None:
    """The second says the same, so it is the texts: their places are empty, and no halves are tried."""
    starts: list[int] = []
    async with supervising(folder, on_start=starts.append) as supervisor:
        await supervisor.start()
        batch = [[2, POISON, 3] if at in (1, 40) else GOOD for at in range(64)]
        vectors = await run(supervisor, batch, 64, 8)
        assert [row for row, vector in enumerate(vectors) if vector is None] == [1, 40]
        assert all(is_right(np.frombuffer(vector, "<f4")) for vector in vectors if vector is not None)
        assert is_right(await embed(supervisor, GOOD))
    assert len(starts) == 2


async def test_an_exception_in_the_worker_costs_nobody_else_anything(folder: Path) -> None:
    """Here one for a wrong shape: a sequence for no row."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        with pytest.raises(NodeBroke):
            await run(supervisor, [GOOD], 0, 8)
        assert is_right(await embed(supervisor, GOOD))


async def test_a_worker_without_memory_is_replaced(folder: Path) -> None:
    """It may have no byte more than it has: what it cannot run, another one does."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        assert supervisor.pid is not None
        pages = int(Path(f"/proc/{supervisor.pid}/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(supervisor.pid, resource.RLIMIT_AS, (limit, limit))
        for rows in range(1, 400, 20):
            vectors = await run(supervisor, [GOOD] * rows, rows, 48)
            assert all(vector is not None and is_right(np.frombuffer(vector, "<f4")) for vector in vectors)


async def test_a_model_that_has_gone_is_down_at_once_and_comes_back_with_its_files(folder: Path) -> None:
    async with supervising(folder) as supervisor:
        await supervisor.start()
        config = (folder / "config.json").read_bytes()
        (folder / "config.json").unlink()
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        with pytest.raises(NodeBroke):
            await embed(supervisor, GOOD)
        assert supervisor.down
        assert not supervisor.ready()
        (folder / "config.json").write_bytes(config)
        keeper = asyncio.create_task(supervisor.keep())
        await until_ready(supervisor, True)
        assert is_right(await embed(supervisor, GOOD))
        keeper.cancel()


async def test_a_cancelled_batch_ends_its_worker(folder: Path) -> None:
    """Its answer would otherwise be taken for the next batch's."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        before = supervisor.pid
        assert before is not None
        os.kill(before, signal.SIGSTOP)
        batch = asyncio.create_task(supervisor.run([GOOD], 1, 8))
        await asyncio.sleep(0.1)
        batch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await batch
        assert is_right(await embed(supervisor, GOOD))
        assert supervisor.pid != before


@pytest.mark.parametrize("turns", range(6))
async def test_a_start_that_is_cancelled_leaves_no_process(folder: Path, turns: int) -> None:
    """Wherever it was: also before the socket had its streams."""
    async with supervising(folder) as supervisor:
        start = asyncio.create_task(supervisor.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert workers_of_ours() == set()


async def test_a_worker_killed_while_it_loads_costs_nobody_anything(folder: Path) -> None:
    """A start that failed once is no reason to turn callers away."""
    async with supervising(folder) as supervisor:
        await supervisor.start()
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        batch = asyncio.create_task(embed(supervisor, GOOD))
        loading: set[str] = set()
        while not loading:
            await asyncio.sleep(0.01)
            loading = workers_of_ours()
        os.kill(int(loading.pop()), signal.SIGKILL)
        assert is_right(await batch)
        assert not supervisor.down
