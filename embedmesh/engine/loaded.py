"""The models that a node serves now. They may come and go while it runs; what befalls one befalls no other."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from embedmesh.engine.served import Served
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model

log = logging.getLogger("embedmesh.engine")

MODELS_MAX = 16  # each is a process of 200 MB or more
TOGETHER_S = 5.0  # gateways look again after so long: nobody finds a model that loads longer any later
UNLOAD_S = 30.0  # as long as an ordinary call may take


class _Loaded(NamedTuple):
    served: Served
    keeping: asyncio.Task[None]


class LoadedModels:
    """By id. `make` builds what serves a model, and raises SetupError where its folder cannot be served."""

    def __init__(self, make: Callable[[Model], Served]) -> None:
        self._make = make
        self._loaded: dict[str, _Loaded] = {}
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends, with its exception, when what keeps a model alive has ended: a bug of ours."""
        self.some = asyncio.Event()
        """Set once a first model embeds, and those that started with it do, too, or have failed, or take TOGETHER_S."""
        self._first = asyncio.Event()  # once a first model embeds
        self._starting = False  # until `some` is set: those that start together are told of together

    def __iter__(self) -> Iterator[Served]:
        return iter([one.served for one in self._loaded.values()])

    def up(self) -> list[Served]:
        """Those that embed: what others may be told of."""
        return [] if self._starting else [each for each in self if each.up]

    def find(self, model_id: str) -> Served | None:
        """What serves the model of that id, be it still loading; or None."""
        loaded = self._loaded.get(model_id)
        return loaded.served if loaded is not None else None

    async def load_all(self, models: Iterable[Model]) -> None:
        """Serve these. One whose engine does not start is tried again, with pauses, and does not keep the others.

        Returns once each embeds or has failed. Raises the first's SetupError where none could be started.
        """
        loads = [asyncio.ensure_future(self.load(each, insist=True)) for each in models]
        waiting = asyncio.ensure_future(self._tell_of_some())
        self._starting = True
        try:
            results = await asyncio.gather(*loads, return_exceptions=True)
        finally:
            for task in (waiting, *loads):
                task.cancel()
        self._starting = False
        if self._first.is_set():
            self.some.set()
        failures = [result for result in results if result is not None]
        for failure in failures:
            if not isinstance(failure, SetupError) or len(failures) == len(results):
                raise failure
            log.error("a model is not served: %s", failure)

    async def load(self, model: Model, *, insist: bool = False) -> None:
        """Serve a model. Calls for it wait from now on; returns once a first text was embedded.

        Raises SetupError, and then does not serve it; unless we are to `insist`: then its engine is tried again and
        again. Harmless where it is served already.
        """
        already = self._loaded.get(model.id)
        if already is not None:
            await already.served.loaded()
            if not already.served.up:
                raise SetupError(f"The engine of {model.id} does not start; it is tried again and again. See the log.")
            return
        if len(self._loaded) >= MODELS_MAX:
            raise SetupError(f"A node serves at most {MODELS_MAX} models. Unload one, or start another node.")
        served = self._make(model)
        keeping = asyncio.create_task(served.keep())
        keeping.add_done_callback(self._kept)
        self._loaded[model.id] = _Loaded(served, keeping)
        try:
            await served.start()
            self._first.set()
        except BaseException as error:
            if not insist or not isinstance(error, SetupError):
                self._loaded.pop(model.id, None)
                await _end(served, keeping)
            raise

    async def _tell_of_some(self) -> None:
        await self._first.wait()
        await asyncio.sleep(TOGETHER_S)
        self._starting = False
        self.some.set()

    async def unload(self, model_id: str, within_s: float = UNLOAD_S) -> None:
        """Take no more calls for a model, answer those that wait, for at most so long, and end its worker."""
        loaded = self._loaded.pop(model_id, None)
        if loaded is None:
            return
        try:
            async with asyncio.timeout(within_s):
                await loaded.served.idle()
        except TimeoutError:
            pass  # who still waits will be told that the engine is gone
        finally:
            await _end(*loaded)

    async def stop(self) -> None:
        """End every worker at once."""
        for model_id in list(self._loaded):
            await self.unload(model_id, within_s=0.0)

    def _kept(self, keeping: asyncio.Task[None]) -> None:
        if not keeping.cancelled() and not self.broken.done():
            self.broken.set_exception(keeping.exception() or RuntimeError("a model is no longer kept"))


async def _end(served: Served, keeping: asyncio.Task[None]) -> None:
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await served.stop()
