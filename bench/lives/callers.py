"""Callers: they send requests, hang up, and retry, with or without an `Idempotency-Key`, at this gateway or another."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from bench.lives.exchange import Exchange, Outcome
from bench.lives.gateway import Gateway, Traits
from bench.lives.journal import Errand, Journal
from bench.lives.locking import LOCK, SEALED, envelope
from bench.lives.loop import Loop
from bench.lives.talking import STREAM, talk
from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.errors import Failure, Retry
from embedmesh.rules.exchange import Reply, RequestHead, StreamedReply
from embedmesh.rules.limits import LOCK_S_MAX, LOCK_S_MIN

SHARE_ODDS = 0.35  # of a caller to do the same as another: the same key, the same body
OTHER_BODY_ODDS = 0.04  # of those: the same Idempotency-Key for something else, by mistake
TRIES_MAX = 5
WAIT_S_MAX = 40.0
STREAM_WAIT_S = 240.0  # longer than a stream of these nodes may take
LEAVES_EVENTS_MAX = 30
LEAVES_S_MAX = {False: 3.0, True: 0.3}  # a node takes 0.05 s
AGAIN_S = (0.01, 0.5, 1.0, 2.0)  # as SDKs wait
UNITS_MAX = 40  # tokens of a lock
ABANDON_ODDS = 0.2  # of a lock that its caller does not use
LATE_ODDS, LATE_S_MAX = 0.2, 40.0  # of one that it uses late, or too late
TWICE_ODDS, OTHER_SEALED_ODDS = 0.2, 0.1  # of the same sealed request at the same moment; of another with the same lock
LOCKS_MAX = 3  # that one caller takes, one after the other


class Station:
    """Where a gateway runs; another one starts there when it has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gateway: Gateway | None = None


def make_errands(
    dice: random.Random, keys: Sequence[tuple[str, str, str]], number: int, traits: Traits
) -> list[Errand]:
    """The errands of one world. `keys` are accounts, key ids and tokens; plain errands have the first, and no more."""
    errands: list[Errand] = []
    odds = traits.ordinary_odds
    for _ in range(number):
        if traits.talk_odds and dice.random() < traits.talk_odds:
            errands.append(talk(dice, *dice.choice(keys), len(errands)))
            continue
        if traits.sealed_odds and dice.random() < traits.sealed_odds:
            errands.append(_lock(dice, *dice.choice(keys), len(errands)))
            continue
        if dice.random() < traits.plain_odds:
            errands.append(Errand(*keys[0], *_body(dice, len(errands), odds), None, sdk=dice.random() < 0.5))
            continue
        with_idem = [errand for errand in errands if errand.idem is not None]
        if with_idem and dice.random() < SHARE_ODDS:
            errand = dice.choice(with_idem)
            if dice.random() < OTHER_BODY_ODDS:
                body, tokens = _body(dice, len(errands), odds)
                errand = errand._replace(body=body, tokens=tokens)
            errands.append(errand)
            continue
        account, key_id, token = dice.choice(keys)
        body, tokens = _body(dice, len(errands), odds)
        how = dice.random()
        idem = f"idem-{len(errands)}" if how < 0.45 else None
        errands.append(Errand(account, key_id, token, body, tokens, idem, sdk=0.3 < how < 0.8))
    return errands


def _lock(dice: random.Random, account: str, key_id: str, token: str, number: int) -> Errand:
    """A lock like no other."""
    span_s = LOCK_S_MIN + int(dice.random() ** 2 * (LOCK_S_MAX + 1 - LOCK_S_MIN))
    units = 1 + int(dice.random() * UNITS_MAX)
    return Errand(account, key_id, token, f"lock {number}".encode(), units, None, False, LOCK, span_s)


def _body(dice: random.Random, number: int, ordinary_odds: float) -> tuple[bytes, int]:
    """A body like no other, and its tokens. An ordinary one differs by the spaces at its end."""
    words = [_word(dice) for _ in range(1 + int(dice.random() ** 3 * 6))]
    quoted = ",".join(f'"{word}"' for word in words)
    if dice.random() < ordinary_odds:
        body = f'{{"model":"tiny","input":[{quoted}]}}{" " * number}'
    else:
        body = f'{{"model":"tiny","input":[{quoted}],"user":"u{number}"}}'
    return body.encode(), sum(map(len, words)) + 2 * len(words)


def _word(dice: random.Random) -> str:
    """One to six letters; some words come often."""
    first = int(dice.random() ** 2 * 20)
    return "abcdefghijklmnopqrstuvwxyz"[first : first + 1 + int(dice.random() * 6)]


