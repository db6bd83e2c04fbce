"""How far a model is loaded, in words, for logs and for those who wait."""

import logging
import time
from collections.abc import Callable

from embedmesh.engine.frames import Loading, Step

log = logging.getLogger("embedmesh.engine")

LOAD_LOG_S = 1.0  # a model that loads longer is told of in the log
STEPS: dict[Step, int] = {"checks its files": 0, "reads its weights": 25, "compiles it": 40, "packs its weights": 50}
"""How much of a load is over when a step begins, in per cent, measured with a model of 560 million parameters."""


class LoadProgress:
    """Of one model's worker: what it does while it loads."""

    def __init__(self, name: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._monotonic = monotonic
        self._begun = 0.0
        self.now: Loading | None = None

    def note(self, loading: Loading) -> None:
        """A step has begun."""
        if self.now is None or loading.percent < self.now.percent:
            self._begun = self._monotonic()
        self.now = loading
        if self._monotonic() - self._begun >= LOAD_LOG_S:
            log.info("loading %s: %d %%; the engine %s", self._name, loading.percent, loading.step)

    def __str__(self) -> str:
        return "loading" if self.now is None else f"loading, {self.now.percent} %: its engine {self.now.step}"
