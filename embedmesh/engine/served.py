"""One model that a node serves: its tokenizer, its queue and its worker, put together."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from embedmesh.engine.batch_queue import BatchQueue, EmbedCall, OnEnd
from embedmesh.engine.folder import read_folder
from embedmesh.engine.frames import Loading, LoadModel
from embedmesh.engine.memory import MemoryRoom
from embedmesh.engine.plan import Plan
from embedmesh.engine.process import WorkerBroke
from embedmesh.engine.reranker import check_scores
from embedmesh.engine.supervise import Supervisor
from embedmesh.engine.threads import EngineThreads, engine_threads
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules import errors
from embedmesh.rules.deadlines import request_s
from embedmesh.rules.errors import NodeBroke, NodeFailure, SetupError
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, REQUEST_TOKENS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import SHORTAGES, Shortage

log = logging.getLogger("embedmesh.engine")


class Served:
    """A model with its tokenizer, queue and worker. `start`, then run `keep`, then `stop`."""

    def __init__(
        self,
        model: Model,
        *,
        threads: int,
        queue_tokens_max: int,
        on_batch: Callable[[Plan, float], None] = lambda plan, seconds: None,
        on_start: Callable[[], None] = lambda: None,
        memory: MemoryRoom | None = None,
    ) -> None:
        """Reads the tokenizer; raises SetupError. `threads` of the engine; 0 takes what the machine lets us use.

        That is looked at when the engine starts, and at each start after that. `memory` is the room that all models of
        the node share.
        """
        self.model = model
        self._threads_asked = threads
        self._on_start = on_start
        self.threads: EngineThreads | None = None
        folder = Path(model.folder)
        self.tokenizer = ModelTokenizer(folder, model.max_tokens)
        self._whole = self.tokenizer.marked if model.reranks else self.tokenizer.with_specials
        read = read_folder(folder)
        check_scores(model, read.scores)
        self.normal = read.normalize  # whether vectors have unit length by themselves
        if self.tokenizer.vocab_size > read.vocab_size:
            raise SetupError(
                f"The tokenizer of {folder.name} knows more tokens than its weights: fetch the model again."
            )
        load = LoadModel(str(folder), model.digest, model.width, model.max_tokens, threads, model.tier)
        self._supervisor = Supervisor(load, on_start=self._starting, memory=memory)
        self._loaded = asyncio.Event()
        self._queue = BatchQueue(
            self._supervisor.begin, tokens_max=queue_tokens_max, on_batch=on_batch, on_failure=self._failed
        )

    async def start(self) -> None:
        """Load the model and embed a first text. Raises SetupError in one line. `keep` goes on trying then."""
        try:
            await self._supervisor.start()
            self._tell_threads()
        except WorkerBroke as error:
            raise SetupError(f"The engine of {self.model.id} {error} while it started.") from None
        finally:
            self._loaded.set()  # after a failure too: waiting calls then learn that it is down

    def _starting(self) -> None:
        """Its worker sees what we see now: it is in the same control group, on the same CPUs."""
        before, self.threads = self.threads, engine_threads(self._threads_asked)
        if before not in (None, self.threads):
            self._tell_threads()
        self._on_start()

    def _tell_threads(self) -> None:
        if not self._threads_asked:  # who has asked knows
            log.info("the engine of %s has %s", self.model.id, self.threads)

    async def loaded(self) -> None:
        """Wait until `start` has ended, with or without success."""
        await self._loaded.wait()

    async def keep(self) -> None:
        """Keep the worker alive once it is loaded, until cancelled."""
        await self._loaded.wait()
        await self._supervisor.keep()

    async def stop(self) -> None:
        """End the worker. Calls that still wait fail."""
        self._queue.fail_all(NodeBroke("The node no longer serves this model."))
        await self._supervisor.stop()

    def ready(self) -> bool:
        """Whether a forward pass succeeded just now."""
        return self._supervisor.ready()

    @property
    def up(self) -> bool:
        """Whether it was loaded, and is not known to be down."""
        return self._loaded.is_set() and not self._supervisor.down

    @property
    def shortage(self) -> Shortage:
        """What its worker is short of while it is starved, else ""."""
        return self._supervisor.shortage

    def state(self) -> str:
        """Its state in a few words, for operators."""
        if shortage := self.shortage:
            return f"starved: {SHORTAGES[shortage]}"
        if not self._loaded.is_set():
            return str(self._supervisor.progress)
        if self._supervisor.down:
            return "down: its engine does not start"
        return "ready" if self.ready() else "not embedding"

    @property
    def loading(self) -> Loading | None:
        """What it does while it is loaded for the first time; None once that has ended, or before the first step."""
        return None if self._loaded.is_set() else self._supervisor.progress.now

    async def idle(self) -> None:
        """Wait until every call is answered."""
        await self._queue.idle()

    @property
    def waiting_tokens(self) -> int:
        """Padded tokens that wait for their batch."""
        return self._queue.waiting_tokens

    @property
    def batch_began(self) -> float:
        """When the batch began that has just ended, for who is answered by it; on the monotonic clock."""
        return self._queue.batch_began

    @property
    def calls(self) -> tuple[int, int]:
        """Calls of which something waits for its batch, and calls whose last batch runs."""
        return self._queue.calls

    @property
    def tokens_per_s(self) -> float:
        """Padded tokens a second, over the last batches."""
        return self._queue.tokens_per_s

    def check(self, ids: list[list[int]]) -> int:
        """Tokens of a call from a gateway, special tokens included. Raises a CallerFailure that names the input.

        Special tokens may be among the ids, as they come from texts that spell them; an empty list is what a text of
        white space has become. Inputs of a model that reranks are pairs, each with one mark (`ENDS_FIRST`).
        """
        if not ids:
            raise errors.EmptyInput("There is nothing to embed.", param="input")
        if len(ids) > REQUEST_INPUTS_MAX:
            raise errors.TooManyInputs(f"At most {REQUEST_INPUTS_MAX:,} inputs are taken at once.", param="input")
        room = self.model.max_tokens - self.tokenizer.specials
        plain = [self._without_mark(one, at) for at, one in enumerate(ids)] if self.model.reranks else ids
        for at, one in enumerate(plain):
            if not one and not self.tokenizer.specials:
                raise errors.EmptyInput("This input has no token that the model knows.", param=f"input.{at}")
            if one and max(one) >= self.tokenizer.vocab_size:
                message = f"Token ids of this model are 0 to {self.tokenizer.vocab_size - 1}."
                raise errors.InvalidValue(message, param=f"input.{at}")
            if len(one) > room:
                message = (
                    f"This input has {len(one) + self.tokenizer.specials} tokens; the model takes "
                    f"{self.model.max_tokens}, special tokens included."
                )
                raise errors.ContextLengthExceeded(message, param=f"input.{at}")
        tokens = sum(map(len, ids)) + self.tokenizer.specials * len(ids)
        if tokens > REQUEST_TOKENS_MAX:
            message = (
                f"The inputs have more than {REQUEST_TOKENS_MAX:,} tokens in all. Split them over several requests."
            )
            raise errors.MaxTokensPerRequest(message, param="input")
        return tokens

    def _without_mark(self, pair: list[int], at: int) -> list[int]:
        """The ids of a pair as those of the vocabulary. Raises InvalidValue unless one ends the first segment."""
        mark = self.tokenizer.ends_first
        if pair.count(mark) != 1:
            message = "This model scores pairs: one id must be marked as the last one of the first text."
            raise errors.InvalidValue(message, param=f"input.{at}")
        plain = pair.copy()
        plain[pair.index(mark)] = self.tokenizer.between[-1]
        return plain

    @property
    def is_loaded(self) -> bool:
        """Whether `start` has ended: `begin` may be called."""
        return self._loaded.is_set()

    def begin(self, ids: list[list[int]], on_end: OnEnd, *, alone: bool = False) -> EmbedCall:
        """Embed checked ids without special tokens; equal inputs are run once. For `drop` if its caller goes.

        `on_end` is called later, with one little-endian float32 vector an input, or a NodeFailure. What runs `alone`
        shares no batch with other calls. Raises Overloaded at once, NodeBroke when the engine is down.
        """
        if self._supervisor.down:
            raise NodeBroke("The engine is down and is being restarted.")
        if len(ids) == 1:
            return self._queue.submit([self._whole(ids[0])], on_end, alone=alone)
        rows: dict[tuple[int, ...], int] = {}
        order = [rows.setdefault(tuple(each), len(rows)) for each in ids]

        def ended(outcome: list[bytes] | NodeFailure) -> None:
            on_end(outcome if isinstance(outcome, NodeFailure) else [outcome[row] for row in order])

        return self._queue.submit([self._whole(each) for each in rows], ended, alone=alone)

    def drop(self, call: EmbedCall) -> None:
        """The caller has gone."""
        self._queue.drop(call)

    async def embed(self, ids: list[list[int]], *, alone: bool = False) -> bytes:
        """As `begin`: all vectors, one after another. The queue before it decides how long it may take.

        Raises Overloaded at once, NodeFailure, DeadlineExceeded.
        """
        await self._loaded.wait()
        expected_s = self._queue.expected_s(sum(map(len, ids)) + self.tokenizer.specials * len(ids))
        ended: asyncio.Future[list[bytes] | NodeFailure] = asyncio.get_running_loop().create_future()
        call = self.begin(ids, lambda outcome: None if ended.done() else ended.set_result(outcome), alone=alone)
        try:
            async with asyncio.timeout(request_s(expected_s)):
                outcome = await ended
        except TimeoutError:
            raise errors.DeadlineExceeded("The call took longer than it may. Send fewer or shorter inputs.") from None
        finally:
            self.drop(call)
        if isinstance(outcome, NodeFailure):
            raise outcome
        return b"".join(outcome)

    def _failed(self, failure: NodeBroke) -> None:
        if self._supervisor.down:
            self._queue.fail_all(failure)
