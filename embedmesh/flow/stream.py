"""A stream on its way from a node to a caller, event by event.

Until the first event a node that fails is replaced, and the status line waits, up to FIRST_WAIT_S. After it there is no
second node: what fails then ends the stream with an error event, and without `[DONE]`. Nothing is read ahead: the next
event is asked for when the caller's socket has the last one.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from copy import copy
from typing import NamedTuple, Protocol

import msgspec

from embedmesh.deadline import within
from embedmesh.flow.bill import Bill
from embedmesh.flow.deliver import charge_of
from embedmesh.flow.forward import caller_failure
from embedmesh.flow.leases import Leases, StreamLease
from embedmesh.flow.one_node import OneNode
from embedmesh.flow.operation import Invocation
from embedmesh.flow.usage import Used
from embedmesh.flow.world import World
from embedmesh.rules.errors import (
    BadNodeResponse,
    DeadlineExceeded,
    Failure,
    NodeBroke,
    NodeFailure,
    NodeTooSlow,
    StoreUnavailable,
    UpstreamRefused,
    WrongAnswer,
)
from embedmesh.rules.forwarding import Part
from embedmesh.rules.generation import Piece, StreamState, TokenCounts
from embedmesh.rules.holds import Charge, HoldState, Meter, Metered
from embedmesh.rules.ports import Caller

FIRST_WAIT_S = 10.0  # the status line leaves then: hops cut a request that is silent for 30
COMMENT_S = 10.0  # between two comments to a caller that waits for the first event
FIRST_EVENT_S = 300.0  # of one node: a long prompt on a slow machine, or a model that is loaded for it
OPENING_S = 600.0  # until a first event, all nodes together: as long as any request may take
BETWEEN_S = 60.0  # between two events: the slowest useful machine says a word a second
STREAM_S = 3_600.0  # in all
READING_S, READING_SHARE = 10.0, 0.5  # that a caller may hold its node back while others wait: seconds, of its time
READING_MAX = 0.1  # of a stream's time, where that tells the node's speed,
READING_S_MIN = 1.0  # or seconds: of fast nodes, the writing alone is as much
COMMENT = b": \n\n"


class PieceStream(Protocol):
    """A node's stream, as its caller may have it. Closed once."""

    @property
    def is_whole(self) -> bool:
        """Whether it came to its own end; after `next` has given None."""
        ...

    async def next(self) -> Piece | None:
        """The next event; None after the last. Raises a NodeFailure, also where the stream was cut."""
        ...

    def close(self) -> None:
        """No more is wanted: the node can stop. Wakes who waits for `next` with NodeBroke."""
        ...


class StreamedCall(Invocation, Protocol):
    """A request whose reply is a stream: what differs by operation."""

    @property
    def leases(self) -> Leases:
        """Of all streams of this gateway."""
        ...

    async def open(self, part: Part, state: StreamState) -> PieceStream:
        """A node's stream, once its head has come. Raises a Failure; after a NodeFailure another node may be asked."""
        ...

    def owe(self, world: World, bill: Bill, part: Part, said: TokenCounts | None, text_bytes: int, events: int) -> Used:
        """Charge what was used until now, by the node's word, and by its text, which came in that many events."""
        ...

    def spend(self, world: World, spent: Used) -> None:
        """What it has used takes from the key's limits."""
        ...

    def learn(self, spent: Used) -> None:
        """It has ended well."""
        ...

    def ending(self, spent: Used, state: StreamState) -> tuple[bytes, ...]:
        """What follows the last event, each in a write of its own."""
        ...

    def failure_event(self, failure: Failure) -> bytes:
        """A failure as the data of an event."""
        ...


class OpenedStream(NamedTuple):
    """A node's stream, and its first event."""

    stream: PieceStream
    first: Piece


class Told(NamedTuple):
    """What a node has said until now: bytes of text, the events that had some, and the usage that it tells."""

    text_bytes: int = 0
    events: int = 0
    usage: TokenCounts | None = None

    def more(self, piece: Piece) -> "Told":
        """With one more event."""
        text = piece.text
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        return Told(self.text_bytes + size, self.events + bool(text), piece.usage or self.usage)


