"""The models that the server beside a sidecar runs, and whether it answers for them now.

It is asked for one token: when the node starts, after a failure, and after a minute without an answer. Images cost too
much for a question: such a model is taken to be there until a request fails, and again after a while.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from embedmesh.rules.errors import NodeBusy, NodeFailure, NotAsAsked, UpstreamRefused
from embedmesh.rules.generation import GenerationRequest
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Clock
from embedmesh.upstream.generating import UpstreamGeneration

log = logging.getLogger("embedmesh.node")

SERVER_LOOK_S = 0.5  # between two looks whether a question is due
SERVER_QUIET_S = 60.0  # without an answer, until it is asked for one: it may be busy for others, or charge for each
AGAIN_S = (1.0, 2.0, 5.0, 10.0)  # after failures in a row; the last repeats
QUESTION_S = 30.0  # it may load its model for it
FAILURES_MAX = 3  # of requests in a row, before it is asked for a token: until then it stays announced
QUESTION = "The quick brown fox jumped over the lazy dog."
QUESTIONS = {
    "chat": GenerationRequest(
        "chat", {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}, 64 * 1024
    ),
    "completions": GenerationRequest("completions", {"prompt": QUESTION, "max_tokens": 1}, 64 * 1024),
}
"""By modality; each reply has some hundred bytes."""


class SidecarModel:
    """One model. `up`: it has answered, and not failed since."""

    waiting_tokens = 0  # nothing waits in a sidecar
    tokens_per_s = 0.0  # unknown: gateways see for themselves
    shortage = ""

    def __init__(self, model: Model, clock: Clock) -> None:
        self.model = model
        self.up = False
        self._clock = clock
        self._failures = 0
        self._due = clock.monotonic()

    def answered(self) -> None:
        """A request, or a question, was answered."""
        self.up, self._failures, self._due = True, 0, self._clock.monotonic() + SERVER_QUIET_S

    def failed(self, failure: NodeFailure, *, by_question: bool = False) -> None:
        """One was not. What is refused as wrong, or for its load, says nothing of the server."""
        if isinstance(failure, NodeBusy) or (isinstance(failure, UpstreamRefused | NotAsAsked) and not by_question):
            return
        self._failures += 1
        self._due = self._clock.monotonic() + AGAIN_S[min(self._failures, len(AGAIN_S)) - 1]
        if self.up and (by_question or self._failures >= FAILURES_MAX):
            self.up = False
            log.warning("the server does not answer for %s: %s", self.model.id, failure.message)

    def is_due(self) -> bool:
        """Whether it should be asked for a token."""
        return self._clock.monotonic() >= self._due


class SidecarModels:
    """By id. As `LoadedModels`, for what `node.main` needs of it."""

    def __init__(self, models: Iterable[Model], upstream: UpstreamGeneration, clock: Clock) -> None:
        self._models = {model.id: SidecarModel(model, clock) for model in models}
        self._upstream = upstream
        self.some = asyncio.Event()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __iter__(self) -> Iterator[SidecarModel]:
        return iter(self._models.values())

    def up(self) -> list[SidecarModel]:
        """Those that may be announced."""
        return [each for each in self if each.up]

    def find(self, model_id: str) -> SidecarModel | None:
        """The model of that id."""
        return self._models.get(model_id)

    async def load_all(self, models: Iterable[Model]) -> None:
        """Ask the server whenever that is due, until cancelled. `some` is set once a first model is up."""
        while True:
            await asyncio.gather(*(self._ask(each) for each in self if each.is_due()))
            if self.up():
                self.some.set()
            await asyncio.sleep(SERVER_LOOK_S)

    async def stop(self) -> None:
        """Nothing of the server's is ended."""

    async def _ask(self, asked: SidecarModel) -> None:
        modality = next((each for each in asked.model.modalities if each in QUESTIONS), None)
        if modality is None:
            asked.answered()
            return
        try:
            async with asyncio.timeout(QUESTION_S):
                reply = await self._upstream.generate(asked.model, QUESTIONS[modality])
            choices: Any = msgspec.json.decode(reply, type=dict[str, Any]).get("choices")
            if not isinstance(choices, list) or len(choices) != 1:
                raise ValueError
        except NodeFailure as failure:
            asked.failed(failure, by_question=True)
        except (TimeoutError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            asked.failed(NodeFailure("it gives no answer of OpenAI's form"), by_question=True)
        else:
            asked.answered()
