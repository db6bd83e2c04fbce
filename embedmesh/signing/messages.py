"""Signed HTTP messages between gateway and node: one profile of RFC 9421, `hmac-sha256` under a session key.

A request's signature covers method, path, body digest (RFC 9530), node and request id; a reply's covers status, body
digest and receipt number, and of the request all of that and the request's own signature (section 2.4). What is
signed is the "signature base" (section 2.5): a line for each covered component, the last one for the parameters.

This runs for every request, so it builds and accepts this one profile as fixed text: the same components and
parameters, in the same order, under the label `em`. Anything else is refused unread. The signature does not cover the
query of a URL: a path with one is never signed. A nonce is `<instance>-<counter>`, both in hex.
"""

import itertools
import re
from binascii import b2a_base64
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from operator import methodcaller
from typing import Literal, NamedTuple

import msgspec

from embedmesh.signing.replay import ReplayWindow
from embedmesh.signing.session import Session

CLOCK_SKEW_MAX_S = 60  # between the clocks of gateway and node
ROTATION_S = 120  # how long the previous session stays valid: longer than any request signed under it may travel
INSTANCE = re.compile("[0-9a-f]{16}")

REQUEST_COVERS = '("@method" "@path" "content-digest" "embedmesh-node" "embedmesh-request-id")'
REQUEST_LINES = 6  # of the signature base: one for each component, so no value can pass for two
REPLY_COVERS = (
    '("@status" "content-digest" "embedmesh-receipt" "@method";req "@path";req "content-digest";req'
    ' "embedmesh-node";req "embedmesh-request-id";req "signature";req;key="em")'
)
REQUEST_INPUT = re.compile(
    re.escape(f"em={REQUEST_COVERS}")
    + ';created=([1-9][0-9]{0,11});nonce="([0-9a-f]{16})-([0-9a-f]{1,16})";keyid="([0-9a-f]{16})";alg="hmac-sha256"'
)
REPLY_INPUT = re.compile(
    re.escape(f"em={REPLY_COVERS}") + ';created=([1-9][0-9]{0,11});keyid="([0-9a-f]{16})";alg="hmac-sha256"'
)
REQUEST_HEADERS = ("content-digest", "embedmesh-node", "embedmesh-request-id", "signature-input", "signature")
REPLY_HEADERS = (b"content-digest", b"embedmesh-receipt", b"signature-input", b"signature")
AS_ASCII = methodcaller("decode", "ascii")
RECEIPT = re.compile("0|[1-9][0-9]{0,14}")

Reason = Literal["missing", "malformed", "node", "key", "time", "signature", "digest", "replay"]


class Unauthenticated(Exception):
    """The message is not genuine, not recent, or not new.

    `reason` is the check that failed: a word for metrics that holds nothing of the message.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Mac:
    """HMAC-SHA256 (RFC 2104) of a session, from two hashes that have taken the key already.

    `hmac.digest` takes the key anew each time: on a signature base that costs more than twice as much.
    """

    __slots__ = ("_inner", "_outer", "key_id")

    def __init__(self, session: Session) -> None:
        block = session.key.ljust(64, b"\0")
        assert len(block) == 64
        self.key_id = session.key_id
        self._inner = sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in block))

    def sign(self, base: bytes) -> str:
        """The MAC, as a byte sequence of a structured field (RFC 9651): base64 between colons."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(base)
        outer.update(inner.digest())
        return f":{b2a_base64(outer.digest(), newline=False).decode('ascii')}:"


