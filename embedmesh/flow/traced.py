"""The life of a traced request: the ports that its work sees mark what they do, and pass it on.

Nothing of the flow knows of this. A request whose trace was not begun sees the ports themselves.
"""

from collections.abc import Awaitable, Callable
from copy import copy
from typing import Any, cast

import msgspec

from embedmesh.flow.bill import Bill, HoldEnds
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.embed import Embedded
from embedmesh.flow.generate import GenerationCall
from embedmesh.flow.operation import Bound, CanPayFor, Invocation, Operation
from embedmesh.flow.traced_nodes import (
    CANCELLED,
    Now,
    RequestTracing,
    TracedAttempts,
    TracedClient,
    TracedFleet,
    TracedGenerating,
)
from embedmesh.flow.world import World
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import Delivery, RequestHead
from embedmesh.rules.forwarding import Fleet, NodeClient
from embedmesh.rules.holds import Charge, Hold, HoldEnd, Meter, Metered
from embedmesh.rules.ports import Caller, Ledger
from embedmesh.rules.traces import Attribute, Trace

OPERATIONS = {"chat": "chat", "completions": "text_completion", "images": "image_generation", "rerank": "rerank"}
"""By modality, in the words of OpenTelemetry's conventions for generative AI where they have one."""
EMBEDS = "embeddings"
BATCHES = "batches of "  # whose share of the rate is not that of the account's requests


class TracedLedger:
    """As much of a ledger as a bill and the straight path need."""

    def __init__(self, ledger: HoldEnds, trace: Trace, now: Now) -> None:
        self._ledger = ledger
        self._trace = trace
        self._now = now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    def spend(self, hold: Hold) -> Hold | None:
        trace, began = self._trace, self._now()
        found = cast(Ledger, self._ledger).spend(hold)
        if found is not None:
            trace.mark("count", trace.began, began)
            trace.mark("hold", began, self._now())
            trace.tell({"embedmesh.request_id": found.hold_id})
        return found

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        began = self._now()
        self._ledger.capture(hold, charge, reply)
        self._trace.mark("capture", began, self._now())
        note_usage(self._trace, charge.tokens, charge.meters, charge.cost_nanousd)

    def release(self, hold: Hold, why: HoldEnd) -> None:
        self._ledger.release(hold, why)


def note_usage(trace: Trace, tokens: int, meters: tuple[Metered, ...], nanousd: int) -> None:
    """What was charged; without `meters` it was `tokens` of input."""
    found: dict[str, Attribute] = {"gen_ai.usage.input_tokens": tokens, "embedmesh.cost_nanousd": nanousd}
    if meters:
        used = dict.fromkeys(Meter, 0)
        for each in meters:
            used[each.meter] += each.quantity
        found["gen_ai.usage.input_tokens"] = used[Meter.INPUT] + used[Meter.CACHED]
        found["gen_ai.usage.cache_read.input_tokens"] = used[Meter.CACHED]
        found["gen_ai.usage.output_tokens"] = used[Meter.OUTPUT]
    trace.tell(found)


def traced_world(world: World, attempts: TracedAttempts, ledger: TracedLedger | None = None) -> World:
    """The world as the work on one traced request sees it."""
    return msgspec.structs.replace(
        world,
        fleet=cast(Fleet, TracedFleet(world.fleet, attempts)),
        client=cast(NodeClient, TracedClient(world.client, attempts)),
        ledger=world.ledger if ledger is None else cast(Ledger, ledger),
    )


class TracedOperation:
    """Implements the protocol `Operation`, for one request, around the real one."""

    def __init__(self, operation: Operation, traced: RequestTracing, traceparent: str | None) -> None:
        self.trace: Trace | None = None  # once it has begun
        self._operation = operation
        self._traced = traced
        self._traceparent = traceparent
        self._began = traced.now()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operation, name)

    def parse(self, world: World, head: RequestHead, body: bytes) -> Invocation:
        call = self._operation.parse(world, head, body)
        return cast(Invocation, TracedCall(call, self._operation, self._traced, self._begin))

    def _begin(self, account_id: str) -> Trace | None:
        self.trace = trace = self._traced.tracing.begin(self._traceparent, account_id, self._began)
        if trace is not None:
            trace.tell({"embedmesh.account_id": account_id})
        return trace

    async def ending(self, outcome: Awaitable[Outcome]) -> Outcome:
        """Await the request's end, and end its trace."""
        return await ending(self._traced, lambda: self.trace, outcome)


