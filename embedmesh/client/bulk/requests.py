"""Requests of a bulk run: what to do with each reply, and when to send it again.

A text that is refused must not cost the others their vectors: it is taken out, and the remaining ones are sent again.
An error of the whole run (key, model, money, a setting) ends it at once. Errors that pass are waited out, as long as
there was a reply lately; if a request was too large, later ones are smaller.
"""

import asyncio
import hashlib
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np

from embedmesh.client.bulk.packing import Packing, Text, Unit, size_of
from embedmesh.client.bulk.posting import (
    ConnectionWasClosed,
    NoSecureConnection,
    NothingThere,
    NotPosted,
    Post,
    TooLate,
)
from embedmesh.client.bulk.refusals import ATTEMPTS_MIN, TOO_MANY, TOO_MUCH, judge, refused_input, wait_s
from embedmesh.client.bulk.replies import FLOAT32, ReplyVectors, Rows
from embedmesh.client.bulk.tries import PlainTries, SealedTries, Tried, Tries, want_texts
from embedmesh.client.bulk.window import Clock, CongestionWindow, Gate, Sleep
from embedmesh.client.errors import CallNotAnswered, CallRefused, NotEmbeddings, WrongCall
from embedmesh.client.refusals import Problem
from embedmesh.rules.ports import Dice

if TYPE_CHECKING:
    from embedmesh.client.core import Trust

# Since the last reply: longer than an engine's restart on a starved machine, shorter than a night.
BULK_SILENCE_MAX_S = 900.0
REPLIES_IN_FLIGHT_BYTES = 64 * 1024 * 1024  # of replies, by their expected size: wide vectors have fewer in flight
CLOSED_MAX = 3  # kept connections in a row that the server had closed; a server that breaks every one is tried later
TOO_BUSY = frozenset({429, 503})
KEY_BYTES = 16  # of the digest in an Idempotency-Key, or of one that is random

MakeRows = Callable[[int], Rows]
"""Where the vectors go, of that width: as many contiguous rows as there are texts."""


class EmbeddedUnit(NamedTuple):
    """The vectors of some texts, with rows of NaN for those that were refused, which are named by their place."""

    vectors: Rows
    refused: Mapping[int, Problem]
    tokens: int
    cost_nanousd: int


class BulkObserver(Protocol):
    """Learns what a run does."""

    def waiting(self, why: str, pause_s: float, requests: int) -> None:
        """`requests` wait now; the last of them tries again after the pause."""
        ...

    def paid(self, tokens: int, cost_nanousd: int) -> None:
        """A request was answered."""
        ...


