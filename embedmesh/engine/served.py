"""One model that a node serves: its tokenizer, its queue and its worker, put together."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from embedmesh.engine.admit import Admission
from embedmesh.engine.folder import read_folder
from embedmesh.engine.frames import Load
from embedmesh.engine.plan import Plan
from embedmesh.engine.process import WorkerBroke
from embedmesh.engine.supervise import Supervisor
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules import errors
from embedmesh.rules.embeddings import INPUTS_MAX, REQUEST_TOKENS_MAX
from embedmesh.rules.errors import NodeBroke, SetupError
from embedmesh.rules.models import Model

INLINE_CHARS = 2_000  # about half a millisecond to tokenise; less than that is not worth a change of thread


def usable_cores() -> int:
    """The cores that this process may run on: a container or `taskset` may leave it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Served:
    """A model with everything that answers for it. `start`, then run `keep`, then `stop`."""

    def __init__(
        self,
        model: Model,
        *,
        threads: int,
        queue_tokens_max: int,
        executor: Executor,
        on_batch: Callable[[Plan, float], None] = lambda plan, seconds: None,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Reads the tokenizer; raises SetupError. `executor` tokenises long texts, off the event loop.

        `threads` of the engine; 0 takes all cores that this process may run on.
        """
        self.model = model
        folder = Path(model.folder)
        self._tokenizer = ModelTokenizer(folder, model.max_tokens)
        if self._tokenizer.vocab_size > read_folder(folder).config.get("vocab_size", 0):
            raise SetupError(
                f"The tokenizer of {folder.name} knows more tokens than its weights: fetch the model again."
            )
        self._executor = executor
        load = Load(str(folder), model.digest, model.width, model.max_tokens, threads or usable_cores())
        self._supervisor = Supervisor(load, on_start=on_start)
        self._loaded = asyncio.Event()
        self._admission = Admission(self._run, tokens_max=queue_tokens_max, on_batch=on_batch)

    async def start(self) -> None:
        """Load the model and embed a first text. Raises SetupError in one line."""
        try:
            await self._supervisor.start()
        except WorkerBroke as error:
            raise SetupError(
                f"The engine of {self.model.id} {error} while it started. Is there enough memory?"
            ) from None
        finally:
            self._loaded.set()  # also in vain: whoever waits is told that it is down

    async def keep(self) -> None:
        """Answer calls and keep the worker alive once it is loaded, until cancelled."""
        await self._loaded.wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._admission.dispatch())
            tasks.create_task(self._supervisor.keep())

    async def stop(self) -> None:
        """End the worker."""
        await self._supervisor.stop()

    def ready(self) -> bool:
        """Whether a forward pass succeeded just now."""
        return self._supervisor.ready()

    @property
    def waiting_tokens(self) -> int:
        """Padded tokens that wait for their batch."""
        return self._admission.waiting_tokens

    async def prepare(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        """What the model is given for each text or list of native ids, special tokens added.

        Raises a CallerFailure that names the input. Special tokens may be among the ids, as they come from texts that
        spell them; an empty list is what a text of white space has become.
        """
        if not inputs:
            raise errors.EmptyInput("There is nothing to embed.", param="input")
        if len(inputs) > INPUTS_MAX:
            raise errors.TooManyInputs(f"At most {INPUTS_MAX:,} inputs are taken at once.", param="input")
        texts = [one for one in inputs if isinstance(one, str)]
        tokenised = iter(await self._tokenise(texts))
        sequences = []
        for at, one in enumerate(inputs):
            ids = next(tokenised) if isinstance(one, str) else one
            self._check(at, one, ids)
            sequences.append(self._tokenizer.with_specials(ids))
        if sum(map(len, sequences)) > REQUEST_TOKENS_MAX:
            message = (
                f"The inputs have more than {REQUEST_TOKENS_MAX:,} tokens in all. Split them over several requests."
            )
            raise errors.MaxTokensPerRequest(message, param="input")
        return sequences

    async def embed(self, sequences: list[list[int]]) -> list[bytes]:
        """One vector a sequence: little-endian float32. Raises Overloaded, or NodeBroke when the engine is down."""
        await self._loaded.wait()
        if self._supervisor.down:
            raise NodeBroke("The engine is down and is being restarted.")
        return await self._admission.embed(sequences)

    async def _run(self, sequences: list[list[int]], rows: int, length: int) -> list[bytes | None]:
        try:
            return await self._supervisor.run_each(sequences, rows, length)
        except NodeBroke as failure:
            if self._supervisor.down:
                self._admission.fail_waiting(failure)
            raise

    async def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if sum(map(len, texts)) <= INLINE_CHARS:
            return self._tokenizer.ids(texts)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._tokenizer.ids, texts)

    def _check(self, at: int, given: str | list[int], ids: list[int]) -> None:
        if given == "":
            raise errors.EmptyInput("This input is empty.", param=f"input.{at}")
        if ids and not (min(ids) >= 0 and max(ids) < self._tokenizer.vocab_size):
            message = f"Token ids of this model are 0 to {self._tokenizer.vocab_size - 1}."
            raise errors.InvalidValue(message, param=f"input.{at}")
        tokens = len(ids) + self._tokenizer.specials
        if tokens > self.model.max_tokens:
            message = (
                f"This input has {tokens} tokens; the model takes {self.model.max_tokens}, special tokens included."
            )
            raise errors.ContextLengthExceeded(message, param=f"input.{at}")
