"""What is read of a message: an attack that changes only what nobody reads is none.

The rest of a message may be changed by anybody, as it may be left out: numbers for people, spaces, other members. Of an
SDK's scheme fewer members are read, and who pins identities reads no evidence.
"""

import json
from base64 import b64decode
from collections.abc import Iterable
from typing import Any

import msgspec

from bench.middle.attacks import Place
from embedmesh.client.steps import HttpAnswer
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME, Scheme, SealedAnswer

LOCK_MEMBERS = {
    HPKE_SCHEME: ("public_key", "stack_small_id", "scheme", "expires_ms", "model", "keys"),
    SDK_SCHEME: ("public_key", "stack_small_id", "scheme", "model", "keys"),  # it sends no expiry
}
ENVELOPE_MEMBERS = {
    HPKE_SCHEME: (
        *("ciphertext", "model_name", "stack_small_id", "node_dh_public_key", "scheme"),
        *("request_id", "expires_ms"),
    ),
    SDK_SCHEME: (
        *("ciphertext", "model_name", "stack_small_id", "node_dh_public_key", "scheme"),
        *("client_dh_public_key", "nonce", "plaintext_body_hash", "salt"),
    ),
}
REPLY_MEMBERS = {
    HPKE_SCHEME: ("ciphertext", "statement", "statement_signature", "usage", "nonce"),
    SDK_SCHEME: (
        *("ciphertext", "statement", "statement_signature", "usage"),
        *("nonce", "response_hash", "signature"),
    ),
}


def meaning(place: Place, value: Any, scheme: Scheme, reads_evidence: bool) -> object:
    """To be compared with that of the same message, changed."""
    if isinstance(value, HttpAnswer):
        return value.status, members(value.body, REPLY_MEMBERS[scheme])
    if isinstance(value, SealedAnswer) and scheme == HPKE_SCHEME:
        return msgspec.structs.replace(value, response_hash=b"", response_signature=b"")
    if place == "envelope":
        return members(value, ENVELOPE_MEMBERS[scheme])
    return value if place != "lock" else meaning_of_lock(value, scheme, reads_evidence)


def meaning_of_lock(body: bytes, scheme: Scheme, reads_evidence: bool) -> object:
    """Keys and evidence by their bytes, which are signed, however they are written."""
    read = members(body, LOCK_MEMBERS[scheme])
    if isinstance(read, dict) and isinstance(read.get("keys"), dict):
        names = ("document", "signature", "evidence") if reads_evidence else ("document", "signature")
        return read | {"keys": as_bytes({name: one for name, one in read["keys"].items() if name in names})}
    return read


def members(body: bytes, names: Iterable[str]) -> object:
    """Those members of a JSON object that are there; the text itself where it is none."""
    try:
        found = json.loads(body.decode("utf-8", "replace"))  # nobody looks into what is not read
    except ValueError:
        return body
    return {name: found[name] for name in names if name in found} if isinstance(found, dict) else body


def as_bytes(value: Any) -> Any:
    """Texts in base64 as their bytes, however they are written."""
    if isinstance(value, dict):
        return {name: as_bytes(one) for name, one in value.items()}
    if isinstance(value, list):
        return [as_bytes(one) for one in value]
    if isinstance(value, str):
        try:
            return b64decode(value)
        except ValueError:
            return value
    return value