class BulkRequests:
    """Embeds texts at one endpoint. `fields` are the members of every request beside `input`.

    With `trust` every request is sealed for a node that it names. `idempotent`: see tries.py.
    """

    def __init__(
        self,
        post: Post,
        fields: Mapping[str, Any],
        *,
        packing: Packing,
        window: CongestionWindow,
        observer: BulkObserver,
        dice: Dice,
        trust: "Trust | None" = None,
        idempotent: bool = False,
        silence_max_s: float = BULK_SILENCE_MAX_S,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        """Raises WrongCall where the fields are not JSON."""
        self._post = post
        self._fields = fields
        self._trust = trust
        self._idempotent = idempotent
        try:
            self._prefix = msgspec.json.encode({**fields, "encoding_format": "base64"})[:-1] + b',"input":'
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise WrongCall(f"The arguments are not JSON: {type(error).__name__}.") from None
        self.packing = packing
        self.gate = Gate(window, clock, sleep)
        self._dice = dice
        self._observer = observer
        self._silence_max_s = silence_max_s
        self._sleep = sleep
        self._clock = clock
        self._answered_at = clock()
        self._was_reached = False
        self._ended: CallRefused | None = None  # why no other request has a chance
        self._waiting = 0

    async def embed(self, unit: Unit, make_rows: MakeRows | None = None, key: str | None = None) -> EmbeddedUnit:
        """A vector for each text, or why there is none.

        With `key` its requests have Idempotency-Keys that follow from it and from what is sent, in every run the same.

        Raises CallRefused, CallNotAnswered, NotEmbeddings, NotTrusted, or WrongCall where a text is none.
        """
        texts = unit.texts
        rows: Rows | None = None
        refused: dict[int, Problem] = {}
        tokens = cost_nanousd = 0
        parts: list[Sequence[int]] = [range(len(texts))] if texts else []
        while parts:
            part = parts.pop()
            inputs, size = texts, unit.size
            if len(part) < len(texts):
                inputs = [texts[at] for at in part]
                size = sum(map(size_of, inputs))
            tried = await self._request(inputs, size, key)
            if tried is None:
                fits = self.packing.fits(inputs, size)
                parts += [part[fits:], part[:fits]]
                continue
            answer = tried.answer
            if isinstance(answer, ReplyVectors):
                if rows is None:
                    rows = (make_rows or _rows(len(texts)))(answer.width)
                    rows[list(refused)] = np.nan
                self._write(answer, rows, part)
                tokens, cost_nanousd = tokens + answer.tokens, cost_nanousd + tried.cost_nanousd
            elif judge(answer, {}, len(part)) == "split":
                self._learn(answer, len(part), size)
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            else:
                at_input = refused_input(answer) or 0
                at = part[at_input if at_input < len(part) else 0]
                refused[at] = answer
                if rows is not None:
                    rows[at] = np.nan
                rest = [other for other in part if other != at]
                parts += [rest] if rest else []
        if rows is None:
            rows = np.full((len(texts), 0), np.nan, FLOAT32)
        return EmbeddedUnit(rows, refused, tokens, cost_nanousd)

    def _write(self, answer: ReplyVectors, rows: Rows, part: Sequence[int]) -> None:
        """Into the rows of a part. Raises NotEmbeddings."""
        width = rows.shape[1]
        if answer.width != width:
            raise NotEmbeddings(f"The endpoint's vectors changed from {width} to {answer.width} components.")
        try:
            if isinstance(part, range):
                answer.write(rows[part.start : part.stop])
            else:
                some = np.empty((len(part), width), FLOAT32)
                answer.write(some)
                rows[part] = some
        except ValueError as error:
            raise _not_embeddings(str(error)) from None

    def _learn(self, problem: Problem, inputs: int, size: int) -> None:
        """Send half as much from now on."""
        if problem.code in TOO_MANY or (problem.status == 413 and problem.code not in TOO_MUCH):
            self.packing.too_many(inputs)
        elif problem.code in TOO_MUCH:
            self.packing.too_much(size)

    async def _request(self, texts: Sequence[Text], size: int, key: str | None) -> Tried | None:
        """One request, repeated while that may help. A Problem is one to split or to take a text out for.

        None where these texts are known to be too many by the time that they may be sent.
        """
        tries: Tries | None = None
        began = self._clock()
        for attempt in itertools.count():
            async with self.gate.passed(again=attempt > 0):
                full = self.gate.running >= self.gate.window.size
                if self._ended is not None:
                    raise self._ended
                if tries is None:
                    if self.packing.fits(texts, size) < len(texts):
                        return None
                    tries = self._tries(texts, size, key)
                sent_at = self._clock()
                answer, hints, cost_nanousd = tried = await self._attempt(tries)
            now = self._clock()
            if isinstance(answer, ReplyVectors):
                self._answered_at = now
                self.gate.window.replied(size, full, now)
                self.packing.replied(answer.width, size, answer.tokens)
                self.gate.window.bound(int(REPLIES_IN_FLIGHT_BYTES / self.packing.reply_bytes))
                self._observer.paid(answer.tokens, cost_nanousd)
                return tried
            verdict = judge(answer, hints, len(texts))
            if key is not None and verdict == "split" and answer.code == "deadline_exceeded":
                verdict = "retry"  # halves have other keys: a run that sends the whole then would pay twice
            if verdict == "stop":
                self._ended = CallRefused(answer, request_id=hints.get("x-request-id"))
                raise self._ended
            if verdict != "retry":
                return tried
            words = f"{answer.message.rstrip('.')} ({answer.code})"
            silent_s = now - max(began, self._answered_at)
            if attempt + 1 >= ATTEMPTS_MIN and silent_s >= self._silence_max_s:
                raise CallNotAnswered(f"The endpoint has answered nothing for {silent_s / 60:.0f} minutes: {words}.")
            pause_s = wait_s(attempt, hints, self._dice)
            if answer.status in TOO_BUSY:
                self.gate.window.refused(sent_at, pause_s, now)
            await self._pause(words, pause_s)
        raise AssertionError("unreachable: the count never ends")

    def _tries(self, texts: Sequence[Text], size: int, key: str | None) -> Tries:
        try:
            body = self._prefix + msgspec.json.encode(texts) + b"}"
        except UnicodeEncodeError:
            raise WrongCall("A text has half a surrogate pair, which UTF-8 cannot hold. Remove it.") from None
        except TypeError as error:
            raise WrongCall(f"Every text must be a str, or a list of token ids: {error}.") from None
        if self._trust is None:
            return PlainTries(body, len(texts), key=self._key(key, body))
        dimensions = self._fields.get("dimensions")
        return SealedTries(want_texts(self._fields["model"], dimensions, body, len(texts), size), self._trust)

    def _key(self, key: str | None, body: bytes) -> str | None:
        if key is None:
            return secrets.token_hex(KEY_BYTES) if self._idempotent else None
        return f"{key}-{hashlib.sha256(body).hexdigest()[: 2 * KEY_BYTES]}"  # without a text that was refused: another

    async def _pause(self, why: str, pause_s: float) -> None:
        self._waiting += 1
        try:
            self._observer.waiting(why, pause_s, self._waiting)
            await self._sleep(pause_s)
        finally:
            self._waiting -= 1

    async def _attempt(self, tries: Tries) -> Tried:
        try:
            tried = await self._once(tries)
        except NoSecureConnection as error:
            raise CallNotAnswered(f"{_sentence(error)}.") from None
        except NothingThere as error:
            if not self._was_reached:
                raise NothingAtAddress(error) from None
            return Tried(Problem(503, "no_connection", str(error)), {})
        except TooLate:
            return Tried(Problem(504, "timeout", "the endpoint did not answer in time"), {})
        except NotPosted as error:
            return Tried(Problem(502, "no_connection", str(error)), {})
        except ValueError as error:
            raise _not_embeddings(str(error)) from None
        self._was_reached = True
        return tried

    async def _once(self, tries: Tries) -> Tried:
        for _ in range(CLOSED_MAX):
            with suppress(ConnectionWasClosed):
                return await tries.once(self._post)
        return await tries.once(self._post)


class NothingAtAddress(CallNotAnswered):
    """The very first connection was not made: there is no endpoint, so waiting for it is useless."""

    def __init__(self, error: NothingThere) -> None:
        super().__init__(f"{_sentence(error)}.")
        self.words = str(error)
        self.is_refused = error.is_refused


def _rows(count: int) -> MakeRows:
    return lambda width: np.empty((count, width), FLOAT32)


def _not_embeddings(word: str) -> NotEmbeddings:
    return NotEmbeddings(f"The reply is not what an embeddings endpoint answers ({word}). Is the base URL that of one?")


def _sentence(error: Exception) -> str:
    words = str(error)
    return words[:1].upper() + words[1:]
