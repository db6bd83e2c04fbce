"""A sidecar's HTTP API: its models and keys, sealed calls, health. It embeds nothing, and reads nothing unsealed."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import msgspec
from aiohttp import web

from embedmesh.http.bodies import JSON_HEADERS, json_reply
from embedmesh.http.routing import Methods, Routes
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.sidecar_answers import NOT_SERVED
from embedmesh.node.sidecar_calls import MODALITIES, SidecarCalls
from embedmesh.node.sidecar_models import SidecarModels
from embedmesh.node.signed_api import SignedApi
from embedmesh.rules import errors
from embedmesh.rules.confidential import SignedKeys
from embedmesh.rules.embeddings import ServedModel, ServedModels
from embedmesh.rules.generation import Generating
from embedmesh.rules.sealed_generation import confidential_path


class SidecarApp:
    """Handlers that need no signature, over the models of the server."""

    def __init__(
        self,
        models: SidecarModels,
        metrics: NodeMetrics,
        keys: Callable[[Mapping[str, str]], SignedKeys | msgspec.UnsetType],
    ) -> None:
        """`keys` gives the document of the node's confidential keys for these models (ids and digests)."""
        self._models = models
        self._metrics = metrics
        self._keys = keys

    def routes(self) -> Routes:
        """Routes for a socket that only the node's owner may open."""
        return {
            "/v1/models": {"GET": self.models},
            "/health": {"GET": self.health},
            "/readyz": {"GET": self.readyz},
            "/metrics": {"GET": self.show_metrics},
        }

    def list_bytes(self) -> bytes:
        """The models for which the server answers now, and the keys of sealed requests."""
        models = [each.model for each in self._models.up()]
        keys = self._keys({model.id: model.digest for model in models}) if models else msgspec.UNSET
        described = [
            ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier, aliases=model.aliases)
            for model in models
        ]
        return msgspec.json.encode(ServedModels(described, keys=keys))

    def begin_compact(self, body: bytes, done: object) -> NoReturn:
        """There is nothing that embeds."""
        raise errors.ModelNotFound(NOT_SERVED, param="model")

    async def embed_compact(self, body: bytes) -> NoReturn:
        """There is nothing that embeds."""
        self.begin_compact(body, None)

    async def models(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=self.list_bytes(), headers=JSON_HEADERS)

    async def health(self, request: web.BaseRequest) -> web.StreamResponse:
        return json_reply({"message": "ok"})

    async def readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        """200 if the server answers for each model."""
        waiting = [each.model.id for each in self._models if not each.up]
        if waiting:
            raise errors.NoNodeAvailable(f"The server does not answer for {', '.join(waiting)}.")
        return json_reply({"message": "ready"})

    async def show_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        for each in self._models:
            self._metrics.state(each.model.id, waiting_tokens=0, ready=each.up, starved=False)
        body, content_type = self._metrics.text()
        return web.Response(body=body, headers={"Content-Type": content_type})


@dataclass(kw_only=True, eq=False)
class SignedSidecarApi(SignedApi):
    """The same for a gateway over the network. A stream's events are signed one by one, by the node's identity."""

    calls: SidecarCalls

    def routes(self) -> Routes:
        routes: dict[str, Methods] = {
            path: methods for path, methods in super().routes().items() if path != "/v1/embeddings"
        }
        for modality in MODALITIES:
            routes[confidential_path(modality)] = {"POST": functools.partial(self.generate, modality)}
        return routes

    async def generate(self, modality: Generating, request: web.BaseRequest) -> web.StreamResponse:
        """Signed both ways; a whole answer has a receipt over what was sealed."""
        checked = self._check(request)
        body = await self.calls.read_body(request)
        try:
            self.check_body(checked, body)
            return await self.calls.respond(modality, body, request, functools.partial(self._signed, checked))
        finally:
            self.calls.give_back(body)
