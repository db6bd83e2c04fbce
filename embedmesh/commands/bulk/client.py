"""Asks a gateway for vectors, a batch at a time: what to do with each answer, and when to ask again.

A line that is refused must not cost the other lines their vectors: it is taken out and the rest is asked for again.
What is wrong with the whole run (key, model, money, a setting) ends it at once.
"""

import asyncio
import base64
import binascii
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal, Protocol

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from embedmesh.commands.bulk.lines import Refusal
from embedmesh.commands.endpoint import Endpoint
from embedmesh.rules.embeddings import EmbedReply
from embedmesh.rules.ports import Dice

ATTEMPTS_MAX = 10  # with the waits below about three minutes: longer than a restart, shorter than a night
WAIT_FIRST_S = 0.5
WAIT_MAX_S = 30.0
RETRY_AFTER_MAX_S = 120.0  # a server that asks for more is not coming back while somebody watches
REQUEST_S = 600.0  # the longest a gateway lets a request live
CONNECT_S = 10.0
REPLY_BYTES_MAX = 256 * 1024 * 1024  # 2,048 vectors of width 16,384 in base64, twice over
MESSAGE_CHARS_MAX = 300  # of the server's own words that are repeated

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
REFUSED = frozenset({400, 404, 405, 422})  # what no key, money or patience changes
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in ("model", "dimensions", "input_type", "truncate")}
SPLIT_CODES = frozenset({"max_tokens_per_request", "too_many_inputs", "body_too_large"})

Vector = NDArray[np.float32]
Members = Mapping[str, str | int]
Verdict = Literal["line", "split", "retry", "stop"]


class Stopped(Exception):
    """The run cannot go on. The message is one line that says why; what is written so far stays good."""


class RequestRefused(Stopped):
    """The endpoint refuses any request with these members: the command must change."""


class NothingListens(Stopped):
    """The very first connection was refused: there is no endpoint, so waiting for it is useless."""


class Problem(msgspec.Struct, frozen=True):
    """An answer that is no vectors: the members of the error envelope, as far as they are there."""

    status: int
    code: str
    message: str
    param: str | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | None = None
    param: str | None = None


class _Envelope(msgspec.Struct):
    error: _Error


class _Answer(msgspec.Struct, frozen=True):
    vectors: list[Vector]
    tokens: int
    cost_nanousd: int


def read_problem(status: int, body: bytes) -> Problem:
    """What a refusal says, cleaned of control characters, which a terminal might obey."""
    try:
        error = msgspec.json.decode(body, type=_Envelope).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        error = _Error()
    message = "".join(char for char in error.message if char.isprintable())[:MESSAGE_CHARS_MAX]
    return Problem(status, error.code or f"http_{status}", message or f"HTTP status {status}", error.param)


def judge(problem: Problem, headers: Mapping[str, str], inputs: int) -> Verdict:
    """What to do about a refusal of a request with so many inputs."""
    if headers.get("x-should-retry") == "false" or problem.code == "insufficient_quota":
        return "stop"
    if problem.status in RETRIED:
        return "retry"
    if problem.status not in (400, 413, 422):
        return "stop"
    if problem.status == 413 or problem.code in SPLIT_CODES:
        return "split" if inputs > 1 else "line"
    at_input = refused_input(problem)
    if at_input is not None and at_input < inputs:
        return "line"
    if problem.param == "input":
        return "split" if inputs > 1 else "line"
    return "stop"


def refused_input(problem: Problem) -> int | None:
    """Which input of the request was refused: `input.3` is 3."""
    match = re.fullmatch(r"input[.\[](\d{1,4})\]?", problem.param or "")
    return int(match[1]) if match else None


def wait_s(attempt: int, headers: Mapping[str, str], dice: Dice) -> float:
    """Seconds before the next attempt: what the server asks for, else doubling with dice; bounded either way."""
    for name, unit_s in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        try:
            asked = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if math.isfinite(asked) and asked >= 0:
            return min(asked, RETRY_AFTER_MAX_S)
    return float(min(WAIT_FIRST_S * 2**attempt, WAIT_MAX_S) * (0.5 + dice.random() / 2))


def decode_vectors(body: bytes, inputs: int) -> tuple[list[Vector], int]:
    """The vectors of a reply, in input order, and its tokens. Raises ValueError where anything is not as it must be."""
    reply = msgspec.json.decode(body, type=EmbedReply)
    if [item.index for item in reply.data] != list(range(inputs)):
        raise ValueError("count or order")
    vectors = [np.frombuffer(base64.b64decode(item.embedding, validate=True), "<f4") for item in reply.data]
    if not all(len(vector) == len(vectors[0]) > 0 and np.isfinite(vector).all() for vector in vectors):
        raise ValueError("width or value")
    return vectors, reply.usage.total_tokens