class RequestSigner:
    """Signs requests under one session. `instance` is 16 hex digits, drawn once by each process.

    A process makes one signer for a session: the counter starts here.
    """

    def __init__(self, session: Session, node_id: str, instance: str) -> None:
        assert INSTANCE.fullmatch(instance)
        self._node_id = node_id
        self._mac = Mac(session)
        self._instance = instance
        self._counter = itertools.count(1)

    def sign(self, method: str, path: str, body: bytes, request_id: str, now_s: int) -> "SignedRequest":
        """Sign a request. Raises ValueError for a line break in a value, or a path with a query."""
        node_id, mac, digest = self._node_id, self._mac, content_digest(body)
        params = (
            f'{REQUEST_COVERS};created={now_s};nonce="{self._instance}-{next(self._counter):x}"'
            f';keyid="{mac.key_id}";alg="hmac-sha256"'
        )
        base = _request_base(method, path, digest, node_id, request_id, params)
        if "?" in path or b"\r" in base or base.count(b"\n") != REQUEST_LINES - 1:
            raise ValueError("the path has a query, or a value has a line break")
        signature = mac.sign(base)
        headers = (
            f"Content-Digest: {digest}\r\nEmbedmesh-Node: {node_id}\r\nEmbedmesh-Request-Id: {request_id}\r\n"
            f"Signature-Input: em={params}\r\nSignature: em={signature}\r\n"
        )
        covered = _covered(method, path, digest, node_id, request_id, signature)
        return SignedRequest(headers.encode("ascii"), digest, covered, mac)


class SignedRequest(msgspec.Struct, eq=False):
    """`headers` are ready to be put into an HTTP/1.1 head: five lines, each ended by CR LF. `digest` is the body's."""

    headers: bytes
    digest: str
    _covered: str
    _mac: Mac

    def check_reply(self, status: int, body: bytes, headers: Mapping[bytes, bytes], now_s: int) -> int:
        """The receipt number of a reply to this request. Header names in lower case. Raises Unauthenticated."""
        try:
            digest, receipt, signature_input, signature = map(AS_ASCII, map(headers.__getitem__, REPLY_HEADERS))
        except KeyError:
            raise Unauthenticated("missing") from None
        except UnicodeDecodeError:
            raise Unauthenticated("malformed") from None
        form = REPLY_INPUT.fullmatch(signature_input)
        if form is None or not RECEIPT.fullmatch(receipt):
            raise Unauthenticated("malformed")
        created, key_id = form.groups()
        if key_id != self._mac.key_id:
            raise Unauthenticated("key")
        _check_time(created, now_s)
        base = _reply_base(status, digest, receipt, self._covered, signature_input.removeprefix("em="))
        _check_signature(self._mac, base, signature)
        if digest != content_digest(body):
            raise Unauthenticated("digest")
        return int(receipt)


class _SessionInUse(NamedTuple):
    """A session that requests may come under. Each has its own window, as nonces may repeat under another key."""

    mac: Mac
    window: ReplayWindow


class RequestChecker:
    """Checks requests that carry one node's id: a node those to it, a gateway those from it.

    It remembers the nonces it has seen, so a session must not outlive it. Where one does, over a restart, set
    `not_before_s` to the time of the restart: requests signed earlier are refused then.
    """

    def __init__(self, node_id: str) -> None:
        self.not_before_s = 0  # Unix time
        self._node_id = node_id
        self._newest: _SessionInUse | None = None
        self._previous: _SessionInUse | None = None
        self._previous_until_s = 0

    def add(self, session: Session, now_s: int) -> None:
        """Accept a new session too. The previous one stays valid for ROTATION_S; the one before it is forgotten."""
        if any(used and used.mac.key_id == session.key_id for used in (self._newest, self._previous)):
            return  # its window must not be forgotten
        self._previous, self._newest = self._newest, _SessionInUse(Mac(session), ReplayWindow())
        self._previous_until_s = now_s + ROTATION_S

    def check_head(self, method: str, path: str, headers: Mapping[str, str], now_s: int) -> "CheckedRequest":
        """Check a request before its body is there; it is accepted only by `check_body`. Raises Unauthenticated.

        `path` as it stood in the request line, not decoded. Header names in lower case.
        """
        try:
            digest, node_id, request_id, signature_input, signature = (headers[name] for name in REQUEST_HEADERS)
        except KeyError:
            raise Unauthenticated("missing") from None
        form = REQUEST_INPUT.fullmatch(signature_input)
        if form is None:
            raise Unauthenticated("malformed")
        created, instance, counter, key_id = form.groups()
        if node_id != self._node_id:
            raise Unauthenticated("node")
        session = self._find(key_id, now_s)
        _check_time(created, now_s)
        if int(created) < self.not_before_s:
            raise Unauthenticated("time")
        try:
            base = _request_base(method, path, digest, node_id, request_id, signature_input.removeprefix("em="))
        except UnicodeEncodeError:
            raise Unauthenticated("malformed") from None
        _check_signature(session.mac, base, signature)
        if not session.window.new(instance, int(counter, 16)):  # before its body is read
            raise Unauthenticated("replay")
        covered = _covered(method, path, digest, node_id, request_id, signature.removeprefix("em="))
        return CheckedRequest(request_id, digest, covered, session, instance, int(counter, 16))

    def _find(self, key_id: str, now_s: int) -> _SessionInUse:
        newest, previous = self._newest, self._previous
        if newest is not None and newest.mac.key_id == key_id:
            return newest
        if previous is not None and previous.mac.key_id == key_id and now_s <= self._previous_until_s:
            return previous
        raise Unauthenticated("key")


