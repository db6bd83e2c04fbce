"""The models that a node serves now. They may come and go while it runs; a failure of one affects no other."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from embedmesh.engine.memory import release_freed
from embedmesh.engine.served import Served
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import NODE_MODELS_MAX
from embedmesh.rules.models import Model

log = logging.getLogger("embedmesh.engine")

TOGETHER_S = 5.0  # gateways look again after this time, so a model that loads longer is not found any later
UNLOAD_S = 30.0  # as long as an ordinary call may take


class _Loaded(NamedTuple):
    served: Served
    keeping: asyncio.Task[None]


class LoadedModels:
    """Served models by id. `make` builds one, and raises SetupError where its folder cannot be served."""

    def __init__(self, make: Callable[[Model], Served]) -> None:
        self._make = make
        self._loaded: dict[str, _Loaded] = {}
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when the task that keeps a model alive has ended, which is a bug of ours."""
        self.some = asyncio.Event()
        """Set once a first model embeds, and those that started with it embed too, have failed, or took TOGETHER_S."""
        self._first = asyncio.Event()  # once a first model embeds
        self._starting = False  # until `some` is set: models that start together are announced together

    def __iter__(self) -> Iterator[Served]:
        return iter([one.served for one in self._loaded.values()])

    def up(self) -> list[Served]:
        """The models that embed: those that may be announced."""
        return [] if self._starting else [each for each in self if each.up]

    def find(self, model_id: str) -> Served | None:
        """The model of that id, which may still be loading; or None."""
        loaded = self._loaded.get(model_id)
        return loaded.served if loaded is not None else None

    async def load_all(self, models: Iterable[Model]) -> None:
        """Serve these. A model whose engine does not start is tried again, with pauses, and does not delay the others.

        Returns once each embeds or has failed. Raises the first one's SetupError where none could be started.
        """
        loads = [asyncio.ensure_future(self.load(each, insist=True)) for each in models]
        waiting = asyncio.ensure_future(self._announce_some())
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

        Raises SetupError, and then does not serve it, unless `insist` is set: then its engine is tried again and again.
        Harmless where it is served already.
        """
        already = self._loaded.get(model.id)
        if already is not None:
            await already.served.loaded()
            if not already.served.up:
                raise SetupError(f"The engine of {model.id} does not start; it is tried again and again. See the log.")
            return
        if len(self._loaded) >= NODE_MODELS_MAX:
            raise SetupError(f"A node serves at most {NODE_MODELS_MAX} models. Unload one, or start another node.")
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

    async def _announce_some(self) -> None:
        await self._first.wait()
        await asyncio.sleep(TOGETHER_S)
        self._starting = False
        self.some.set()

    async def unload(self, model_id: str, within_s: float = UNLOAD_S) -> None:
        """Take no more calls for a model, answer those that wait, for `within_s` at most, and end its worker."""
        loaded = self._loaded.pop(model_id, None)
        if loaded is None:
            return
        try:
            async with asyncio.timeout(within_s):
                await loaded.served.idle()
        except TimeoutError:
            pass  # calls that still wait fail when the worker is gone
        finally:
            await _end(*loaded)
            del loaded
            release_freed()

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