class Stream:
    """One stream, and its parts for the caller. `begin`, then read it, and close it."""

    def __init__(self, call: StreamedCall, world: World, caller: Caller, bill: Bill, node: OneNode) -> None:
        self._call = call
        self._world = world
        self._loop = asyncio.get_running_loop()
        self._bill = bill
        self._node = node
        self._opening: asyncio.Task[tuple[OpenedStream, Part]]
        self._caller = caller
        self._state = self._new_state()
        self._part: Part | None = None  # once there is an event
        self._now = Told()  # with the event that is being handed over
        self._handed: Told | None = None  # without it
        self._silent_from: float | None = None  # on the loop's clock, while the next event is waited for
        self._gone = self._lost = self._closed = False
        self._began = world.clock.monotonic()
        self._reading_s = 0.0  # that the caller took to read
        self._parts = self._made()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._parts

    async def __anext__(self) -> bytes:
        return await anext(self._parts)

    async def aclose(self) -> None:
        await self._parts.aclose()
        self._close()  # a generator that has not begun does nothing when it is closed

    async def begin(self) -> None:
        """Wait for the first event, but no longer than FIRST_WAIT_S. Raises a Failure if no node has one."""
        self._bill.owe(Metered(Meter.INPUT, 0, 0), shares=())
        self._opening = asyncio.create_task(self._opened())
        self._call.leases.add(StreamLease(self._bill, self._charge, self._hold_lost))
        try:
            await asyncio.wait({self._opening}, timeout=FIRST_WAIT_S)
            self._check_hold()
            if self._opening.done():
                self._opening.result()
        except BaseException:
            self._close()
            raise

    async def _made(self) -> AsyncGenerator[bytes, None]:
        """The events, for the caller. A failure is the last of them."""
        try:
            while not self._opening.done():
                yield COMMENT
                await asyncio.wait({self._opening}, timeout=COMMENT_S)
            if self._gone:
                return
            self._check_hold()
            (stream, first), self._part = self._opening.result()
            piece: Piece | None = first
            clock = self._world.clock
            with within(BETWEEN_S, self._patience_s):  # one for all: a new one for each event costs as much as its JSON
                while piece is not None:
                    self._now = self._now.more(piece)
                    handing = clock.monotonic()
                    if piece.data is not None:
                        yield b"data: %b\n\n" % piece.data
                    self._handed = self._now
                    now = clock.monotonic()
                    self._reading_s += now - handing
                    if (why := self._takes_too_long(now)) is not None:
                        yield self._event(why)  # the caller could have had all of it: what it has is paid
                        return
                    self._check_hold()
                    self._silent_from = self._loop.time()
                    piece = await stream.next()
                    self._silent_from = None
            for last in self._ended(stream):
                yield last
        except (Failure, TimeoutError) as reason:
            if not self._gone:
                yield self._broken(reason if not self._lost else _hold_ended())
        finally:
            self._close()

    def left(self) -> None:
        """The caller has gone: the node can stop."""
        self._gone = True
        self._stop()

    def _hold_lost(self) -> None:
        self._lost = True
        self._stop()

    def _check_hold(self) -> None:
        """Raise StoreUnavailable where the hold has ended, or may have: nobody would pay for what follows."""
        if self._lost or self._world.clock.unix_ms() > self._bill.hold.deadline_ms:
            raise _hold_ended()

    async def _opened(self) -> tuple[OpenedStream, Part]:
        """The first stream that has an event, and the part that its node works on. Raises a Failure."""
        try:
            with within(OPENING_S):
                return await self._node.ask(self._open)
        except TimeoutError:
            raise DeadlineExceeded("No node began to answer in time. Send a shorter prompt, or try again.") from None

    async def _open(self, part: Part) -> OpenedStream:
        """A node's stream with its first event. Raises a NodeFailure."""
        self._state = self._new_state()  # what a node has begun that failed is not the next one's
        try:
            with within(FIRST_EVENT_S):
                stream = await self._call.open(part, self._state)
                try:
                    first = await _first_of(stream)
                except BaseException:
                    stream.close()
                    raise
        except TimeoutError:
            raise NodeTooSlow("the server's first event did not come in time") from None
        return OpenedStream(stream, first)

    def _takes_too_long(self, now: float) -> Failure | None:
        """Why it ends here, through no fault of its node."""
        if now - self._began > STREAM_S:
            return DeadlineExceeded(
                "The stream took longer than a stream may. Ask for less at once, or read it faster."
            )
        slow = self._reading_s > max(READING_S, READING_SHARE * (now - self._began))
        if slow and self._world.fleet.others_wait(self._call.model, self._bill.hold.account_id):
            return DeadlineExceeded("The stream is read too slowly while others wait for its node. Read it faster.")
        return None

    def _event(self, failure: Failure) -> bytes:
        return b"data: %b\n\n" % self._call.failure_event(failure)

    def _new_state(self) -> StreamState:
        return StreamState(self._bill.hold.hold_id, self._world.clock.unix_ms() // 1000)

    def _patience_s(self) -> float:
        """How much longer the node may be silent. A caller that does not read has a deadline of its own."""
        return BETWEEN_S if self._silent_from is None else self._silent_from + BETWEEN_S - self._loop.time()

    def _ended(self, stream: PieceStream) -> tuple[bytes, ...]:
        """The node is done; what follows the last event. Raises NodeBroke if the stream was cut."""
        if not stream.is_whole:
            raise NodeBroke("the server's stream ended before its answer")
        if self._reading_s > max(READING_S_MIN, READING_MAX * (self._world.clock.monotonic() - self._began)):
            self._node.leave()  # how long that took tells the caller's speed
        else:
            self._node.answered()
        spent = self._owe(self._bill, self._now)
        self._call.learn(spent)
        return self._call.ending(spent, self._state)

    def _owe(self, bill: Bill, told: Told) -> Used:
        """Only where somebody asks: an event must not cost that."""
        assert self._part is not None
        return self._call.owe(self._world, bill, self._part, told.usage, told.text_bytes, told.events)

    def _broken(self, reason: Failure | TimeoutError) -> bytes:
        """The last event of a stream that has failed. It costs nothing, unless the operator charges for a part."""
        if isinstance(reason, TimeoutError):
            reason = NodeTooSlow("the server's next event did not come in time")
        if isinstance(reason, NodeFailure):
            self._node.failed(reason)
        if self._part is None or not self._call.model.charge_partial:
            self._bill.release()
        told = _not_whole(reason) if isinstance(reason, NodeFailure) else reason
        return self._event(told)

    def _charge(self) -> Charge:
        """What the caller's socket has by now, not what is on its way there; at first nothing."""
        bill = copy(self._bill)
        if self._handed is not None:
            self._owe(bill, self._handed)
        return charge_of(self._world, self._caller, self._call, bill)

    def _stop(self) -> None:
        self._opening.cancel()
        if self._opening.done() and not self._opening.cancelled() and self._opening.exception() is None:
            self._opening.result()[0].stream.close()

    def _close(self) -> None:
        """However it ended. What was not handed over is not charged."""
        if self._closed:
            return
        self._closed = True
        self._stop()
        self._node.leave()
        self._call.leases.remove(self._bill.hold.hold_id)
        if self._part is None:
            self._bill.release()
        elif self._bill.state is HoldState.OPEN:
            self._call.spend(self._world, self._owe(self._bill, self._now))


def _hold_ended() -> StoreUnavailable:
    return StoreUnavailable("The store was away for too long: the answer ends here. Ask again.")


async def _first_of(stream: PieceStream) -> Piece:
    """The first event that has something for the caller: until then it may still be another node's answer.

    Raises a NodeFailure.
    """
    usage: TokenCounts | None = None
    while (piece := await stream.next()) is not None:
        usage = piece.usage or usage
        if piece.data is not None:
            return msgspec.structs.replace(piece, usage=usage)
    raise WrongAnswer("the server's stream has no event")


def _not_whole(last: NodeFailure) -> Failure:
    """The caller's failure of a stream whose node has failed."""
    match last:
        case NodeTooSlow():
            return DeadlineExceeded("The server that was answering fell silent, so the answer is not whole. Ask again.")
        case UpstreamRefused():
            return caller_failure(last)
        case _:
            return BadNodeResponse("The server that was answering broke off, so the answer is not whole. Ask again.")
