"""The registration of Atoma nodes: three fields, signed as a Sui wallet signs.

`signature` is base64 of a zero byte (the scheme, Ed25519), the signature (64 bytes) and the public key (32 bytes). It
is over the BLAKE2b-256 of the compact JSON of `data`. That JSON is not what travels: an Atoma node signs the fields in
the order that its proxy declares, `atoma-sdk` sends them in alphabetical order and escapes what is not ASCII. So
there are up to four texts that may have been signed.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import cast

from embedmesh.signing.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, verify_raw

ATOMA_FIELDS = {"node_small_id": int, "public_address": str, "country": str}  # in the order that Atoma's proxy declares
ED25519_SCHEME = b"\0"
SIGNATURE_CHARS = 132  # of the 97 bytes
SMALL_ID_MAX = 2**64 - 1


def signer(signature: str) -> bytes:
    """The public key (32 bytes) that a signature names. Raises ValueError for another form.

    It is the signer's claim: the caller has to look it up before it checks the signature.
    """
    return _parts(signature)[1]


def check(data: Mapping[str, object], signature: str) -> bytes:
    """The public key that signed these fields. `data` in the order in which it came. Raises ValueError."""
    if data.keys() != ATOMA_FIELDS.keys() or any(type(data[name]) is not kind for name, kind in ATOMA_FIELDS.items()):
        raise ValueError("data is not node_small_id, public_address and country")
    if not 0 <= cast(int, data["node_small_id"]) <= SMALL_ID_MAX:
        raise ValueError("node_small_id is negative or has more than 64 bits")
    signed, public_key = _parts(signature)
    texts = {_text(order, escaped) for order in (data, _declared(data)) for escaped in (False, True)}
    if not any(verify_raw(public_key, _digest(text), signed) for text in texts):
        raise ValueError("the signature is not of this data")
    return public_key


def sign(identity: Identity, data: Mapping[str, object]) -> str:
    """The signature of an Atoma node over these fields."""
    signed = identity.sign_raw(_digest(_text(_declared(data), escaped=False)))
    return base64.b64encode(ED25519_SCHEME + signed + identity.public_key).decode("ascii")


def _parts(signature: str) -> tuple[bytes, bytes]:
    """Signature (64 bytes) and public key."""
    if len(signature) != SIGNATURE_CHARS:
        raise ValueError("the signature is not 97 bytes of base64")
    raw = base64.b64decode(signature, validate=True)
    if len(raw) != len(ED25519_SCHEME) + SIGNATURE_BYTES + PUBLIC_KEY_BYTES or not raw.startswith(ED25519_SCHEME):
        raise ValueError("the signature is not an Ed25519 one")
    return raw[1 : 1 + SIGNATURE_BYTES], raw[1 + SIGNATURE_BYTES :]


def _declared(data: Mapping[str, object]) -> Mapping[str, object]:
    return {name: data[name] for name in ATOMA_FIELDS}


def _text(data: Mapping[str, object], escaped: bool) -> bytes:
    text = json.dumps(dict(data), ensure_ascii=escaped, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=32).digest()