class TracedCall:
    """Implements the protocol `Invocation`, around the real one."""

    trace: Trace | None = None

    def __init__(
        self, call: Invocation, operation: Operation, traced: RequestTracing, begin: Callable[[str], Trace | None]
    ) -> None:
        """`begin` decides whether this request, of that account, is traced."""
        self._call = call
        self._operation = operation
        self._traced = traced
        self._begin = begin
        self._bounded: float | None = None  # when it was; then money is set aside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        self.trace = trace = self._begin(caller.account_id)
        if trace is None:
            return await self._call.count(world, caller, can_pay_for)
        describe(trace, self._call, self._operation)
        began, error = self._traced.now(), CANCELLED
        try:
            tokens = await self._call.count(world, caller, can_pay_for)
            error = ""
        except Failure as failure:
            error = failure.code
            raise
        finally:
            trace.mark("count", began, self._traced.now(), error)
        return tokens

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        bound = self._call.bound(world, caller, claimed=claimed)
        self._bounded = self._traced.now()
        if bound.free is not None and self.trace is not None:
            self.trace.tell({"embedmesh.cached": True})
        return bound

    async def work(self, world: World, bill: Bill) -> Any:
        trace, call, now = self.trace, self._call, self._traced.now
        if trace is None:
            return await call.work(world, bill)
        if self._bounded is not None:
            trace.mark("hold", self._bounded, now())
        sealed = call.lock is not None
        trace.tell({"embedmesh.request_id": bill.hold.hold_id, "embedmesh.confidential": sealed})
        bill.ledger = TracedLedger(bill.ledger, trace, now)
        attempts = TracedAttempts(trace, self._traced, sealed=sealed)
        if isinstance(call, GenerationCall):
            call.operation = copy(call.operation)
            client = call.operation.client
            client = client.client if isinstance(client, TracedGenerating) else client  # of a try before
            call.operation.client = TracedGenerating(client, attempts)
        result = await call.work(traced_world(world, attempts), bill)
        if isinstance(result, Embedded) and result.cached:
            trace.tell({"embedmesh.cached_inputs": result.cached})
        return result


class TracedLine(TracedCall):
    """A line of a batch. Its trace is that of one try to have it done.

    It is counted before, and charged with others after: neither is in the trace.
    """

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        return await self._call.count(world, caller, can_pay_for)

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        return self._call.bound(world, caller, claimed=claimed)

    async def work(self, world: World, bill: Bill) -> Any:
        self.trace = trace = self._begin(bill.hold.account_id)
        if trace is None:
            return await self._call.work(world, bill)
        describe(trace, self._call, self._operation)
        error = CANCELLED
        try:
            result = await super().work(world, bill)
            note_usage(trace, bill.tokens, bill.metered or (), bill.cost)
            error = ""
        except Failure as failure:
            error = failure.code
            raise
        finally:
            self._traced.tracing.end(trace, self._traced.now(), error)
        return result


class TracedBatchOperation:
    """Implements the protocol `Operation` for the lines of one batch: their share of the rate is their own."""

    def __init__(self, operation: Operation, traced: RequestTracing, batch_id: str) -> None:
        self._operation = operation
        self._traced = traced
        self._batch_id = batch_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operation, name)

    def parse(self, world: World, head: RequestHead, body: bytes) -> Invocation:
        call = self._operation.parse(world, head, body)
        return cast(Invocation, TracedLine(call, self._operation, self._traced, self._begin))

    def _begin(self, account_id: str) -> Trace | None:
        trace = self._traced.tracing.begin(None, BATCHES + account_id, self._traced.now())
        if trace is not None:
            trace.tell({"embedmesh.account_id": account_id, "embedmesh.batch_id": self._batch_id})
        return trace


def describe(trace: Trace, call: Invocation, operation: Operation) -> None:
    """What is asked for, in the catalogue's words: none of the caller's."""
    modality = call.prompt.modality if isinstance(call, GenerationCall) else getattr(operation, "modality", "")
    does = OPERATIONS.get(modality, EMBEDS)
    trace.name = f"{does} {call.model.id}"
    trace.tell(
        {"gen_ai.operation.name": does, "gen_ai.request.model": call.model.id, "gen_ai.request.stream": call.streams}
    )


async def ending(traced: RequestTracing, find: Callable[[], Trace | None], outcome: Awaitable[Outcome]) -> Outcome:
    """Await a request's end, and end its trace, if `find` finds one then. Raises what the request does."""
    error = "dropped"  # its caller has gone
    try:
        ended = await outcome
        error = "" if ended.delivery is Delivery.WHOLE else ended.delivery.value
        return ended
    except Failure as failure:
        error = failure.code
        raise
    except ConnectionError:
        raise
    except Exception:
        error = "internal_error"
        raise
    finally:
        if (trace := find()) is not None:
            traced.tracing.end(trace, traced.now(), error)
