"""The OpenAPI 3.1 document of the gateway's public API.

It repeats nothing: operations come from the rows of the route table, schemas from the structs in them, the request for
embeddings from the table that validates it, failures and their retry headers from the table that maps them to HTTP.
"""

import functools
from typing import Any

from embedmesh.gateway.api.embeddings_api import reply_examples, request_examples
from embedmesh.gateway.api.openapi.operations import operation, types_of
from embedmesh.gateway.api.openapi.responses import HEADERS, failure_row, header
from embedmesh.gateway.api.openapi.schemas import Json, schemas_of
from embedmesh.gateway.api.rerank_api import RERANK_PATH, rerank_reply_examples, rerank_request_examples
from embedmesh.gateway.api.table import APIS
from embedmesh.http.failures import TABLE
from embedmesh.http.paths import EMBEDDINGS_PATH

ASIDE = "x-embedmesh-aside"  # of a tag: the page folds it, because applications do not need it


TAGS: list[Json] = [
    {"name": "Embeddings", "description": "Texts in, vectors out."},
    {"name": "Rerank", "description": "A query and documents in, the best documents out."},
    {
        "name": "Chat, completions, images",
        "description": "What nodes of other makes generate, whole or in streams.",
    },
    {
        "name": "Confidential embeddings",
        "description": "The same, sealed for one node: the gateway reads neither texts nor vectors.",
    },
    {
        "name": "Confidential chat, completions, images",
        "description": "Sealed for a node beside a server of another make, whole or event by event.",
    },
    {"name": "Files", "description": "Files of requests for batches, and their results."},
    {"name": "Batches", "description": "Files of requests that are worked off within a day, for less."},
    {"name": "Jobs", "description": "Budgets that pay for many requests, each once, whatever dies on the way."},
    {"name": "Models", "description": "What ready nodes serve now."},
    {"name": "Account", "description": "Your account: balance, usage and keys."},
    {"name": "Operations", "description": "For those who run this gateway."},
    {"name": "About", "description": "The API, described."},
    {
        "name": "Other APIs",
        "description": "The same in the words of Ollama, Cohere, TEI, Google.",
    },
    {"name": "Nodes", "description": "Signed messages of nodes to this gateway.", ASIDE: True},
    {"name": "Administration", "description": "For keys with the scope `admin`.", ASIDE: True},
]


@functools.cache  # it takes a tenth of a second
def document(version: str) -> Json:
    """The whole document, ready to be written as JSON. `version` is the product's. Nobody may change it."""
    rows = [(route, api.TAG) for api in APIS for route in api.ROUTES]
    types = [kind for route, _ in rows for kind in types_of(route)]
    references, components = schemas_of(types)
    known = dict(zip(map(repr, types), references, strict=True))

    def schema_of(kind: Any) -> Json:
        if isinstance(kind, tuple):
            return {"anyOf": [known[repr(one)] for one in kind]}
        return known[repr(kind)]

    paths: Json = {}
    for route, tag in rows:
        paths.setdefault(route.path, {})[route.method.lower()] = operation(route, tag, schema_of)
    _add_examples(paths[EMBEDDINGS_PATH]["post"], request_examples(), reply_examples())
    _add_examples(paths[RERANK_PATH]["post"], rerank_request_examples(), rerank_reply_examples())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embedmesh",
            "version": version,
            "summary": "OpenAI-compatible embeddings, rerank, chat, completions and images from many nodes.",
            "description": (
                "Other paths and methods get 404 `not_found` or 405 `method_not_allowed`, in the same error envelope. "
                "Every reply has an `x-request-id`: the request's own if that has 1 to 128 characters of "
                "`A-Z a-z 0-9 . _ -`, else a new one. HEAD works wherever GET does."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The gateway that serves this document"}],
        "tags": TAGS,
        "security": [{"bearerAuth": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearerAuth": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "`Authorization: Bearer YOUR_KEY`, or `api-key: YOUR_KEY` as Azure's clients do.",
                },
                "nodeSignature": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Signature",
                    "description": "RFC 9421, `hmac-sha256` under the session from the node's registration.",
                },
            },
            "headers": {name: header(name) for name in HEADERS},
            "schemas": components,
        },
        "x-embedmesh-errors": [failure_row(failure) for failure in TABLE],
    }


def _add_examples(post: Json, requests: Json, replies: Json) -> None:
    post["requestBody"]["content"]["application/json"]["examples"] = requests
    post["responses"]["200"]["content"]["application/json"]["examples"] = replies
