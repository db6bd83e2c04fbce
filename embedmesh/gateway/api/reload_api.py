"""`/v1/admin/reload`: the settings are read again, by this gateway and all others of its store.

The requests wait here until `embedmesh.gateway.reload` has done it; SIGHUP and other gateways' requests come here, too.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.replies import doc
from embedmesh.gateway.api.routes import ADMIN_KEY, Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import InvalidValue, Overloaded, SetupError, StoreUnavailable

RELOADS_WAITING_MAX = 16  # one reading answers all that wait when it begins
RELOAD_ANSWER_S = 60.0  # a new model's tokenizer is read within seconds
FOLDERS = re.compile(r"(?:/[^\s/:'\"]+)+/(?=[^\s/])")  # of a path, up to the file's own name


class ModelChanges(msgspec.Struct, frozen=True):
    """What has become of the catalogue's models, by their ids."""

    added: list[str] = []
    removed: list[str] = []
    changed: list[str] = []


class Reloaded(msgspec.Struct, frozen=True):
    """What has changed at this gateway. The others of its store read their own settings within a second."""

    changed: Annotated[list[str], doc("Settings that are others now than before.")]
    needs_restart: Annotated[list[str], doc("Settings that have changed in the file, and stay until a restart.")]
    models: ModelChanges = ModelChanges()


class ReloadRequests:
    """Who waits for the settings to be read again, and how often that was done. On the event loop."""

    def __init__(self) -> None:
        self._wanted = asyncio.Event()
        self._waiting: deque[asyncio.Future[Reloaded]] = deque()
        self.applied = self.refused = 0
        self.needs_restart = 0  # settings, as of the last time

    def knock(self) -> None:
        """Have them read again; nobody waits for it."""
        self._wanted.set()

    async def ask(self) -> Reloaded:
        """Have them read again. Raises InvalidValue: nothing was changed. Raises Overloaded and StoreUnavailable."""
        if len(self._waiting) >= RELOADS_WAITING_MAX:
            raise Overloaded(
                f"At most {RELOADS_WAITING_MAX} wait for the settings to be read again. Try again shortly."
            )
        answer: asyncio.Future[Reloaded] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._wanted.set()
        try:
            async with asyncio.timeout(RELOAD_ANSWER_S):
                return await answer
        except TimeoutError:
            raise StoreUnavailable("The settings are still being read. Look at the log before you try again.") from None

    async def next(self) -> Callable[[Reloaded | Exception], None]:
        """Wait until somebody wants them read. What is returned tells all who wait now what has come of it."""
        await self._wanted.wait()
        self._wanted.clear()
        asked = list(self._waiting)
        self._waiting.clear()

        def tell(result: Reloaded | Exception) -> None:
            if isinstance(result, Reloaded):
                self.applied += 1
                self.needs_restart = len(result.needs_restart)
            else:
                self.refused += 1
            for each in asked:
                if not each.done():
                    each.set_exception(result) if isinstance(result, Exception) else each.set_result(result)

        return tell

    def counts(self) -> dict[str, float]:
        """For the metrics."""
        return {
            "settings_reloads": self.applied,
            "settings_reloads_refused": self.refused,
            "settings_need_restart": self.needs_restart,
        }


class ReloadApi(Api):
    """The handler for operators."""

    TAG = "Administration"

    def __init__(self, books: BooksThread, requests: ReloadRequests, bodies: BodyBudget) -> None:
        self._books = books
        self._requests = requests
        self.bodies = bodies

    async def reload_settings(self, call: ApiCall[None, None]) -> Reloaded:
        """Read the settings again.

        From its file, its catalogue and its certificate, as at SIGHUP. All that can change while it runs is changed,
        or, where anything is wrong, nothing. The other gateways of the store do the same.
        """
        try:
            reloaded = await self._requests.ask()
        except SetupError as error:
            raise InvalidValue(f"Nothing was changed. {FOLDERS.sub('', str(error))}") from None
        names = {"changed": reloaded.changed, "needs_restart": reloaded.needs_restart}
        names |= {f"models_{what}": each for what, each in msgspec.structs.asdict(reloaded.models).items()}
        await self._books.ask(lambda books: books.tell_settings(names), by=call.by)
        return reloaded

    ROUTES = (Route("POST", "/v1/admin/reload", ADMIN_KEY, reload_settings, failures=(InvalidValue, Overloaded)),)
