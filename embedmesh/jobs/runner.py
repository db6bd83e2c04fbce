"""The runner of a gateway: it takes batches that no gateway has, and moves each on, until it has ended.

    validating → its file is read, its money set aside → in progress → units, each settled in one step → finalizing →
    its output files are written → completed

A batch is worked on under a lease, which is renewed beside the work. Once that is lost, the work is dropped where it
is: nothing of it was charged, and another gateway goes on from what is durable. What the store or the disk cannot take
now is tried again; a batch waits for nodes, for room and for the store until its own time is over.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NoReturn

from embedmesh.fleet.leftover import Leftover
from embedmesh.flow.world import World
from embedmesh.jobs.endpoints import Endpoints
from embedmesh.jobs.files import FileStore
from embedmesh.jobs.unit import Stopping, where
from embedmesh.jobs.validate import BatchTerms
from embedmesh.jobs.work import BatchCounts, BatchTools, BatchWork, OfBatch, as_it_is
from embedmesh.rules.batches import Batch, BatchLease, BatchState, LeaseLost
from embedmesh.rules.errors import Failure
from embedmesh.rules.ports import Catalogue
from embedmesh.rules.shares import Shares
from embedmesh.storage.batches import BATCH_LEASE_S, BATCH_RENEW_S, Batches

log = logging.getLogger("embedmesh.jobs")

LEASE_LOOK_S = 1.0  # between two looks for a batch that no gateway has
BATCHES_OF_GATEWAY_MAX = 256  # each is renewed three times in ten seconds, those that wait for a node, too
VALIDATIONS_MAX = 6  # at one time: ids of a million lines take 16 MB
UNITS_OF_GATEWAY_MAX = 10  # at one time: each may have its lines and its results in memory
LEASE_MARGIN_S = 2.0  # work stops that long before others may take the batch


class Runner:
    """Works off batches, those that it has taken. `run` is its life."""

    def __init__(
        self,
        batches: Batches,
        files: FileStore,
        world: World,
        endpoints: Endpoints,
        leftover: Leftover,
        terms: BatchTerms | None = None,
        known: Catalogue | None = None,
        of_batch: OfBatch = as_it_is,
        on_bug: Callable[[], object] = lambda: None,
    ) -> None:
        """`world` is the one for lines of batches: its fleet is patient, and nothing in it limits a key.

        `known` has the models of batches that have begun, also those that have left the catalogue since. `of_batch`
        makes the operation for one batch of that of its endpoint. `on_bug` is called for each bug of ours.
        """
        self._batches = batches
        self._clock = world.clock
        validations, units = Shares(VALIDATIONS_MAX), Shares(UNITS_OF_GATEWAY_MAX)
        self.counts, terms, known = BatchCounts(on_bug), terms or BatchTerms(), known or world.catalogue
        parts = (batches, files, world, endpoints, leftover, terms, known)
        self._tools = BatchTools(*parts, validations, units, self.counts, of_batch)
        self._room = Shares(BATCHES_OF_GATEWAY_MAX)  # nobody's batches keep those of others from being taken
        self._work: dict[str, asyncio.Task[None]] = {}  # by batch
        self._news: dict[str, asyncio.Event] = {}  # by batch: its state may have changed
        self._more = asyncio.Event()

    def look(self, batch_id: str | None = None) -> None:
        """There is something new: a batch, or of that batch."""
        if batch_id is None:
            self._more.set()
        elif batch_id in self._news:
            self._news[batch_id].set()

    @property
    def terms(self) -> BatchTerms:
        """Of batches that begin now."""
        return self._tools.terms

    def use_terms(self, terms: BatchTerms) -> None:
        """For batches that begin from now on."""
        self._tools = self._tools._replace(terms=terms)

    @property
    def under_way(self) -> int:
        """Batches that this gateway works on."""
        return len(self._work)

    async def run(self) -> NoReturn:
        """Take batches and work on them; cancel it. Batches that are not ended then are free for others at once."""
        try:
            while True:
                self._more.clear()
                while self._room.taken < BATCHES_OF_GATEWAY_MAX:
                    with contextlib.suppress(Failure):
                        if (taken := await self._batches.lease(self._room.full())) is not None:
                            self._begin(*taken)
                            continue
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEASE_LOOK_S):
                        await self._more.wait()
        finally:
            for task in self._work.values():
                task.cancel()
            await asyncio.gather(*self._work.values(), return_exceptions=True)

    def _begin(self, lease: BatchLease, batch: Batch) -> None:
        taken = self._room.take(batch.account_id)
        assert taken, "the accounts that may not have one more were left out"
        task = asyncio.create_task(self._live(lease, batch))
        self._work[batch.batch_id] = task

        def ended(_: object) -> None:
            del self._work[batch.batch_id]
            self._room.give_back(batch.account_id)
            self._more.set()

        task.add_done_callback(ended)

    async def _live(self, lease: BatchLease, batch: Batch) -> None:
        """Work on a batch, and renew its lease beside that."""
        stopping, news = Stopping(), asyncio.Event()
        self._news[batch.batch_id] = news
        work = asyncio.create_task(BatchWork(self._tools, lease, batch, stopping).advance())
        try:
            await self._renew(lease, stopping, news, work)
            await work
        except asyncio.CancelledError:
            if work.cancelled():
                return  # the lease is lost
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            with contextlib.suppress(Failure, TimeoutError):
                async with asyncio.timeout(LEASE_MARGIN_S):
                    await self._batches.release(lease)
            raise
        except LeaseLost:
            log.info("batch %s is another gateway's now", batch.batch_id)
        except Exception as error:  # noqa: BLE001 - a bug of ours: the lease runs out, and it is tried again
            self.counts.on_bug()
            log.error("batch %s: internal error: %s", batch.batch_id, where(error))
        finally:
            del self._news[batch.batch_id]

    async def _renew(
        self, lease: BatchLease, stopping: Stopping, news: asyncio.Event, work: "asyncio.Task[None]"
    ) -> None:
        """Renew the lease until the work has ended, or must end because the lease is lost."""
        clock = self._clock
        renewed = clock.monotonic()
        while not work.done():
            waiting = asyncio.create_task(news.wait())
            await asyncio.wait([work, waiting], timeout=BATCH_RENEW_S, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            news.clear()
            if work.done():
                return
            asked = clock.monotonic()
            try:
                batch = await self._batches.renew(lease)
                renewed = asked
            except LeaseLost:
                if not work.done():
                    work.cancel()
                return
            except Failure:  # the store is away: nobody else can take it either, but later it may be too late
                if clock.monotonic() - renewed > BATCH_LEASE_S - LEASE_MARGIN_S:
                    work.cancel()
                    return
                continue
            if batch.state is BatchState.CANCELLING:
                stopping.stop("batch_cancelled")
            elif clock.unix_ms() >= batch.expires_ms:
                stopping.stop("batch_expired")
