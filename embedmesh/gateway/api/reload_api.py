"""`/v1/admin/reload`: the settings are read again, by this gateway and all others of its store.

The requests wait here until `embedmesh.gateway.reload` has done it; SIGHUP and other gateways' requests come here, too.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec

from embedmesh.gateway.api.replies import doc
from embedmesh.gateway.api.routes import ADMIN_KEY, Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.acts import Actor
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

    def names(self) -> dict[str, list[str]]:
        """What the audit says of it."""
        models = {f"models_{what}": each for what, each in msgspec.structs.asdict(self.models).items()}
        return {"changed": self.changed, "needs_restart": self.needs_restart, **models}


class ReloadRequests:
    """Who waits for the settings to be read again, and how often that was done. On the event loop."""

    def __init__(self) -> None:
        self._wanted = asyncio.Event()
        self._waiting: deque[tuple[Actor, asyncio.Future[Reloaded]]] = deque()
        self.applied = self.refused = 0
        self.needs_restart = 0  # settings, as of the last time

    def knock(self) -> None:
        """Have them read again; nobody waits for it."""
        self._wanted.set()

    async def ask(self, by: Actor) -> Reloaded:
        """Have them read again by all gateways of the store, and this one first: an act of `by`.

        Raises InvalidValue: nothing was changed. Raises Overloaded and StoreUnavailable.
        """
        if len(self._waiting) >= RELOADS_WAITING_MAX:
            raise Overloaded(
                f"At most {RELOADS_WAITING_MAX} wait for the settings to be read again. Try again shortly."
            )
        answer: asyncio.Future[Reloaded] = asyncio.get_running_loop().create_future()
        self._waiting.append((by, answer))
        self._wanted.set()
        try:
            async with asyncio.timeout(RELOAD_ANSWER_S):
                return await answer
        except TimeoutError:
            raise StoreUnavailable("The settings are still being read. Look at the log before you try again.") from None

    async def next(self) -> tuple[list[Actor], Callable[[Reloaded | Exception], None]]:
        """Wait until somebody wants them read: who waits now, and what tells them all what has come of it."""
        await self._wanted.wait()
        self._wanted.clear()
        asked = [each for each in self._waiting if not each[1].done()]  # who has gone asks for nothing
        self._waiting.clear()

        def tell(result: Reloaded | Exception) -> None:
            if isinstance(result, Reloaded):
                self.applied += 1
                self.needs_restart = len(result.needs_restart)
            else:
                self.refused += 1
            for _, each in asked:
                if not each.done():
                    each.set_exception(result) if isinstance(result, Exception) else each.set_result(result)

        return [by for by, _ in asked], tell

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

    def __init__(self, requests: ReloadRequests, bodies: BodyBudget) -> None:
        self._requests = requests
        self.bodies = bodies

    async def reload_settings(self, call: ApiCall[None, None]) -> Reloaded:
        """Read the settings again.

        From its file, its catalogue and its certificate, as at SIGHUP. All that can change while it runs is changed,
        or, where anything is wrong, nothing. The other gateways of the store do the same.
        """
        try:
            return await self._requests.ask(call.by)
        except SetupError as error:
            raise InvalidValue(f"Nothing was changed. {FOLDERS.sub('', str(error))}") from None

    ROUTES = (Route("POST", "/v1/admin/reload", ADMIN_KEY, reload_settings, failures=(InvalidValue, Overloaded)),)