class Hears(Protocol):
    """Who is told what goes on."""

    def say(self, line: str) -> None:
        """A pause before another attempt, and why."""
        ...

    def paid(self, tokens: int, cost_nanousd: int) -> None:
        """A request was answered."""
        ...


class Client:
    """Embeds batches of texts at one endpoint. `members` are those of every request beside `input`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        members: Members,
        *,
        hears: Hears,
        dice: Dice,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._session = session
        self._base_url = endpoint.base_url
        self._was_reached = False
        self._headers = {"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": "application/json"}
        self._prefix = msgspec.json.encode({**members, "encoding_format": "base64"})[:-1] + b',"input":['
        self._dice = dice
        self._hears = hears
        self._sleep = sleep

    async def embed(self, texts: list[bytes]) -> list[Vector | Refusal]:
        """A vector or a refusal for each text (a JSON string). Raises Stopped."""
        outcomes: dict[int, Vector | Refusal] = {}
        parts = [list(range(len(texts)))] if texts else []
        while parts:
            part = parts.pop()
            answer = await self._ask([texts[i] for i in part])
            if isinstance(answer, _Answer):
                self._hears.paid(answer.tokens, answer.cost_nanousd)
                outcomes.update(zip(part, answer.vectors, strict=True))
            elif judge(answer, {}, len(part)) == "split":
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            else:
                at_input = refused_input(answer) or 0
                refused = part.pop(at_input if at_input < len(part) else 0)
                outcomes[refused] = Refusal(answer.code, answer.message)
                parts += [part] if part else []
        return [outcomes[i] for i in range(len(texts))]

    async def _ask(self, texts: list[bytes]) -> _Answer | Problem:
        """One request, repeated while that may help. A Problem is one to split or to take a line out for."""
        body = self._prefix + b",".join(texts) + b"]}"
        # The same key for every attempt: a reply that was lost on the way is not charged twice.
        headers = self._headers | {"Idempotency-Key": secrets.token_hex(16)}
        for attempt in range(ATTEMPTS_MAX):
            answer, hints = await self._attempt(body, headers, len(texts))
            if isinstance(answer, _Answer):
                return answer
            verdict = judge(answer, hints, len(texts))
            said = f"{answer.message.rstrip('.')} ({answer.code})"
            if verdict == "stop" and answer.status in REFUSED:
                todo = f"Change {OPTIONS.get(answer.param or '', 'the command')}."
                raise RequestRefused(f"The endpoint refused: {said}. {todo}")
            if verdict == "stop":
                raise Stopped(f"The endpoint refused: {said}.")
            if verdict != "retry":
                return answer
            if attempt == ATTEMPTS_MAX - 1:
                raise Stopped(f"The endpoint failed {ATTEMPTS_MAX} times in a row: {said}.")
            pause_s = wait_s(attempt, hints, self._dice)
            self._hears.say(f"{said}; trying again in {pause_s:.1f} s")
            await self._sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(
        self, body: bytes, headers: dict[str, str], inputs: int
    ) -> tuple[_Answer | Problem, Mapping[str, str]]:
        try:
            async with self._session.post(
                self._base_url + "/embeddings", data=body, headers=headers, allow_redirects=False
            ) as response:
                self._was_reached = True
                raw = await read_bounded(response, REPLY_BYTES_MAX)
                if response.status != 200:
                    return read_problem(response.status, raw), response.headers
                vectors, tokens = decode_vectors(raw, inputs)
                cost = response.headers.get("x-embedmesh-cost-nanousd", "0")
                return _Answer(vectors, tokens, int(cost) if cost.isdecimal() else 0), response.headers
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


def _nothing_listens(base_url: str, error: aiohttp.ClientConnectorError) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no host of that name is known: {base_url}; check --url"
    if isinstance(error.os_error, ConnectionRefusedError):
        return f"nothing listens at {base_url}; start it with: embedmesh serve"
    return f"{base_url} cannot be reached ({error.os_error.strerror or 'no connection'}); check --url"


async def read_bounded(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """The whole body. Raises ValueError where it is larger than `bytes_max`."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > bytes_max:
            raise ValueError("too large")
        chunks.append(chunk)
    return b"".join(chunks)
