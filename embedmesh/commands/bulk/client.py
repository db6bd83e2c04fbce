"""Requests vectors from a gateway, a batch at a time: what to do with each reply, and when to send it again.

A line that is refused must not cost the other lines their vectors: it is taken out, and the remaining ones are sent
again. An error of the whole run (key, model, money, a setting) ends it at once. Errors that pass are waited out, as
long as there was a reply lately; if a request was too large, later ones are smaller.

This is the second HTTP client of the command line, beside `commands/http_client.py`: a run has several requests in
flight on kept connections and can be interrupted at any moment, which needs an event loop. Single requests do not.
"""

import asyncio
import binascii
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import aiohttp
import msgspec

from embedmesh.client.aio import read_bounded
from embedmesh.client.errors import NodeNotTrusted, NotTrusted
from embedmesh.client.refusals import Problem
from embedmesh.commands.bulk.lines import BATCH_BYTES_MAX, Refusal
from embedmesh.commands.bulk.refusals import ATTEMPTS_MIN, TOO_MANY, TOO_MUCH, judge, refused_input, wait_s
from embedmesh.commands.bulk.tries import (
    BulkVectors,
    PlainTries,
    Posted,
    SealedTries,
    Tried,
    Tries,
    Vector,
    want_texts,
)
from embedmesh.commands.endpoint import GatewayAccess
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.ports import Dice

if TYPE_CHECKING:
    from embedmesh.client.core import Trust

# Since the last reply: longer than an engine's restart on a starved machine, shorter than a night.
BULK_SILENCE_MAX_S = 900.0
BULK_REQUEST_S = 600.0  # the longest a gateway lets a request live
BULK_CONNECT_S = 10.0
BULK_REPLY_BYTES_MAX = 256 * 1024 * 1024  # 2,048 vectors of width 16,384 in base64, twice over

FINAL_STATUSES = frozenset({400, 404, 405, 422})  # no other key, credit or wait changes the reply
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in ("model", "dimensions", "input_type", "truncate")}

RequestFields = Mapping[str, str | int]
Clock = Callable[[], float]


class Stopped(Exception):
    """The run cannot continue. The message is one line that says why; what is written so far stays valid."""


class RequestRefused(Stopped):
    """The endpoint refuses any request with these fields: the command must change."""


class NothingListens(Stopped):
    """The very first connection was refused: there is no endpoint, so waiting for it is useless."""


class BulkObserver(Protocol):
    """Learns what the client does."""

    def waiting(self, why: str, pause_s: float, requests: int) -> None:
        """`requests` wait now; the last of them tries again after the pause."""
        ...

    def paid(self, tokens: int, cost_nanousd: int) -> None:
        """A request was answered."""
        ...


