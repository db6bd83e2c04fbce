"""A client and a node for tests of confidential requests: known identities, and calls in both schemes."""

import msgspec

from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.hpke_scheme import Terms
from embedmesh.confidential.node_keys import DhKey
from embedmesh.rules.confidential import SealedCall
from embedmesh.signing.identity import Identity, node_id

NODE = Identity(bytes(range(32)))
OTHER_NODE = Identity(bytes(range(1, 33)))
OPERATOR = Identity(bytes(range(2, 34)))
NODE_ID = node_id(NODE.public_key)
KEY = DhKey(bytes(range(3, 35)), b"test")
OTHER_KEY = DhKey(bytes(range(4, 36)), b"else")
LOCK = 41
TERMS = Terms(NODE_ID, "m", "req_1", LOCK, 1_800_000_000_000)
BODY = b'{"input":"words","model":"m"}'


def hpke_call(body: bytes = BODY, terms: Terms = TERMS) -> tuple[SealedCall, hpke_scheme.HpkeReplies]:
    """A request for NODE, and what opens its reply."""
    ciphertext, replies = hpke_scheme.seal(body, KEY.public, terms)
    call = SealedCall(
        scheme="hpke-1",
        model="m",
        model_name=terms.model_name,
        lock=terms.lock,
        units=8_192,
        node_key=KEY.public,
        ciphertext=ciphertext,
        request_id=terms.request_id,
        expires_ms=terms.expires_ms,
    )
    return call, replies


def sdk_call(body: bytes = BODY) -> tuple[SealedCall, sdk_scheme.SdkReplies]:
    """A request for NODE, and what opens its replies."""
    sealed, replies = sdk_scheme.seal(body, KEY.public)
    call = SealedCall(
        scheme="atoma-sdk-1",
        model="m",
        model_name="m",
        lock=LOCK,
        units=8_192,
        node_key=sealed.node_key,
        ciphertext=sealed.ciphertext,
        client_key=sealed.client_key,
        salt=sealed.salt,
        nonce=sealed.nonce,
        body_hash=sealed.body_hash,
    )
    return call, replies


def changed(call: SealedCall, **members: object) -> SealedCall:
    """The call with other members."""
    return msgspec.structs.replace(call, **members)
