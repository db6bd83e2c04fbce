"""Signed HTTP messages between gateway and node: one profile of RFC 9421, `hmac-sha256` under a session key.

A request's signature covers method, path, body digest (RFC 9530), node and request id; a reply's covers status, body
digest and receipt number, and of the request all of that and the request's own signature (section 2.4). What is
signed is the "signature base" (section 2.5): a line for each covered component, the last one for the parameters.

This runs for every request, and so it builds and accepts this one profile as fixed text: the same components and
parameters, in the same order, under the label `em`. Anything else is refused unread. The query of a URL is not
covered: a path with one is never signed. A nonce is `<instance>-<counter>`, both in hex.
"""

import itertools
import re
from binascii import b2a_base64
from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Literal

from embedmesh.signing.replay import ReplayWindow
from embedmesh.signing.session import Session

SKEW_S = 60  # how far the clocks of gateway and node may differ
ROTATION_S = 120  # how long the session before the newest is good: longer than any request signed under it may travel
INSTANCE = re.compile("[0-9a-f]{16}")

REQUEST_COVERS = '("@method" "@path" "content-digest" "embedmesh-node" "embedmesh-request-id")'
REQUEST_LINES = 6  # of its base: what was signed has a line for each component, so no value can pass for two
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
RECEIPT = re.compile("0|[1-9][0-9]{0,14}")

Reason = Literal["missing", "malformed", "node", "key", "time", "signature", "digest", "replay"]


class Unauthenticated(Exception):
    """The message is not what the other side of the session said, or not now, or not for the first time.

    `reason` is the check that failed: a word for metrics, which holds nothing of the message.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class RequestSigner:
    """Signs requests under one session. `instance` is 16 hex digits, drawn once by each process.

    A process makes one for a session: the counter starts here.
    """

    def __init__(self, session: Session, node_id: str, instance: str) -> None:
        assert INSTANCE.fullmatch(instance)
        self._node_id = node_id
        self._mac = Mac(session)
        self._instance = instance
        self._counter = itertools.count(1)

    def sign(self, method: str, path: str, body: bytes, request_id: str, now_s: int) -> "SignedRequest":
        """Sign a request. Raises ValueError for what cannot stand in a head, or a path with a query."""
        digest = content_digest(body)
        params = (
            f'{REQUEST_COVERS};created={now_s};nonce="{self._instance}-{next(self._counter):x}"'
            f';keyid="{self._mac.key_id}";alg="hmac-sha256"'
        )
        base = _request_base(method, path, digest, self._node_id, request_id, params)
        if "?" in path or b"\r" in base or base.count(b"\n") != REQUEST_LINES - 1:
            raise ValueError("the path has a query, or a value has a line break")
        signature = self._mac.sign(base)
        headers = (
            f"Content-Digest: {digest}\r\nEmbedmesh-Node: {self._node_id}\r\nEmbedmesh-Request-Id: {request_id}\r\n"
            f"Signature-Input: em={params}\r\nSignature: em={signature}\r\n"
        )
        asked = _asked(method, path, digest, self._node_id, request_id, signature)
        return SignedRequest(self._mac, asked, digest, headers.encode("ascii"))


class SignedRequest:
    """`headers` are ready to be put into an HTTP/1.1 head: five lines, each ended by CR LF. `digest` is the body's."""

    __slots__ = ("_asked", "_mac", "digest", "headers")

    def __init__(self, mac: "Mac", asked: str, digest: str, headers: bytes) -> None:
        self.headers = headers
        self.digest = digest
        self._asked = asked
        self._mac = mac

    def check_reply(self, status: int, body: bytes, headers: Mapping[bytes, bytes], now_s: int) -> int:
        """The receipt number of a reply to this request. Header names in lower case. Raises Unauthenticated."""
        try:
            digest = headers[b"content-digest"].decode("ascii")
            receipt = headers[b"embedmesh-receipt"].decode("ascii")
            signature_input = headers[b"signature-input"].decode("ascii")
            signature = headers[b"signature"].decode("ascii")
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
        base = _reply_base(status, digest, receipt, self._asked, signature_input.removeprefix("em="))
        _check_signature(self._mac, base, signature)
        if digest != content_digest(body):
            raise Unauthenticated("digest")
        return int(receipt)


