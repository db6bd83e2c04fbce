"""Key documents: under which keys a node takes confidential requests, signed by its identity."""

from collections.abc import Mapping

import msgspec

from embedmesh.confidential.attestation import Attester
from embedmesh.confidential.failures import Untrusted
from embedmesh.confidential.node_keys import read_public
from embedmesh.confidential.statements import read_strictly
from embedmesh.rules.confidential import KEY_DOCUMENT, KeyDocument, Scheme, SignedKeys
from embedmesh.signing.identity import Identity, node_id, verify

KNOWN_DOCUMENTS_MAX = 64  # documents of nodes, some 500 bytes each


def sign_keys(
    identity: Identity,
    models: Mapping[str, str],
    keys: Mapping[Scheme, bytes],
    not_before_ms: int,
    not_after_ms: int,
    attester: Attester | None = None,
) -> SignedKeys:
    """The document of a node with these models (ids and digests) and public keys, and the evidence for it."""
    document = msgspec.json.encode(
        KeyDocument(
            version=1,
            node_id=node_id(identity.public_key),
            public_key=identity.public_key,
            models=dict(models),
            keys=dict(keys),
            not_before_ms=not_before_ms,
            not_after_ms=not_after_ms,
        )
    )
    evidence = () if attester is None else (attester.attest(document),)
    return SignedKeys(document, identity.sign(KEY_DOCUMENT, document), evidence)


class KnownKeys:
    """Documents that were read before: the same bytes under the same signature are not verified again."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes], KeyDocument] = {}

    def read(self, signed: SignedKeys) -> KeyDocument:
        """As `read_keys`."""
        which = signed.document, signed.signature
        document = self._known.get(which)
        if document is None:
            document = read_keys(signed)
            if len(self._known) >= KNOWN_DOCUMENTS_MAX:
                self._known.clear()
            self._known[which] = document
        return document


def read_keys(signed: SignedKeys) -> KeyDocument:
    """The document, if the identity that it names has signed it and its keys are keys. Raises Untrusted.

    The caller has to know that identity, and to look at the times and the evidence.
    """
    document = read_strictly(signed.document, KeyDocument)
    if not verify(document.public_key, KEY_DOCUMENT, signed.document, signed.signature):
        raise Untrusted("signature")
    if document.node_id != node_id(document.public_key):
        raise Untrusted("node")
    if document.not_before_ms >= document.not_after_ms:
        raise Untrusted("validity")
    for key in document.keys.values():
        try:
            read_public(key)
        except ValueError:
            raise Untrusted("key") from None
    return document
