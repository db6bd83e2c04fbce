"""A server of OpenAI's API for embeddings in a thread of ours, that can be wrong in any of FAULTS and remembers all.

Honest, it is like the common open servers: right vectors; 400 for an empty input, 404 for an unknown model; it cuts a
text that is too long, takes token ids for its own vocabulary's, and passes over members that it does not know.
"""

import asyncio
import base64
import json
import logging
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from aiohttp import web

from bench.conformance.faults import ELSEWHERE, FAULTS, Fault, as_json
from bench.faultnode.acts import State, Turn
from bench.faultnode.modes import MODES
from bench.faultnode.scripted import WIDTH, vectors
from bench.rig.http import MODEL, Vectors
from bench.rig.processes import HOST
from embedmesh.engine.tokens import ModelTokenizer

MAX_TOKENS = 256  # of the default model, special tokens included
BODY_BYTES_MAX = 64 * 1024 * 1024
SEED = 1
LOOP_S = 10.0  # for the loop's thread to start or end
MARK = b" of the conformance run"  # in texts of callers
NAMES = (MODEL, f"sentence-transformers/{MODEL}")


class Seen(NamedTuple):
    """One request that came."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def texts(self) -> list[Any]:
        """Its inputs."""
        given = json.loads(self.body)["input"]
        return [given] if isinstance(given, str) else given

    @property
    def from_caller(self) -> bool:
        """No question of a gateway's own."""
        return MARK in self.body


class Truth:
    """The right vectors and token counts of texts."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the default model's, for its tokenizer."""
        self._tokenizer = ModelTokenizer(folder, MAX_TOKENS)

    def ids(self, given: Any) -> list[list[int]]:
        """Of a text, texts, token ids or lists of them; cut where they are too long."""
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        found = given if isinstance(given[0], list) else self._tokenizer.ids(given)
        return [each[: MAX_TOKENS - self._tokenizer.specials] for each in found]

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """[texts, WIDTH]."""
        return vectors(self.ids(list(texts)), width=WIDTH)

    def tokens(self, ids: Sequence[Sequence[int]]) -> int:
        """Special tokens included."""
        return sum(map(len, ids)) + len(ids) * self._tokenizer.specials


class ConformanceNode:
    """`fault` is what it does wrong from now on; `elsewhere` is where it redirects to. Use it as a context manager."""

    def __init__(self, name: str, truth: Truth) -> None:
        self.name, self.fault, self.seen, self.met, self.elsewhere = name, FAULTS["honest"], list[Seen](), 0, ""
        self._truth, self._state = truth, State(Random(SEED))
        self._runner: web.AppRunner | None = None
        self._held = socket.socket()  # bound, so that nobody gets the port while this node is down
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._held.bind((HOST, 0))
        self.port: int = self._held.getsockname()[1]

    def __enter__(self) -> "ConformanceNode":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LOOP_S)
        self._loop.close()
        self._held.close()

    def up(self) -> None:
        """Listen, on the same port as before."""
        if self._runner is None:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(LOOP_S)

    def down(self) -> None:
        """Listen no more, and close all connections."""
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(LOOP_S)
            self._runner = None

    @contextmanager
    def being(self, fault: str) -> Iterator["ConformanceNode"]:
        """In this fault for the block; what came in it is in `seen`."""
        self.seen, self.met, self.fault, self._state = [], 0, FAULTS[fault], State(Random(SEED))
        try:
            yield self
        finally:
            self.fault = FAULTS["honest"]

    async def _start(self) -> None:
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # routers try HTTP/2 first
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/embeddings", self._embeddings)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self.port, reuse_port=True).start()

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "ok"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": "bench", "max_model_len": MAX_TOKENS}
        return web.json_response({"object": "list", "data": [entry]})

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body, fault = await request.read(), self.fault
        came = Seen(request.path, dict(request.headers), body)
        self.seen.append(came)
        await asyncio.sleep(fault.late_s)
        call = _parsed(body)
        if call is None:
            return _refusal(400, "The body is not a request of this API.", "invalid_value")
        if call["model"] not in NAMES and not fault.any_model:
            return _refusal(404, f"The model {call['model']!r} does not exist.", "model_not_found")
        try:
            ids = self._truth.ids(call["input"])
        except (TypeError, UnicodeError):
            return _refusal(400, "The input is not of this API's form.", "invalid_value")
        if len(ids) > fault.inputs_max:
            return _refusal(413, f"At most {fault.inputs_max} inputs.", "too_many_inputs")
        self.met += fault is not FAULTS["honest"] and came.from_caller
        return await self._answered(request, fault, ids, call)

    async def _answered(
        self, request: web.Request, fault: Fault, ids: list[list[int]], call: dict[str, Any]
    ) -> web.StreamResponse:
        mode = MODES[fault.mode]

        async def honest() -> web.Response:
            return _reply(call, vectors(ids, width=WIDTH), self._truth.tokens(ids), FAULTS["honest"])

        turn = Turn(request, ids, self._state, honest)
        if mode.instead is not None and (instead := await mode.instead(turn)) is not None:
            return instead
        rows, tokens = mode.rows(turn, vectors(ids, width=WIDTH), self._truth.tokens(ids))
        response = _reply(call, rows, tokens, fault)
        if response.headers.get("Location") == ELSEWHERE:
            response.headers["Location"] = f"{self.elsewhere}{request.path}"
        return response


def _parsed(body: bytes) -> dict[str, Any] | None:
    """The request; None for one that any server of this API refuses."""
    try:
        call = json.loads(body)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("model"), str):
        return None
    if call.get("encoding_format") not in (None, "float", "base64"):
        return None
    given = call.get("input")
    if isinstance(given, list):
        kinds = {type(each) for each in given}
        whole = len(kinds) == 1 and kinds <= {str, int, list} and all(each not in ("", []) for each in given)
        return call if whole else None
    return call if isinstance(given, str) and given else None


def _reply(call: Mapping[str, Any], rows: Vectors, tokens: int, fault: Fault) -> web.Response:
    form = fault.form or call.get("encoding_format") or "float"
    rows = fault.rows(rows).astype("<f4")
    encoded = [base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist() for row in rows]
    reply = {
        "object": "list",
        "data": [{"object": "embedding", "index": at, "embedding": each} for at, each in enumerate(encoded)],
        "model": call["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    fault.reply(reply)
    return fault.raw(json.dumps(reply).encode())


def _refusal(status: int, message: str, code: str) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return as_json(json.dumps({"error": error}).encode(), status)
