"""What `atoma-sdk` registers is accepted if the key that it names has signed it, in whichever form it was written."""

import base64
import hashlib
import json
from typing import Any

import pytest

from embedmesh.signing.atoma import check, sign
from embedmesh.signing.identity import Identity

NODE = Identity(bytes(range(32)))
DATA: dict[str, Any] = {
    "node_small_id": 7,
    "public_address": 'https://m\u00fcnchen.example/"\n\x7f',
    "country": "\U0001f1e9\U0001f1ea",
}
GOOD = sign(NODE, DATA)


def signed(text: str, identity: Identity = NODE, scheme: bytes = b"\0") -> str:
    """The signature of a wallet over any text."""
    digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
    return base64.b64encode(scheme + identity.sign_raw(digest) + identity.public_key).decode()


def compact(data: dict[str, Any], *, ascii_only: bool) -> str:
    """JSON without spaces."""
    return json.dumps(data, ensure_ascii=ascii_only, separators=(",", ":"))


@pytest.mark.parametrize(
    ("data", "signature"),
    [
        (DATA | {"node_small_id": 8}, GOOD),
        (DATA | {"country": "FR"}, GOOD),
        (DATA | {"more": 1}, GOOD),
        ({"node_small_id": 7, "country": "DE"}, GOOD),
        ({}, GOOD),
        (DATA | {"node_small_id": True}, signed(compact(DATA | {"node_small_id": True}, ascii_only=False))),
        (DATA | {"node_small_id": 7.0}, signed(compact(DATA | {"node_small_id": 7.0}, ascii_only=False))),
        (DATA | {"node_small_id": "7"}, signed(compact(DATA | {"node_small_id": "7"}, ascii_only=False))),
        (DATA | {"node_small_id": -1}, sign(NODE, DATA | {"node_small_id": -1})),
        (DATA | {"node_small_id": 2**64}, sign(NODE, DATA | {"node_small_id": 2**64})),
        (DATA | {"country": None}, signed(compact(DATA | {"country": None}, ascii_only=False))),
        (DATA | {"country": "\ud800"}, GOOD),
        (DATA, signed(json.dumps(DATA))),  # with spaces
        (DATA, signed(compact(DATA, ascii_only=False), scheme=b"\1")),  # another scheme
        (DATA, GOOD[:-4]),
        (DATA, GOOD + "AAAA"),
        (DATA, GOOD[:-1]),
        (DATA, GOOD[:-2] + "AA"),
        (DATA, GOOD[:60] + "\n" + GOOD[61:]),
        (DATA, GOOD[:60] + "-" + GOOD[61:]),
        (DATA, "\u00e9" * 132),
        (DATA, ""),
        (DATA, base64.b64encode(base64.b64decode(GOOD)[:65] + Identity(bytes(32)).public_key).decode()),
    ],
)
def test_what_the_key_has_not_signed_is_refused(data: dict[str, Any], signature: str) -> None:
    """Other fields, other values, other types, other schemes, and junk."""
    with pytest.raises(ValueError):
        check(data, signature)


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    ("order", "sent"),
    [
        (["node_small_id", "public_address", "country"], ["country", "node_small_id", "public_address"]),
        (["node_small_id", "public_address", "country"], ["node_small_id", "public_address", "country"]),
        (["country", "node_small_id", "public_address"], ["country", "node_small_id", "public_address"]),
        (["country", "public_address", "node_small_id"], ["country", "public_address", "node_small_id"]),
    ],
)
def test_any_form_that_was_signed_is_accepted(order: list[str], sent: list[str], ascii_only: bool) -> None:
    """In the order that Atoma declares or in the one that came, escaped or not; the key is what comes back."""
    text = compact({name: DATA[name] for name in order}, ascii_only=ascii_only)
    assert check({name: DATA[name] for name in sent}, signed(text)) == NODE.public_key
