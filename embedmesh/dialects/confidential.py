"""The envelope of a confidential request and of its reply, in the SDKs' scheme and in ours. Nothing is opened.

The SDKs' form is that of the reference: all bytes as base64. Ours has the same names where it has the same members.
"""

import re
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta

from embedmesh.rules.base64s import decode64, encode64
from embedmesh.rules.confidential import HPKE_SCHEME, LOCK_ID_MAX, SDK_SCHEME, Scheme, SealedAnswer, SealedCall
from embedmesh.rules.errors import Failure, InvalidJson, InvalidType, InvalidValue, MissingParameter
from embedmesh.rules.exchange import Reply

KEY_BYTES, SALT_BYTES, NONCE_BYTES, HASH_BYTES, TAG_BYTES = 32, 16, 12, 32, 16
ENC_BYTES = 32  # of HPKE: the encapsulated key, before the ciphertext
SDK_ONLY = ("client_dh_public_key", "nonce", "plaintext_body_hash", "salt")
MEMBER = re.compile(r"at `\$\.([a-z_]+)`|required field `([a-z_]+)`")


class Envelope(msgspec.Struct, frozen=True):
    """The body of a confidential request. The last seven members belong to one of the schemes."""

    ciphertext: str
    model_name: Annotated[str, Meta(min_length=1, max_length=200)]
    stack_small_id: Annotated[int, Meta(ge=0, le=LOCK_ID_MAX)]
    node_dh_public_key: str
    num_compute_units: Annotated[int, Meta(ge=0, le=LOCK_ID_MAX)] | None = None
    stream: bool | None = None
    scheme: Scheme = SDK_SCHEME
    client_dh_public_key: str | None = None
    nonce: str | None = None
    plaintext_body_hash: str | None = None
    salt: str | None = None
    request_id: Annotated[str, Meta(max_length=64)] | None = None
    expires_ms: Annotated[int, Meta(ge=0, le=LOCK_ID_MAX)] | None = None


DECODE = msgspec.json.Decoder(Envelope).decode


def parse(body: bytes) -> tuple[Envelope, SealedCall]:
    """The envelope, and what a node gets of it once its lock is known. Raises a CallerFailure that names the member."""
    envelope, call = read_envelope(body)
    if envelope.stream:
        raise InvalidValue("Embeddings are not streamed: leave `stream` out, or false.", param="stream")
    return envelope, call


def read_envelope(body: bytes) -> tuple[Envelope, SealedCall]:
    """The same for whatever may be streamed."""
    envelope = _decoded(body)
    ours = envelope.scheme == HPKE_SCHEME
    wanted = ("request_id", "expires_ms") if ours else SDK_ONLY
    for name in wanted:
        if getattr(envelope, name) is None:
            raise MissingParameter(f"A request of the scheme `{envelope.scheme}` has the member `{name}`.", param=name)
    return envelope, SealedCall(
        scheme=envelope.scheme,
        model="",
        model_name=envelope.model_name,
        lock=envelope.stack_small_id,
        units=0,
        node_key=_bytes(envelope, "node_dh_public_key", KEY_BYTES),
        ciphertext=_ciphertext(envelope, TAG_BYTES + ENC_BYTES if ours else TAG_BYTES),
        request_id=envelope.request_id or "",
        expires_ms=envelope.expires_ms or 0,
        client_key=b"" if ours else _bytes(envelope, "client_dh_public_key", KEY_BYTES),
        salt=b"" if ours else _bytes(envelope, "salt", SALT_BYTES),
        nonce=b"" if ours else _bytes(envelope, "nonce", NONCE_BYTES),
        body_hash=b"" if ours else _bytes(envelope, "plaintext_body_hash", HASH_BYTES),
    )


def plaintext_bytes_max(call: SealedCall) -> int:
    """What the ciphertext can hold."""
    return len(call.ciphertext) - TAG_BYTES - (ENC_BYTES if call.scheme == HPKE_SCHEME else 0)


def render(
    scheme: str, answer: SealedAnswer, tokens: int, headers: dict[str, str], next_lock: bytes | None = None
) -> Reply:
    """The reply to a request that a node has answered; `next_lock` is JSON."""
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    members: dict[str, Any] = {**sealed_members(scheme, answer), "usage": usage}
    if next_lock is not None:
        members["next_lock"] = orjson.Fragment(next_lock)
    return Reply(headers, orjson.dumps(members))


def refusal(failure: Failure, kind: str, scheme: str, answer: SealedAnswer | None) -> bytes:
    """The envelope of a failure; what the node has sealed for the caller is a member of it."""
    error: dict[str, Any] = {
        "message": failure.message,
        "type": kind,
        "param": failure.param,
        "code": failure.code,
    }
    if answer is not None:
        error["sealed"] = sealed_members(scheme, answer)
    return orjson.dumps({"error": error})


def sealed_members(scheme: str, answer: SealedAnswer) -> dict[str, str]:
    """What a caller needs to open an answer, and to check who gave it."""
    members = {
        "ciphertext": encode64(answer.sealed),
        "statement": encode64(answer.statement),
        "statement_signature": encode64(answer.signature),
    }
    if scheme == SDK_SCHEME:
        members["nonce"] = encode64(answer.nonce)
        members["response_hash"] = encode64(answer.response_hash)
        members["signature"] = encode64(answer.response_signature)
    return members


def _decoded(body: bytes) -> Envelope:
    try:
        return DECODE(body)
    except msgspec.ValidationError as error:
        found = MEMBER.search(str(error))
        if found is None:
            raise InvalidType("The body is not the envelope of a confidential request.") from None
        wrong, missing = found.groups()
        if missing:
            raise MissingParameter(f"The envelope lacks the member `{missing}`.", param=missing) from None
        raise InvalidType(f"`{wrong}` is not of the envelope's form.", param=wrong) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson("The body is not one JSON object.") from None


def _bytes(envelope: Envelope, name: str, size: int) -> bytes:
    try:
        return decode64(getattr(envelope, name), size)
    except ValueError:
        raise InvalidValue(f"`{name}` is not {size} bytes in standard base64, padded.", param=name) from None


def _ciphertext(envelope: Envelope, least: int) -> bytes:
    try:
        data = decode64(envelope.ciphertext)
    except ValueError:
        data = b""
    if len(data) < least:
        words = f"`ciphertext` is not {least} bytes or more in standard base64, padded."
        raise InvalidValue(words, param="ciphertext")
    return data
