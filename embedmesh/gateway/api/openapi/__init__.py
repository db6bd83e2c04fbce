"""The OpenAPI 3.1 document of the gateway's public API.

Nothing is said twice: request members come from the table that validates them or the struct that decodes them, failures
and their retry headers from the table that maps them to HTTP. A test holds the routes to the gateway's own route table.
"""

from embedmesh.gateway.api.openapi.replies import HEADERS, failure_row, header
from embedmesh.gateway.api.openapi.routes import paths
from embedmesh.gateway.api.openapi.schemas import schemas
from embedmesh.gateway.api.openapi.shapes import Json
from embedmesh.gateway.api.pages import docs_page
from embedmesh.http.failures import TABLE

__all__ = ["docs_page", "document"]

ASIDE = "x-embedmesh-aside"  # of a tag: not for those who make applications


def document(version: str) -> Json:
    """The whole document, ready to be written as JSON. `version` is the product's."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embedmesh",
            "version": version,
            "summary": "OpenAI-compatible embeddings from as many nodes as you have.",
            "description": (
                "Every path or method that is not listed here is refused with 404 `not_found` or 405 "
                "`method_not_allowed`, in the same error envelope. Every reply has an `x-request-id`; send one of "
                "1 to 128 characters of `A-Z a-z 0-9 . _ -` and it is kept. HEAD is answered wherever GET is."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The gateway that serves this document"}],
        "tags": [
            {"name": "Embeddings", "description": "Texts in, vectors out."},
            {"name": "Models", "description": "What live nodes serve now."},
            {"name": "Account", "description": "What an account has, what it used, and its keys."},
            {"name": "Operations", "description": "For whoever runs this gateway."},
            {"name": "About", "description": "The API, described."},
            {"name": "Nodes", "description": "What nodes say to this gateway, signed.", ASIDE: True},
            {"name": "Administration", "description": "For keys with the scope `admin`.", ASIDE: True},
        ],
        "security": [{"bearerAuth": []}],
        "paths": paths(),
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
                    "description": "RFC 9421, `hmac-sha256` under the session that the node agreed when it registered.",
                },
            },
            "headers": {name: header(name) for name in HEADERS},
            "schemas": schemas(),
        },
        "x-embedmesh-errors": [failure_row(failure) for failure in TABLE],
    }