class RequestChecker:
    """Checks requests that carry one node's id: a node those for it, a gateway those from it.

    It remembers what it has seen, so a session must not outlive it. Where one does, over a restart, set `not_before_s`
    to when that was: nothing that was signed earlier is taken then.
    """

    def __init__(self, node_id: str) -> None:
        self.not_before_s = 0  # Unix time
        self._node_id = node_id
        self._newest: _Known | None = None
        self._before: _Known | None = None
        self._before_until_s = 0

    def add(self, session: Session, now_s: int) -> None:
        """Accept a new session too; the one before stays good for ROTATION_S, the one before that is forgotten."""
        if any(known and known.mac.key_id == session.key_id for known in (self._newest, self._before)):
            return  # its window must not be forgotten
        self._before, self._newest = self._newest, _Known(session)
        self._before_until_s = now_s + ROTATION_S

    def check(self, method: str, path: str, body: bytes, headers: Mapping[str, str], now_s: int) -> "CheckedRequest":
        """Accept a request once. Raises Unauthenticated.

        `path` as it stood in the request line, not decoded. Header names in lower case.
        """
        checked = self.check_head(method, path, headers, now_s)
        checked.check_body(body, now_s)
        return checked

    def check_head(self, method: str, path: str, headers: Mapping[str, str], now_s: int) -> "CheckedRequest":
        """The same before the body is there. The request counts only once `check_body` has accepted that, too."""
        try:
            digest = headers["content-digest"]
            node_id = headers["embedmesh-node"]
            request_id = headers["embedmesh-request-id"]
            signature_input = headers["signature-input"]
            signature = headers["signature"]
        except KeyError:
            raise Unauthenticated("missing") from None
        form = REQUEST_INPUT.fullmatch(signature_input)
        if form is None:
            raise Unauthenticated("malformed")
        created, instance, counter, key_id = form.groups()
        if node_id != self._node_id:
            raise Unauthenticated("node")
        known = self._find(key_id, now_s)
        _check_time(created, now_s)
        if int(created) < self.not_before_s:
            raise Unauthenticated("time")
        try:
            base = _request_base(method, path, digest, node_id, request_id, signature_input.removeprefix("em="))
        except UnicodeEncodeError:
            raise Unauthenticated("malformed") from None
        _check_signature(known.mac, base, signature)
        if not known.window.new(instance, int(counter, 16)):  # whatever body it would bring
            raise Unauthenticated("replay")
        asked = _asked(method, path, digest, node_id, request_id, signature.removeprefix("em="))
        return CheckedRequest(known, asked, request_id, digest, instance, int(counter, 16))

    def _find(self, key_id: str, now_s: int) -> "_Known":
        newest, before = self._newest, self._before
        if newest is not None and newest.mac.key_id == key_id:
            return newest
        if before is not None and before.mac.key_id == key_id and now_s <= self._before_until_s:
            return before
        raise Unauthenticated("key")


class CheckedRequest:
    """A genuine request, to be answered under the session that it came under. `digest` is its body's."""

    __slots__ = ("_asked", "_counter", "_instance", "_known", "_mac", "digest", "request_id")

    def __init__(self, known: "_Known", asked: str, request_id: str, digest: str, instance: str, counter: int) -> None:
        self.request_id = request_id
        self.digest = digest
        self._asked = asked
        self._known = known
        self._mac = known.mac
        self._instance = instance
        self._counter = counter

    def check_body(self, body: bytes, now_s: int) -> None:
        """Raises Unauthenticated where it is not the body that was signed, or the request was accepted before."""
        if self.digest != content_digest(body):
            raise Unauthenticated("digest")
        if not self._known.window.admit(self._instance, self._counter, now_s):
            raise Unauthenticated("replay")

    def sign_reply(self, status: int, body: bytes, receipt_number: int, now_s: int) -> list[tuple[str, str]]:
        """The headers that sign a reply. Receipts count from 1; 0 says that this reply has none."""
        digest, receipt = content_digest(body), str(receipt_number)
        params = f'{REPLY_COVERS};created={now_s};keyid="{self._mac.key_id}";alg="hmac-sha256"'
        signature = self._mac.sign(_reply_base(status, digest, receipt, self._asked, params))
        return [
            ("Content-Digest", digest),
            ("Embedmesh-Receipt", receipt),
            ("Signature-Input", f"em={params}"),
            ("Signature", f"em={signature}"),
        ]


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


class _Known:
    """A session that requests may come under. Each has its own window, as nonces may repeat under another key."""

    def __init__(self, session: Session) -> None:
        self.mac = Mac(session)
        self.window = ReplayWindow()


def content_digest(body: bytes) -> str:
    """The value of `Content-Digest` (RFC 9530)."""
    return f"sha-256=:{b2a_base64(sha256(body).digest(), newline=False).decode('ascii')}:"


def _request_base(method: str, path: str, digest: str, node_id: str, request_id: str, params: str) -> bytes:
    return (
        f'"@method": {method}\n"@path": {path}\n"content-digest": {digest}\n"embedmesh-node": {node_id}\n'
        f'"embedmesh-request-id": {request_id}\n"@signature-params": {params}'
    ).encode("ascii")


def _asked(method: str, path: str, digest: str, node_id: str, request_id: str, signature: str) -> str:
    """What the signature of its reply covers of a request."""
    return (
        f'"@method";req: {method}\n"@path";req: {path}\n"content-digest";req: {digest}\n'
        f'"embedmesh-node";req: {node_id}\n"embedmesh-request-id";req: {request_id}\n'
        f'"signature";req;key="em": {signature}'
    )


def _reply_base(status: int, digest: str, receipt: str, asked: str, params: str) -> bytes:
    return (
        f'"@status": {status}\n"content-digest": {digest}\n"embedmesh-receipt": {receipt}\n{asked}\n'
        f'"@signature-params": {params}'
    ).encode("ascii")


def _check_time(created: str, now_s: int) -> None:
    if abs(now_s - int(created)) > SKEW_S:
        raise Unauthenticated("time")


def _check_signature(mac: Mac, base: bytes, signature: str) -> None:
    if not signature.isascii() or not compare_digest(f"em={mac.sign(base)}", signature):
        raise Unauthenticated("signature")
