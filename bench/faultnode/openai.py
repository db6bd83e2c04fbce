"""The same node as other gateways see it: the public OpenAI form over plain HTTP, in any mode.

What is wrong here is wrong in the public form: a duplicate has a duplicate `index`, too. There are no signatures.
"""

import base64
from typing import Any

import msgspec
import orjson
from aiohttp import web

from bench.faultnode.acts import Turn
from bench.faultnode.modes import MODES, Mode
from bench.faultnode.node import Scripted
from bench.rig.http import Vectors
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.routing import Routes
from embedmesh.rules import errors
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX

JSON = {"Content-Type": "application/json"}

BODIES_BYTES_MAX = 256 * 1024 * 1024  # together: other routers send everything at once


class OpenAiCall(msgspec.Struct):
    """The fields of a request that matter here."""

    model: str
    input: str | list[Any]
    encoding_format: str | None = None


class OpenAiForm:
    """Handlers over the scripted models."""

    def __init__(self, scripted: Scripted) -> None:
        self._scripted = scripted
        self._bodies = BodyBudget(BODIES_BYTES_MAX)

    def routes(self) -> Routes:
        """Paths as servers of that form have them."""
        return {
            "/v1/embeddings": {"POST": self.embeddings},
            "/v1/models": {"GET": self.models},
            "/health": {"GET": self.health},
        }

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """JSON in; base64 or floats out."""
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self._bodies)
        self._bodies.give_back("", len(body))
        try:
            call = msgspec.json.decode(body, type=OpenAiCall)
            model = self._scripted.find(call.model)
            ids = self._ids(model.id, call.input)
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
            raise errors.InvalidJson("Not a request of this API.") from None
        mode = self._scripted.faults.draw(ids)

        async def answer(mode: Mode) -> web.Response:
            rows, tokens = mode.rows(turn, *await self._scripted.embed(model, ids, mode))
            return _reply(call, rows, tokens, duplicate=mode is MODES["duplicate"])

        turn = Turn(request, ids, self._scripted.faults.state, lambda: answer(MODES["honest"]))
        if mode.instead is not None and (instead := await mode.instead(turn)) is not None:
            return instead
        return await answer(mode)

    async def models(self, request: web.BaseRequest) -> web.StreamResponse:
        """What it serves."""
        return web.Response(body=self._scripted.list_bytes(), content_type="application/json")

    async def health(self, request: web.BaseRequest) -> web.StreamResponse:
        """While the process answers."""
        return web.json_response({"message": "ok"})

    def _ids(self, model_id: str, given: str | list[Any]) -> list[list[int]]:
        """Of a text, texts, token ids or lists of them."""
        tokenizer = self._scripted.tokenizers[model_id]
        if isinstance(given, str):
            return tokenizer.ids([given])
        if isinstance(given[0], int):
            return [given]
        return given if isinstance(given[0], list) else tokenizer.ids(given)


def _reply(call: OpenAiCall, rows: Vectors, tokens: int, *, duplicate: bool) -> web.Response:
    as_base64 = call.encoding_format == "base64"
    encoded = [base64.b64encode(row.tobytes()).decode("ascii") if as_base64 else row for row in rows]
    data = [
        {"object": "embedding", "index": 0 if duplicate else at, "embedding": vector}
        for at, vector in enumerate(encoded)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    reply = {"object": "list", "data": data, "model": call.model, "usage": usage}
    return web.Response(body=orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY), headers=JSON)
