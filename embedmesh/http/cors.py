"""CORS: the pages of other origins that may call the API from a browser. None, unless the operator names them.

Only the paths for callers are open to them, never those for operators and nodes, and never with credentials: a page
must bring an API key of its own.
"""

import re
from collections.abc import Collection, Sequence

from aiohttp import web

ORIGIN_FORM = re.compile(r"https?://[a-z0-9.-]+(?::[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](?::[0-9]{1,5})?")
ANY = "*"
CALLER_PATHS, OPERATOR_PATHS = ("/v1/", "/openai/", "/embeddings", "/models"), ("/v1/admin", "/v1/nodes")
MAY_SEND = re.compile(  # in lower case, as browsers write them
    "authorization|api-key|content-type|idempotency-key|x-embedmesh-job|openai-(?:organization|project|beta)|x-request-id"
    "|x-stainless-[a-z0-9-]{1,32}"
)
PREFLIGHT_HEADERS_MAX = 32  # headers that a page may ask to send; the SDKs send some fifteen
PREFLIGHT_CACHE_S = 600
MAY_READ = ", ".join(
    (
        "x-request-id",
        "openai-processing-ms",
        "retry-after",
        "retry-after-ms",
        "x-should-retry",
        "idempotent-replayed",
        *(f"x-embedmesh-{what}" for what in ("cached", "cost-nanousd", "ignored", "node", "request", "truncated")),
        *(f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in ("requests", "tokens")),
    )
)


class Cors:
    """The rule for a list of origins: each `https://HOST[:PORT]`, or `*` for all."""

    def __init__(self, origins: Sequence[str]) -> None:
        """Raises ValueError for a malformed origin."""
        for origin in origins:
            if origin != ANY and not ORIGIN_FORM.fullmatch(origin):
                raise ValueError(f"{origin} is not an origin: write https://HOST or https://HOST:PORT, or *.")
        self._origins = frozenset(origins)

    def covers(self, path: str) -> bool:
        """Whether the path is for callers."""
        return path.startswith(CALLER_PATHS) and not path.startswith(OPERATOR_PATHS)

    def headers(self, origin: str | None) -> dict[str, str]:
        """The CORS headers of a reply to a request with that `Origin` header, or with none."""
        if ANY in self._origins:
            return {"Access-Control-Allow-Origin": ANY, "Access-Control-Expose-Headers": MAY_READ}
        if origin is None or origin not in self._origins:
            return {"Vary": "Origin"}
        return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": MAY_READ, "Vary": "Origin"}

    def preflight(self, request: web.BaseRequest, methods: Collection[str]) -> web.Response | None:
        """The reply to a browser's preflight request; None for another request, or for one that is not allowed."""
        method = request.headers.get("Access-Control-Request-Method")
        allowed = "Access-Control-Allow-Origin" in self.headers(request.headers.get("Origin"))
        if request.method != "OPTIONS" or method not in methods or not allowed:
            return None
        names = [name.strip().lower() for name in request.headers.get("Access-Control-Request-Headers", "").split(",")]
        headers = {
            "Access-Control-Allow-Methods": ", ".join(sorted(methods)),
            "Access-Control-Allow-Headers": ", ".join(
                [name for name in names[:PREFLIGHT_HEADERS_MAX] if MAY_SEND.fullmatch(name)]
            ),
            "Access-Control-Max-Age": str(PREFLIGHT_CACHE_S),
        }
        return web.Response(status=204, headers=headers)
