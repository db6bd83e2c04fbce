"""The routes, in the order in which a reader wants them: callers' first, then the operations, nodes' and operators'."""

import base64
import struct
from typing import Any

from embedmesh.flow.embed import EMBED_SCOPE
from embedmesh.flow.identify import METRICS_SCOPES
from embedmesh.gateway.api.openapi.account import account_paths
from embedmesh.gateway.api.openapi.fleet import admin_paths, node_paths
from embedmesh.gateway.api.openapi.money import money_paths
from embedmesh.gateway.api.openapi.operations import ANY_KEY, ANY_ROUTE, LIMITED_KEY, operation, parameter
from embedmesh.gateway.api.openapi.replies import Failures, json_reply, reply
from embedmesh.gateway.api.openapi.shapes import Json, ref
from embedmesh.gateway.api.pages.samples import EXAMPLE_MODEL, SAMPLES
from embedmesh.http.failures import TABLE
from embedmesh.http.paths import EMBEDDINGS_PATH, OTHER_PATHS
from embedmesh.rules import errors
from embedmesh.rules.limits import (
    IDEMPOTENCY_KEY_CHARS_MAX,
    REQUEST_BODY_BYTES_MAX,
    REQUEST_INPUTS_MAX,
    REQUEST_TOKENS_MAX,
)

EMBEDDING_HEADERS = (
    "openai-processing-ms",
    "x-embedmesh-cached",
    "x-embedmesh-cost-nanousd",
    "x-embedmesh-ignored",
    "x-embedmesh-node",
    "x-embedmesh-request",
    "x-embedmesh-truncated",
    *(f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in ("limit", "remaining", "reset")),
    "idempotent-replayed",
)

# A client may resolve an id such as `..` before it sends it, and then asks for another path.
ONE_MODEL: Failures = (errors.ModelNotFound, errors.NotFound, *ANY_KEY)
OFF_THE_MAP: Failures = (errors.NotFound, errors.MethodNotAllowed)  # no route gives these; every other path does
EMBEDDINGS: Failures = tuple(failure for failure in TABLE if failure not in OFF_THE_MAP)


def paths() -> Json:
    """Path -> method -> what it takes and gives."""
    return _caller_paths() | account_paths() | _process_paths() | node_paths() | admin_paths() | money_paths()


def _caller_paths() -> Json:
    return {
        "/v1/embeddings": {"post": _create_embeddings()},
        "/v1/models": {
            "get": operation(
                "listModels",
                "Models",
                "List models",
                "The models that live nodes serve now. Any API key of this gateway may ask.",
                {200: json_reply("The models.", "ModelList")},
                ANY_KEY,
                scopes=(),
            )
        },
        "/v1/models/{id}": {
            "get": operation(
                "getModel",
                "Models",
                "Get a model",
                "One model, by id, alias, or either with a precision suffix. Send a slash in it as `/` or `%2F`.",
                {200: json_reply("The model.", "Model")},
                ONE_MODEL,
                scopes=(),
            )
            | {"parameters": [parameter("id", "The model's id or alias.", EXAMPLE_MODEL)]}
        },
    }


def _process_paths() -> Json:
    return {
        "/health": {
            "get": operation(
                "getHealth",
                "Operations",
                "Is the process up?",
                "Answers as long as the process does.",
                {200: json_reply("It is.", "Health")},
                ANY_ROUTE,
            )
        },
        "/readyz": {
            "get": operation(
                "getReadiness",
                "Operations",
                "Can it do its work?",
                "Ready means: the store takes writes, and a node really embedded something in the last 15 seconds. "
                "A server of another make is probed more rarely: while it is idle a probe counts until the next.",
                {200: json_reply("Ready.", "Readiness"), 503: json_reply("Not ready, and why.", "Readiness")},
                ANY_ROUTE,
            )
        },
        "/metrics": {
            "get": operation(
                "getMetrics",
                "Operations",
                "Metrics",
                "Counters and gauges in Prometheus' text format. Needs the admin key or a key with scope `metrics`.",
                {200: reply("The metrics.", "text/plain", {"type": "string"})},
                LIMITED_KEY,
                scopes=METRICS_SCOPES,
            )
        },
        "/openapi.json": {
            "get": operation(
                "getOpenapi",
                "About",
                "This document",
                "The OpenAPI 3.1 document of this API.",
                {200: reply("The document.", "application/json", {"type": "object"})},
                (errors.Overloaded, *ANY_ROUTE),
            )
        },
        "/docs": {
            "get": operation(
                "getDocs",
                "About",
                "The documentation page",
                "This API to read and to try in a browser. Loads nothing from elsewhere.",
                {200: reply("The page.", "text/html", {"type": "string"}, ("Content-Security-Policy",))},
                (errors.Overloaded, *ANY_ROUTE),
            )
        },
        "/": {
            "get": operation(
                "getRoot",
                "About",
                "To the documentation page",
                "For who opens the server's address in a browser.",
                {302: reply("It is at `/docs`.", "text/plain", {"type": "string"}, ("Location",))},
                ANY_ROUTE,
            )
        },
    }


def _create_embeddings() -> Json:
    inputs = ["Good morning", "Guten Morgen"]
    request = {"model": EXAMPLE_MODEL, "input": inputs, "dimensions": 4}
    vectors = [(0.5, -0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5)]  # exact in float32 and of unit length
    as_base64 = [base64.b64encode(struct.pack("<4f", *vector)).decode("ascii") for vector in vectors]
    created = json_reply("One vector for each input, in input order.", "EmbeddingList", EMBEDDING_HEADERS)
    created["content"]["application/json"]["examples"] = {
        "float": {"summary": "Numbers", "value": _example_reply([list(vector) for vector in vectors])},
        "base64": {"summary": "The same, with `encoding_format: base64`", "value": _example_reply(as_base64)},
    }
    created_by = operation(
        "createEmbeddings",
        "Embeddings",
        "Create embeddings",
        f"One vector for each input. A request takes at most {REQUEST_INPUTS_MAX:,} inputs, {REQUEST_TOKENS_MAX:,} "
        f"tokens and {REQUEST_BODY_BYTES_MAX // 1024**2} MiB of plain JSON. A member that is null counts as not given. "
        "You pay for the tokens that were embedded, special tokens included, once the reply is on its way to you. If "
        "your connection breaks then, a retry with the same key and body gets it without a second charge for a minute. "
        "Also at "
        f"{', '.join(f'`{path}`' for path, of in OTHER_PATHS.items() if of == EMBEDDINGS_PATH)}, where the star is the "
        "model, which the body may then leave out.",
        {200: created},
        EMBEDDINGS,
        scopes=(EMBED_SCOPE,),
    )
    created_by["parameters"] = [_idempotency_key()]
    created_by["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {
                "schema": ref("EmbeddingRequest"),
                "examples": {"two": {"summary": "Two texts, four dimensions", "value": request}},
            }
        },
    }
    created_by["x-codeSamples"] = SAMPLES
    return created_by


def _idempotency_key() -> Json:
    return {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "description": "The same key with the same body gives the same reply for a day, and is charged once; with "
        "another body it is refused with 409 `idempotency_conflict`. It is the account's, whichever of its keys asks.",
        "schema": {"type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY_CHARS_MAX},
        "example": "order-1729",
    }


def _example_reply(embeddings: list[Any]) -> Json:
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(embeddings)]
    return {
        "object": "list",
        "data": data,
        "model": EXAMPLE_MODEL,
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