class Callers:
    """All callers of one world."""

    def __init__(
        self, stations: Sequence[Station], loop: Loop, dice: random.Random, traits: Traits, journal: Journal
    ) -> None:
        self._stations = stations
        self._loop = loop
        self._dice = dice
        self._traits = traits
        self._journal = journal

    async def live(self, number: int, errand: Errand) -> None:
        """One life: from arrival to its end."""
        await asyncio.sleep(self._dice.random() * self._traits.spans_s)
        if errand.wants == LOCK:
            await self._live_by_locks(number, errand)
        else:
            await self._send(number, errand)

    async def _live_by_locks(self, number: int, errand: Errand) -> None:
        """Lock, seal, send; or abandon the lock. What is refused for its lock's sake is sealed again for another."""
        dice, seen = self._dice, self._journal.seen
        for _ in range(LOCKS_MAX):
            terms = await self._send(number, errand)
            if not isinstance(terms, LockTerms):
                return
            seen["locks"] += 1
            if dice.random() < ABANDON_ODDS:
                seen["locks abandoned"] += 1
                return
            if dice.random() < LATE_ODDS:
                await asyncio.sleep(dice.random() * LATE_S_MAX)
            tokens = 1 + int(dice.random() * terms.units)
            body = envelope(terms, tokens, dice)
            sealed = errand._replace(body=body, tokens=tokens, idem=f"lock {terms.lock_id}", wants=SEALED)
            sending = [self._send(number, sealed)]
            if dice.random() < TWICE_ODDS:
                sending.append(self._send(number, sealed))
            if dice.random() < OTHER_SEALED_ODDS:
                sending.append(self._send(number, sealed._replace(body=envelope(terms, tokens, dice))))
            outcome, *_ = await asyncio.gather(*sending)
            if isinstance(outcome, Reply):
                seen["sealed replies"] += 1
                return

    async def _send(self, number: int, errand: Errand) -> Outcome:
        """Until there is a reply, or it gives up: the last outcome."""
        dice = self._dice
        outcome: Outcome = None
        sticks_to = dice.choice(self._stations)  # SDKs keep a connection, so that a retry often finds its first try
        for tried in range(TRIES_MAX):
            if tried:
                await asyncio.sleep(AGAIN_S[min(tried, len(AGAIN_S)) - 1] * (0.75 + 0.5 * dice.random()))
            station = sticks_to if dice.random() < 0.6 else dice.choice(self._stations)
            gateway = station.gateway
            if gateway is None or not gateway.serves:
                self._journal.seen["refused connections"] += 1
                await asyncio.sleep(dice.random())
                continue
            self._journal.say(self._loop.now, f"c{number}", f"sends to {gateway.name}, try {tried}, {errand.idem}")
            retries = tried if errand.sdk else None
            idem = None if errand.wants == SEALED else errand.idem
            asked = RequestHead(f"Bearer {errand.token}", idem, retries)
            outcome = await self._wait(gateway, gateway.ask(number, errand, asked))
            if isinstance(outcome, LockTerms):
                return outcome
            if isinstance(outcome, StreamedReply):
                return outcome
            if isinstance(outcome, Reply):
                self._journal.seen["replies"] += 1
                if errand.idem is None or dice.random() < 0.8:
                    return outcome
                continue  # it has lost the reply
            if isinstance(outcome, Failure):
                self._journal.seen[outcome.code] += 1
                if outcome.retry is Retry.USELESS and dice.random() < 0.7:
                    return outcome
            else:
                self._journal.seen["broken connections"] += 1
        return outcome

    async def _wait(self, gateway: Gateway, exchange: Exchange) -> Outcome:
        """The outcome, if it does not hang up before."""
        dice = self._dice
        leaves = dice.random() < self._traits.leave_odds
        wait_s = dice.random() ** 3 * LEAVES_S_MAX[self._traits.busy] if leaves else WAIT_S_MAX
        if exchange.attempt.errand.wants == STREAM:
            return await self._read(gateway, exchange, leaves)
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.shield(exchange.outcome)
        except TimeoutError:
            self._hang_up(gateway, exchange)
            return None

    async def _read(self, gateway: Gateway, exchange: Exchange, leaves: bool) -> Outcome:
        """A stream, to its end, for a number of events, or for a while."""
        dice = self._dice
        wait_s = STREAM_WAIT_S
        if leaves:
            exchange.leaves_after = 1 + int(dice.random() ** 2 * LEAVES_EVENTS_MAX)
            wait_s *= dice.random()
        either: set[asyncio.Future[Any]] = {exchange.outcome, exchange.enough}
        await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if exchange.outcome.done():
            return exchange.outcome.result()
        self._hang_up(gateway, exchange)
        return None

    def _hang_up(self, gateway: Gateway, exchange: Exchange) -> None:
        self._journal.seen["hang-ups"] += 1
        self._journal.say(self._loop.now, f"c{exchange.attempt.life}", "hangs up")
        gateway.hang_up(exchange)