class BulkClient:
    """Embeds batches of texts at one endpoint. `fields` are those of every request beside `input`.

    With `trust` every request is sealed for a node that it names.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: GatewayAccess,
        fields: RequestFields,
        *,
        observer: BulkObserver,
        dice: Dice,
        trust: "Trust | None" = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        self._session = session
        self._base_url = endpoint.base_url
        self._was_reached = False
        self._headers = {"Authorization": f"Bearer {endpoint.key}", "Content-Type": "application/json"}
        self._fields = fields
        self._trust = trust
        self._prefix = msgspec.json.encode({**fields, "encoding_format": "base64"})[:-1] + b',"input":['
        self._dice = dice
        self._observer = observer
        self._sleep = sleep
        self._clock = clock
        self._answered_at = clock()
        self._waiting = 0
        self._inputs_max = REQUEST_INPUTS_MAX  # what the endpoint was found to take
        self._bytes_max = 2 * BATCH_BYTES_MAX  # more than a batch of lines has; rows of Parquet may

    async def embed(self, texts: list[bytes]) -> list[Vector | Refusal]:
        """A vector or a refusal for each text (a JSON string). Raises Stopped."""
        outcomes: dict[int, Vector | Refusal] = {}
        parts = [list(range(len(texts)))] if texts else []
        while parts:
            part = parts.pop()
            fits = self._fits([len(texts[i]) for i in part])
            if fits < len(part):
                parts.append(part[fits:])
                part = part[:fits]
            inputs = [texts[i] for i in part]
            answer = await self._request(inputs)
            if isinstance(answer, BulkVectors):
                self._observer.paid(answer.tokens, answer.cost_nanousd)
                outcomes.update(zip(part, answer.vectors, strict=True))
            elif judge(answer, {}, len(part)) == "split":
                self._learn(answer, inputs)
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            else:
                at_input = refused_input(answer) or 0
                refused = part.pop(at_input if at_input < len(part) else 0)
                outcomes[refused] = Refusal(answer.code, answer.message)
                parts += [part] if part else []
        return [outcomes[i] for i in range(len(texts))]

    def _fits(self, sizes: list[int]) -> int:
        """How many of the next texts one request may have, by what was refused before; at least one."""
        room = self._bytes_max
        for at, size in enumerate(sizes[: self._inputs_max]):
            room -= size
            if room < 0:
                return max(at, 1)
        return min(len(sizes), self._inputs_max)

    def _learn(self, problem: Problem, texts: list[bytes]) -> None:
        """Send half as much from now on. Requests that were refused at the same time halve it once, not twice."""
        if problem.code in TOO_MANY or (problem.status == 413 and problem.code not in TOO_MUCH):
            self._inputs_max = min(self._inputs_max, max(len(texts) // 2, 1))
        elif problem.code in TOO_MUCH:
            self._bytes_max = min(self._bytes_max, sum(map(len, texts)) // 2)

    async def _request(self, texts: list[bytes]) -> BulkVectors | Problem:
        """One request, repeated while that may help. A Problem is one to split or to take a line out for."""
        body = self._prefix + b",".join(texts) + b"]}"
        tries: Tries = PlainTries(body, len(texts))
        if self._trust is not None:
            tries = SealedTries(want_texts(self._fields, body, texts), self._trust)
        began = self._clock()
        for attempt in itertools.count():
            answer, hints = await self._attempt(tries)
            if isinstance(answer, BulkVectors):
                self._answered_at = self._clock()
                return answer
            verdict = judge(answer, hints, len(texts))
            words = f"{answer.message.rstrip('.')} ({answer.code})"
            if verdict == "stop" and answer.status in FINAL_STATUSES:
                todo = f"Change {OPTIONS.get(answer.param or '', 'the command')}."
                raise RequestRefused(f"The endpoint refused: {words}. {todo}")
            if verdict == "stop":
                raise Stopped(f"The endpoint refused: {words}.")
            if verdict != "retry":
                return answer
            silent_s = self._clock() - max(began, self._answered_at)
            if attempt + 1 >= ATTEMPTS_MIN and silent_s >= BULK_SILENCE_MAX_S:
                raise Stopped(f"The endpoint has answered nothing for {silent_s / 60:.0f} minutes: {words}.")
            await self._pause(words, wait_s(attempt, hints, self._dice))
        raise AssertionError("unreachable: the count never ends")

    async def _pause(self, why: str, pause_s: float) -> None:
        self._waiting += 1
        try:
            self._observer.waiting(why, pause_s, self._waiting)
            await self._sleep(pause_s)
        finally:
            self._waiting -= 1

    async def _attempt(self, tries: Tries) -> Tried:
        try:
            return await tries.once(self._post)
        except NodeNotTrusted as error:
            raise RequestRefused(error.message) from None
        except NotTrusted as error:
            raise Stopped(error.message.rstrip(".")) from None
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL) as error:
            what = "its certificate is not trusted" if isinstance(error, aiohttp.ClientSSLError) else "it is no address"
            raise Stopped(f"The endpoint {self._base_url} cannot be used: {what}. Check --url.") from None
        except TimeoutError:
            return Problem(504, "timeout", "the endpoint did not answer in time"), {}
        except aiohttp.ClientConnectorError as error:
            if not self._was_reached:
                raise NothingListens(_nothing_listens(self._base_url, error)) from None
            return Problem(503, "no_connection", f"nothing listens at {self._base_url}"), {}
        except aiohttp.ClientError:
            return Problem(503, "no_connection", f"the connection to {self._base_url} broke"), {}
        except (ValueError, binascii.Error):  # msgspec's errors are ValueErrors
            raise Stopped("The endpoint's answer is not what an embeddings endpoint answers. Check --url.") from None

    async def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Posted:
        async with self._session.post(
            self._base_url + path, data=body, headers={**self._headers, **headers}, allow_redirects=False
        ) as response:
            self._was_reached = True
            raw = await read_bounded(response, BULK_REPLY_BYTES_MAX)
            return Posted(response.status, response.headers, raw)


def _nothing_listens(base_url: str, error: aiohttp.ClientConnectorError) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no host of that name is known: {base_url}; check --url"
    if isinstance(error.os_error, ConnectionRefusedError):
        return f"nothing listens at {base_url}; start it with: embedmesh serve"
    return f"{base_url} cannot be reached ({error.os_error.strerror or 'no connection'}); check --url"
