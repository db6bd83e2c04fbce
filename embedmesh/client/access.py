"""Which gateway a client talks to, and with which key.

`OPENAI_BASE_URL` and `OPENAI_API_KEY` are not read: a key goes only where its owner sent it, and that one is for
another server.
"""

import os
import ssl
from urllib.parse import urlsplit

import msgspec

from embedmesh.client.errors import WrongCall

URL_VARIABLE, KEY_VARIABLE = "EMBEDMESH_BASE_URL", "EMBEDMESH_API_KEY"
AGENT = "embedmesh-client"


class Access(msgspec.Struct, frozen=True):
    """`base_url` ends in `/v1` or the like, and not in a slash. `tls` is None for plain HTTP."""

    base_url: str
    host: str
    port: int
    path: str
    headers: dict[str, str]
    tls: ssl.SSLContext | None


def find_access(base_url: str | None, api_key: str | None, ssl_context: ssl.SSLContext | None) -> Access:
    """What the arguments say, else EMBEDMESH_BASE_URL and EMBEDMESH_API_KEY. Raises WrongCall."""
    url = base_url or os.environ.get(URL_VARIABLE)
    key = api_key or os.environ.get(KEY_VARIABLE)
    if not url:
        raise WrongCall(f"No gateway is known. Give base_url, as http://127.0.0.1:8080/v1, or set {URL_VARIABLE}.")
    if not key:
        raise WrongCall(f"No API key is known. Give api_key, or set {KEY_VARIABLE}.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise WrongCall("The key has characters that no key has.")
    url = checked_url(url)
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    headers = {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # a compressed reply may be of any size
        "User-Agent": AGENT,
    }
    return Access(
        base_url=url,
        host=parts.hostname or "",
        port=parts.port or (443 if secure else 80),
        path=parts.path,
        headers=headers,
        tls=(ssl_context or ssl.create_default_context()) if secure else None,
    )


def checked_url(base_url: str) -> str:
    """A gateway's address without a slash at its end. Raises WrongCall."""
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or "@" in parts.netloc or parts.query or parts.fragment:
        raise WrongCall("The gateway's address must look like http://127.0.0.1:8080/v1, without user or query.")
    return base_url.rstrip("/")
