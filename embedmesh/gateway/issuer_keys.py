"""The keys with which an OpenID Connect issuer signs: fetched from it, kept, and fetched again before they are old.

Nothing that callers send can make this gateway fetch more than once in UNKNOWN_KEY_S, nor wait for longer than FETCH_S.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from joserfc.jwk import JWKRegistry

from embedmesh.rules.errors import Overloaded
from embedmesh.rules.ports import Clock

FETCH_S = 5.0  # of one document; an operator waits meanwhile
KEYS_EVERY_S = 600.0  # an issuer publishes a new key long before it signs with it
ISSUER_AGAIN_S = 30.0  # after a failure
UNKNOWN_KEY_S = 60.0  # between two fetches for keys that are not known: strangers name any
OLD_KEYS_S = 86_400.0  # the issuer was away for so long that a key may have been withdrawn
ISSUER_DOCUMENT_BYTES_MAX = 128 * 1024  # a large issuer's key set has 20 kB
ISSUER_KEYS_MAX = 64  # issuers have two to ten
KEY_WAITERS_MAX = 64  # requests that wait for a fetch at one time; more are refused
RSA_BITS_MAX = 8_192  # a signature of such a key takes a millisecond to check

Fetch = Callable[[str], Awaitable[Any]]

log = logging.getLogger("embedmesh.oidc")


class Discovery(msgspec.Struct, frozen=True):
    """What is needed of an issuer's discovery document."""

    issuer: str
    jwks_uri: str


class PublishedKeys(msgspec.Struct, frozen=True):
    """An issuer's public keys, as it publishes them (RFC 7517)."""

    keys: list[dict[str, Any]]


class IssuerKeys:
    """The keys of one issuer, by their id. `run` has to run."""

    def __init__(self, issuer: str, clock: Clock, fetch: Fetch | None = None) -> None:
        self._issuer = issuer
        self._clock = clock
        self._fetch = fetch or fetch_json
        self._keys: Mapping[str, Any] = {}
        self._fetched = self._tried = float("-inf")  # when, on the monotonic clock
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0

    async def run(self) -> None:
        """Keep the keys fresh. For ever; cancel it."""
        try:
            while True:
                await self._refresh()
                await asyncio.sleep(KEYS_EVERY_S if self._tried == self._fetched else ISSUER_AGAIN_S)
        finally:
            if self._fetching is not None:
                self._fetching.cancel()

    async def find(self, key_id: str) -> Any | None:
        """The key of that id, or the only one if the id is empty; None if the issuer has none.

        Raises Overloaded where its keys cannot be had: the issuer is away.
        """
        key = self._known(key_id)
        if key is None and self._may_look() and self._waiting < KEY_WAITERS_MAX:
            self._waiting += 1
            try:
                await self._refresh()
            finally:
                self._waiting -= 1
            key = self._known(key_id)
        if self._clock.monotonic() - self._fetched > OLD_KEYS_S:
            raise Overloaded(
                "The issuer of sign-ins does not answer. Use an admin key, or try again.", retry_after_s=ISSUER_AGAIN_S
            )
        return key

    def _known(self, key_id: str) -> Any | None:
        if not key_id:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(key_id)

    def _may_look(self) -> bool:
        return self._fetching is not None or self._clock.monotonic() - self._tried >= UNKNOWN_KEY_S

    async def _refresh(self) -> None:
        """Fetch the keys, or wait for the fetch that runs."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._look())
            self._fetching.add_done_callback(self._looked)
        await asyncio.shield(self._fetching)

    async def _look(self) -> None:
        try:
            found = await self._fetch(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
            discovery = msgspec.convert(found, Discovery)
            if discovery.issuer != self._issuer:
                raise ValueError("it says that it is another issuer")
            keys = importable(msgspec.convert(await self._fetch(checked_url(discovery.jwks_uri)), PublishedKeys).keys)
            if not keys:
                raise ValueError("it has no key that can be used")
        except Exception as error:  # noqa: BLE001 - whatever an issuer may send
            log.warning("the issuer of sign-ins has no keys for us (%s): admin keys go on", _reason(error))
            self._tried = self._clock.monotonic()
        else:
            self._keys = keys
            self._tried = self._fetched = self._clock.monotonic()

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._fetching = None


def importable(keys: list[dict[str, Any]]) -> dict[str, Any]:
    """Keys of an issuer that signatures can be checked with, by their ids; the others are left out."""
    found: dict[str, Any] = {}
    for said in keys[:ISSUER_KEYS_MAX]:
        if said.get("kty") not in ("RSA", "EC", "OKP") or said.get("use", "sig") != "sig" or "d" in said:
            continue
        try:
            key = JWKRegistry.import_key(said)
            if said["kty"] == "RSA" and key.raw_value.key_size > RSA_BITS_MAX:
                continue
        except Exception:  # noqa: BLE001, S112 - what one key may hold keeps no other out
            continue
        found[str(said.get("kid", ""))] = key
    return found


async def fetch_json(url: str) -> Any:
    """A JSON document. Follows nothing, unpacks nothing. Raises ClientError, OSError, ValueError, DecodeError."""
    body = b""
    timeout = aiohttp.ClientTimeout(total=FETCH_S)
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    async with (
        aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session,
        session.get(url, allow_redirects=False, headers=headers) as reply,
    ):
        if reply.status != 200:
            raise ValueError(f"status {reply.status}")
        async for piece in reply.content.iter_chunked(16_384):
            body += piece
            if len(body) > ISSUER_DOCUMENT_BYTES_MAX:
                raise ValueError(f"more than {ISSUER_DOCUMENT_BYTES_MAX:,} bytes")
    return msgspec.json.decode(body)


def checked_url(url: str) -> str:
    """The URL, if it is https, or http on this machine. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname and "@" not in parts.netloc:
        return url
    if parts.scheme == "http" and _is_here(parts.hostname or ""):
        return url
    raise ValueError("it is not https")


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: Exception) -> str:
    """In words where they are ours, else the kind of error: what an issuer says is not repeated."""
    return str(error) if type(error) is ValueError else type(error).__name__
