"""A stream on its way to a caller, part by part, as `embedmesh.http.streaming` would carry it."""

import asyncio
import random
from typing import TYPE_CHECKING

import orjson

from bench.lives.journal import Journal, Noted, Streamed
from bench.lives.loop import Loop
from embedmesh.rules.exchange import Delivery, StreamedReply
from embedmesh.rules.generation import TokenCounts
from embedmesh.rules.holds import StreamNote
from embedmesh.rules.limits import WRITE_REPLY_S
from embedmesh.storage.store import Store

if TYPE_CHECKING:
    from bench.lives.exchange import Exchange

READS_S = (0.01,) * 14 + (0.5,) * 4 + (5.0, 1.1 * WRITE_REPLY_S)  # the most that a caller takes to read a part
PARTS = 8.0  # in which as many callers are lost as in one whole reply
DONE = b"data: [DONE]\n\n"


class Streaming:
    """One stream. `send` it."""

    def __init__(
        self, exchange: "Exchange", reply: StreamedReply, loop: Loop, dice: random.Random, odds: float, journal: Journal
    ) -> None:
        """`odds` are those of a caller that is lost on the way."""
        self._exchange = exchange
        self._reply = reply
        self._loop, self._dice, self._journal = loop, dice, journal
        self._odds = odds / PARTS
        self._reads_s = dice.choice(READS_S)
        self._hold_id = reply.headers["x-embedmesh-request"]
        attempt = exchange.attempt
        self._seen = Streamed(attempt.life, attempt.errand, attempt.gateway, attempt.began)

    async def send(self) -> Delivery:
        """All parts. Raises ConnectionResetError if the caller went before it had any."""
        exchange, seen, begun = self._exchange, self._seen, False
        if self._hold_id in self._journal.streams:
            self._journal.wrong.append(f"{self._hold_id} has two streams")
        self._journal.streams[self._hold_id] = seen
        exchange.left = self._left
        try:
            async for part in self._reply.parts:
                if exchange.lost_it.done():
                    break
                exchange.sending = True
                try:
                    delivery = await self._hand_over(part)
                except ConnectionResetError:
                    break
                begun = True
                if delivery is Delivery.BROKEN_OFF:
                    return self._ended("broken off")
            else:
                if not exchange.lost_it.done() and self._dice.random() >= self._odds:
                    exchange.answer(self._reply)
                    return self._ended("whole")
        except BaseException:
            self._ended("cancelled")
            raise
        finally:
            exchange.left = None
        if begun:
            return self._ended("broken off")
        self._ended("broken off")
        raise ConnectionResetError("the caller went before any of the reply was sent")

    async def _hand_over(self, part: bytes) -> Delivery:
        seen, dice = self._seen, self._dice
        event = orjson.loads(part[6:]) if part.startswith(b"data: {") else None
        if event is not None and "error" in event:
            slow = "faster" in event["error"]["message"]  # its caller's own doing, which is paid
            seen.failed = not slow
            self._journal.seen["streams read too slowly"] += slow
            event = None
        if event is not None:
            seen.offered = self._said
        takes_s = dice.random() * self._reads_s
        lost, _ = await asyncio.wait({self._exchange.lost_it}, timeout=min(takes_s, WRITE_REPLY_S))
        if takes_s > WRITE_REPLY_S and not lost:
            self._journal.seen["streams not read in time"] += 1
            return Delivery.BROKEN_OFF
        if lost or dice.random() < self._odds:
            if dice.random() < 0.5:
                raise ConnectionResetError("the caller is gone")
            return Delivery.BROKEN_OFF  # some bytes of the part had left
        if event is None:
            self._journal.seen["comments"] += part.startswith(b":")
            return Delivery.WHOLE
        seen.handed.append((self._loop.now, seen.offered))
        seen.text_bytes += sum(len(choice["delta"].get("content") or "") for choice in event["choices"])
        if (told := event.get("usage")) is not None:
            cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            seen.usage = TokenCounts(told["prompt_tokens"], told["completion_tokens"], cached)
        self._exchange.had(len(seen.handed))
        return Delivery.WHOLE

    def _left(self) -> None:
        if not self._seen.end:
            self._seen.noticed = self._loop.now
            self._reply.left()

    @property
    def _said(self) -> int:
        """How much the node has said by now."""
        speeches = self._journal.speeches.get(self._hold_id)
        return len(speeches[-1].said) if speeches else 0

    def _ended(self, how: str) -> Delivery:
        seen, exchange = self._seen, self._exchange
        seen.end, seen.ended = how, self._loop.now
        self._journal.seen[f"streams: {how}"] += 1
        self._journal.seen["streams: failed"] += seen.failed
        words = f"{self._hold_id}, {len(seen.handed)} events" + (", failed" if seen.failed else "")
        self._journal.say(self._loop.now, seen.gateway, f"has streamed to {seen.life}: {words}, {how}")
        if how != "whole":
            exchange.answer(None)
        return Delivery.WHOLE if how == "whole" else Delivery.BROKEN_OFF


class Noting:
    """The store, as leases need it, with a witness: what is noted of streams, and when, is written down."""

    def __init__(self, store: Store, gateway: str, loop: Loop, journal: Journal) -> None:
        self._store = store
        self._gateway = gateway
        self._loop = loop
        self._journal = journal

    async def extend(self, notes: list[StreamNote]) -> frozenset[str]:
        now, noted = self._loop.now, {}
        for note in notes:
            noted[note.hold.hold_id] = one = Noted(now, self._gateway, note.charge.cost_nanousd)
            self._journal.notes.setdefault(note.hold.hold_id, []).append(one)
        extended = await self._store.extend(notes)
        for hold_id in extended:
            noted[hold_id].durable = True
        self._journal.seen["notes"] += len(extended)
        self._journal.say(now, self._gateway, f"notes {[(each, noted[each].cost) for each in sorted(extended)]}")
        return extended