@dataclass(slots=True)
class CheckedRequest:
    """A genuine request, to be answered under the session that it came under. `digest` is its body's."""

    request_id: str
    digest: str
    _covered: str
    _session: _SessionInUse
    _instance: str
    _counter: int

    def check_body(self, body: bytes, now_s: int) -> None:
        """Accept the request, once. Raises Unauthenticated for a body that was not signed, and for a replay."""
        if self.digest != content_digest(body):
            raise Unauthenticated("digest")
        if not self._session.window.admit(self._instance, self._counter, now_s):
            raise Unauthenticated("replay")

    def sign_reply(self, status: int, body: bytes, receipt_number: int, now_s: int) -> list[tuple[str, str]]:
        """The headers that sign a reply. Receipts count from 1; 0 means that this reply has none."""
        digest, receipt, mac = content_digest(body), str(receipt_number), self._session.mac
        params = f'{REPLY_COVERS};created={now_s};keyid="{mac.key_id}";alg="hmac-sha256"'
        signature = mac.sign(_reply_base(status, digest, receipt, self._covered, params))
        return [
            ("Content-Digest", digest),
            ("Embedmesh-Receipt", receipt),
            ("Signature-Input", f"em={params}"),
            ("Signature", f"em={signature}"),
        ]


def content_digest(body: bytes) -> str:
    """The value of `Content-Digest` (RFC 9530) for a body."""
    return digest_value(sha256(body).digest())


def digest_value(digest: bytes) -> str:
    """A SHA-256 as `Content-Digest` writes it."""
    return f"sha-256=:{b2a_base64(digest, newline=False).decode('ascii')}:"


def _request_base(method: str, path: str, digest: str, node_id: str, request_id: str, params: str) -> bytes:
    return (
        f'"@method": {method}\n"@path": {path}\n"content-digest": {digest}\n"embedmesh-node": {node_id}\n'
        f'"embedmesh-request-id": {request_id}\n"@signature-params": {params}'
    ).encode("ascii")


def _covered(method: str, path: str, digest: str, node_id: str, request_id: str, signature: str) -> str:
    """The part of a request that the signature of its reply covers."""
    return (
        f'"@method";req: {method}\n"@path";req: {path}\n"content-digest";req: {digest}\n'
        f'"embedmesh-node";req: {node_id}\n"embedmesh-request-id";req: {request_id}\n'
        f'"signature";req;key="em": {signature}'
    )


def _reply_base(status: int, digest: str, receipt: str, covered: str, params: str) -> bytes:
    return (
        f'"@status": {status}\n"content-digest": {digest}\n"embedmesh-receipt": {receipt}\n{covered}\n'
        f'"@signature-params": {params}'
    ).encode("ascii")


def _check_time(created: str, now_s: int) -> None:
    if abs(now_s - int(created)) > CLOCK_SKEW_MAX_S:
        raise Unauthenticated("time")


def _check_signature(mac: Mac, base: bytes, signature: str) -> None:
    if not signature.isascii() or not compare_digest(f"em={mac.sign(base)}", signature):
        raise Unauthenticated("signature")
