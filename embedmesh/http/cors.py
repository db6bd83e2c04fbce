"""Which pages of other origins may call the API from a browser: none, unless the operator names them.

Only what callers use is open to them, never what operators and nodes do, and never with credentials: a page has to
bring a key of its own.
"""

import re
from collections.abc import Collection, Sequence

from aiohttp import web

ORIGIN = re.compile(r"https?://[a-z0-9.-]+(?::[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](?::[0-9]{1,5})?")
ANY = "*"
OPEN, CLOSED = ("/v1/", "/openai/", "/embeddings", "/models"), ("/v1/admin", "/v1/nodes")
MAY_SEND = re.compile(  # as browsers write them: in small letters
    "authorization|api-key|content-type|idempotency-key|openai-(?:organization|project|beta)|x-request-id"
    "|x-stainless-[a-z0-9-]{1,32}"
)
SENT_MAX = 32  # headers that a page may ask for; the SDKs send some fifteen
MAX_AGE_S = 600  # a browser asks again after that
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
    """The rule for a list of origins, each as `https://HOST[:PORT]`, or `*` for every one."""

    def __init__(self, origins: Sequence[str]) -> None:
        """Raises ValueError for what is no origin."""
        for origin in origins:
            if origin != ANY and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin} is no origin: write https://HOST or https://HOST:PORT, or *.")
        self._origins = frozenset(origins)

    def covers(self, path: str) -> bool:
        """Whether the path is for callers."""
        return path.startswith(OPEN) and not path.startswith(CLOSED)

    def headers(self, origin: str | None) -> dict[str, str]:
        """What a reply says to a page of that origin; None where the request names none."""
        if ANY in self._origins:
            return {"Access-Control-Allow-Origin": ANY, "Access-Control-Expose-Headers": MAY_READ}
        if origin is None or origin not in self._origins:
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": MAY_READ,
            "Vary": "Origin",
        }

    def preflight(self, request: web.BaseRequest, methods: Collection[str]) -> web.Response | None:
        """The answer to a browser that asks before it sends; None where it asks for what it may not do."""
        wanted = request.headers.get("Access-Control-Request-Method")
        allowed = "Access-Control-Allow-Origin" in self.headers(request.headers.get("Origin"))
        if request.method != "OPTIONS" or wanted not in methods or not allowed:
            return None
        asked = [name.strip().lower() for name in request.headers.get("Access-Control-Request-Headers", "").split(",")]
        headers = {
            "Access-Control-Allow-Methods": ", ".join(sorted(methods)),
            "Access-Control-Allow-Headers": ", ".join([name for name in asked[:SENT_MAX] if MAY_SEND.fullmatch(name)]),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        return web.Response(status=204, headers=headers)
