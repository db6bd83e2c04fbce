"""Evidence: what somebody else says of a node's keys. A port for every kind of it, and one real kind.

The real kind is a statement by the node's operator, signed by a key that the client got from the operator. It proves
who vouches for the keys, not what hardware or program holds them.
"""

import hashlib
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from embedmesh.confidential.failures import Untrusted
from embedmesh.confidential.statements import read_strictly
from embedmesh.rules.confidential import Evidence, KeyDocument, SignedKeys
from embedmesh.rules.membership import Digest, Whole
from embedmesh.signing.identity import Identity, verify

STATEMENT_KIND = "operator-statement"
ATTESTATION = b"confidential attestation"  # what an operator's key signs an AttestationStatement for


class Attester(Protocol):
    """Makes evidence, at the node."""

    def attest(self, document: bytes) -> Evidence:
        """Evidence for the JSON of a KeyDocument."""
        ...


class Verifier(Protocol):
    """Judges evidence, at the client."""

    def verify(self, signed: SignedKeys, document: KeyDocument) -> None:
        """Raises Untrusted unless the evidence is good for these keys and lasts as long as they do.

        `document` is what `documents.read_keys` has read of `signed`.
        """
        ...


class AttestationStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's word on a key document, known by its SHA-256."""

    version: Literal[1]
    document_digest: Digest
    node_id: Annotated[str, Meta(max_length=64)]
    not_after_ms: Whole


class KeyAttester:
    """Signs for an operator whose attestation key the node has."""

    def __init__(self, identity: Identity) -> None:
        """`identity` is the operator's."""
        self._identity = identity

    def attest(self, document: bytes) -> Evidence:
        """A statement about the document, good for as long as the document is."""
        said = read_strictly(document, KeyDocument)
        statement = msgspec.json.encode(
            AttestationStatement(1, hashlib.sha256(document).digest(), said.node_id, said.not_after_ms)
        )
        return Evidence(STATEMENT_KIND, statement, self._identity.sign(ATTESTATION, statement))


class SignedStatement:
    """Believes the statements of one operator."""

    def __init__(self, authority_public_key: bytes) -> None:
        """The operator's public key (32 bytes), which did not come by way of the gateway."""
        self._authority = authority_public_key

    def verify(self, signed: SignedKeys, document: KeyDocument) -> None:
        """There must be a statement, and each one there is must be good. Raises Untrusted."""
        mine = [one for one in signed.evidence if one.kind == STATEMENT_KIND]
        if not mine:
            raise Untrusted("evidence")
        for evidence in mine:
            self._check(evidence, signed, document)

    def _check(self, evidence: Evidence, signed: SignedKeys, document: KeyDocument) -> None:
        if not verify(self._authority, ATTESTATION, evidence.statement, evidence.signature):
            raise Untrusted("evidence")
        statement = read_strictly(evidence.statement, AttestationStatement)
        if (
            statement.document_digest != hashlib.sha256(signed.document).digest()
            or statement.node_id != document.node_id
            or statement.not_after_ms < document.not_after_ms
        ):
            raise Untrusted("evidence")
