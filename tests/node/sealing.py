"""Confidential calls as clients and gateways make them, and how their answers are read."""

import json
from collections.abc import Callable
from typing import Any, get_args

import msgspec

from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.documents import read_keys
from embedmesh.confidential.hpke_scheme import HpkeReplies, Terms
from embedmesh.confidential.statements import read_answer, request_digest
from embedmesh.rules.confidential import (
    HPKE_SCHEME,
    SDK_SCHEME,
    AnswerStatement,
    KeyDocument,
    Scheme,
    SealedAnswer,
    SealedCall,
    SignedKeys,
)
from embedmesh.rules.embeddings import ServedModels

ENCODE = msgspec.msgpack.encode
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
LOCK, REQUEST_ID = 41, "creq_1"


def keys_of(listed: bytes) -> SignedKeys | None:
    """The signed keys in a node's list of models."""
    keys = msgspec.json.decode(listed, type=ServedModels).keys
    return None if keys is msgspec.UNSET else keys


def asking(**members: Any) -> bytes:
    """The body of an ordinary request."""
    return json.dumps({"model": "tiny", "input": ["w1 w2"], "encoding_format": "float"} | members).encode()


class SealedBy:
    """A call, what its caller keeps to read the answer, and the keys that it was sealed for."""

    def __init__(
        self,
        call: SealedCall,
        opens: Callable[[SealedAnswer], bytes],
        document: KeyDocument,
        hpke: HpkeReplies | None = None,
    ) -> None:
        self.hpke = hpke
        self.call = call
        self.body = ENCODE(call)
        self._opens = opens
        self._document = document

    def but(self, **changes: Any) -> "SealedBy":
        """The same with some members changed on the way."""
        return SealedBy(msgspec.structs.replace(self.call, **changes), self._opens, self._document, self.hpke)

    def opener(self) -> Callable[[SealedAnswer, bool], bytes]:
        """Opens the events of a stream, in order."""
        if self.hpke is None:
            return lambda answer, final: self._opens(answer)
        events = self.hpke.events()
        return lambda answer, final: events.open(answer.sealed, final=final)

    def opened(self, answer: SealedAnswer) -> bytes:
        """The body of a whole answer."""
        return self._opens(answer)

    def read(self, answer: bytes) -> tuple[AnswerStatement, bytes]:
        """The checked statement, and what the caller reads; nothing of nothing."""
        sealed = msgspec.msgpack.decode(answer, type=SealedAnswer)
        digest = request_digest(self.call)
        statement = read_answer(sealed, self._document.public_key, self.call.lock, digest)
        return statement, self._opens(sealed) if sealed.sealed else b""

    def reply(self, answer: bytes) -> Any:
        """What the caller reads, as JSON."""
        return json.loads(self.read(answer)[1])


def seal(
    signed: SignedKeys,
    scheme: Scheme,
    body: bytes | None = None,
    *,
    model: str = "tests/tiny",
    name: str = "tiny",
    units: int = 1_000,
    expires_ms: int = 10**13,
    operation: str = "",
) -> SealedBy:
    """A call for the node of these keys."""
    document = read_keys(signed)
    body = asking() if body is None else body
    if scheme == SDK_SCHEME:
        sealed, replies = sdk_scheme.seal(body, document.keys[SDK_SCHEME])
        call = SealedCall(
            SDK_SCHEME,
            model,
            name,
            LOCK,
            units,
            sealed.node_key,
            sealed.ciphertext,
            client_key=sealed.client_key,
            salt=sealed.salt,
            nonce=sealed.nonce,
            body_hash=sealed.body_hash,
        )
        return SealedBy(call, lambda one: replies.open(one.nonce, one.sealed, one.response_hash), document)
    key = document.keys[HPKE_SCHEME]
    ciphertext, opens = hpke_scheme.seal(
        body, key, Terms(document.node_id, name, REQUEST_ID, LOCK, expires_ms, operation)
    )
    call = SealedCall(HPKE_SCHEME, model, name, LOCK, units, key, ciphertext, REQUEST_ID, expires_ms)
    return SealedBy(call, lambda one: opens.open(one.sealed), document, opens)
