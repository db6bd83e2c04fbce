"""Opens confidential requests, and seals the answers: a node's identity and its keys, put together.

Only a node that starts to take such requests imports this: it brings a TLS library along.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.attestation import KeyAttester
from embedmesh.confidential.failures import SealBroken
from embedmesh.confidential.generation_statements import AnsweredRequest
from embedmesh.confidential.hpke_scheme import HpkeOpened, Terms
from embedmesh.confidential.node_keys import DhKey
from embedmesh.confidential.sdk_scheme import SealedParts
from embedmesh.confidential.statements import request_digest, sign_answer
from embedmesh.node.key_sets import HeldKey, KeySets
from embedmesh.node.seen_generation import NOTHING, SealEvent, SeenGeneration, replay_digest
from embedmesh.rules.confidential import SDK_SCHEME, SealedAnswer, SealedCall, SignedKeys
from embedmesh.rules.generation import Generating
from embedmesh.rules.membership import NONCE_S
from embedmesh.rules.ports import Clock
from embedmesh.rules.sealed_generation import SealedGeneration, operation_of
from embedmesh.settings import NodeSettings
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.public_lines import attestation_line, node_line, write_beside

log = logging.getLogger("embedmesh.node")

IDENTITY_FILE = "node.identity"
ATTESTATION_KEY = "attestation key"
Seal = Callable[[bytes], SealedParts]
ENCODE = msgspec.msgpack.Encoder().encode


class SeenCall:
    """A sealed call that this node has looked at, and how it is answered.

    `replay` tells whether the same was sealed before. `body` is what the caller asks, None if it could not be opened,
    whatever was wrong.
    """

    def __init__(self, identity: Identity, call: SealedCall, opened: tuple[bytes, Seal] | None) -> None:
        self._identity = identity
        self._lock = call.lock
        self._digest = request_digest(call)
        self.replay = replay_digest(call)
        self.body: bytes | None = None if opened is None else opened[0]
        self._seal: Seal | None = None if opened is None else opened[1]

    def seal(self, body: bytes, *, status: int, tokens: int, time_ms: int) -> bytes:
        """The message that answers an opened call: the body for its caller alone, and the node's word on it."""
        assert self._seal is not None
        return self._answer(self._seal(body), status, tokens, time_ms)

    def refuse(self, time_ms: int) -> bytes:
        """The message that says no more than that: always the same, but for what it signs."""
        return self._answer(NOTHING, 400, 0, time_ms)

    def _answer(self, parts: SealedParts, status: int, tokens: int, time_ms: int) -> bytes:
        statement, signature = sign_answer(
            self._identity, self._lock, self._digest, parts.sealed, status, tokens, time_ms, nonce=parts.nonce
        )
        return ENCODE(SealedAnswer(statement, signature, *parts))


class Opener:
    """Opens what was sealed for this node, and signs what the node says of it."""

    def __init__(self, identity: Identity, keys: KeySets, clock: Clock) -> None:
        self._identity = identity
        self._keys = keys
        self._clock = clock
        self._node_id = node_id(identity.public_key)

    def signed_keys(self, models: Mapping[str, str]) -> SignedKeys:
        """The document of the newest keys, for these models (ids and digests)."""
        return self._keys.signed(models)

    def forget_old(self) -> None:
        """Forget keys that are over, also while nobody calls."""
        self._keys.look()

    def find(self, call: SealedCall) -> HeldKey | None:
        """The key that a call was sealed for; None if this node has no such key, or the call comes too late."""
        held = self._keys.find(call.scheme, call.node_key)
        late = call.scheme != SDK_SCHEME and self._clock.unix_ms() > call.expires_ms + NONCE_S * 1000
        return None if late else held

    def look(self, call: SealedCall, key: DhKey | None) -> SeenCall:
        """Open a call, if there is a key for it. Takes long for a large one; needs nothing that changes."""
        opened = None
        if key is not None:
            with contextlib.suppress(SealBroken):
                opened = self._open(call, key)
        return SeenCall(self._identity, call, opened)

    def look_at_generation(self, asked: SealedGeneration, modality: Generating, key: DhKey | None) -> SeenGeneration:
        """The same for chat, completions and images."""
        call, opened = asked.call, None
        if key is not None:
            with contextlib.suppress(SealBroken):
                opened = self._open_generation(call, key, operation_of(modality, asked.stream), asked.stream)
        answered = AnsweredRequest(self._identity.public_key, call.lock, request_digest(call), modality, asked.stream)
        return SeenGeneration(self._identity, answered, replay_digest(call), opened)

    def _open_generation(self, call: SealedCall, key: DhKey, operation: str, stream: bool) -> tuple[bytes, SealEvent]:
        """What the caller asks, and what seals each event of the answer. Raises SealBroken."""
        if call.scheme == SDK_SCHEME:
            by_sdk = sdk_scheme.open_sealed(key, call)
            return by_sdk.plaintext, lambda body, final: by_sdk.seal_reply(body, self._identity)
        by_hpke = self._open_hpke(call, key, operation)
        if not stream:
            return by_hpke.body, lambda body, final: NOTHING._replace(sealed=by_hpke.seal_reply(body))
        events = by_hpke.events()
        return by_hpke.body, lambda body, final: NOTHING._replace(sealed=events.seal(body, final=final))

    def _open(self, call: SealedCall, key: DhKey) -> tuple[bytes, Seal]:
        """What the caller asks, and what seals a reply. Raises SealBroken."""
        if call.scheme == SDK_SCHEME:
            by_sdk = sdk_scheme.open_sealed(key, call)
            return by_sdk.plaintext, lambda body: by_sdk.seal_reply(body, self._identity)
        by_hpke = self._open_hpke(call, key, "")
        return by_hpke.body, lambda body: NOTHING._replace(sealed=by_hpke.seal_reply(body))

    def _open_hpke(self, call: SealedCall, key: DhKey, operation: str) -> HpkeOpened:
        if call.client_key or call.salt or call.nonce or call.body_hash:  # of the other scheme: no seal covers them
            raise SealBroken
        return hpke_scheme.open_sealed(key, call.ciphertext, Terms.of(call, self._node_id, operation))


def make_opener(settings: NodeSettings, clock: Clock) -> Opener:
    """The opener of a node with these settings, with new keys. Reads or makes the identity. Raises SetupError."""
    identity = load_identity(settings.data_dir)
    attester = None
    if settings.attestation_key is not None:
        remedy = "make one with `head -c 32 /dev/urandom`"
        authority = Identity.read(settings.attestation_key, ATTESTATION_KEY, remedy)
        publish(settings.attestation_key, attestation_line(authority.public_key))
        attester = KeyAttester(authority)
    return Opener(identity, KeySets(identity, clock, attester), clock)


def load_identity(folder: Path) -> Identity:
    """The node's identity in its data directory, made at the first start, with the public file beside it.

    Where no such folder can be, it lasts as long as the node. Raises SetupError for a file that is no identity.
    """
    path = folder / IDENTITY_FILE
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
        log.warning("no identity can be kept in %s: this node has a new one at each start", folder)
        return Identity.new()
    identity = Identity.load(path)
    publish(path, node_line(identity.public_key))
    return identity


def publish(private: Path, line: str) -> None:
    """Write the line of a public key beside its private one, or else say it."""
    try:
        write_beside(private, line)
    except OSError as error:
        log.warning("%s.pub cannot be written (%s); it would say: %s", private, error.strerror, line)
