"""A node and a caller of confidential requests for the small world: real seals, a scripted count, locks in a dict."""

import asyncio
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec

from embedmesh.confidential import hpke_scheme
from embedmesh.confidential.documents import sign_keys
from embedmesh.confidential.node_keys import DhKey
from embedmesh.confidential.sdk_scheme import SdkReplies, open_sealed, seal
from embedmesh.confidential.statements import read_answer, request_digest, sign_answer
from embedmesh.rules.base64s import encode64
from embedmesh.rules.confidential import (
    HPKE_SCHEME,
    SDK_SCHEME,
    UNUSED,
    CheckedAnswer,
    FoundLock,
    KeyDocument,
    LockState,
    LockTerms,
    Scheme,
    SealedAnswer,
    SealedCall,
    SealingNode,
    claim_key,
)
from embedmesh.rules.holds import Claim, Hold, HoldEnd, PriorRequest
from embedmesh.rules.lock_failures import LockExpired, LockNotFound, LockUsed
from embedmesh.rules.models import Model
from embedmesh.signing.identity import Identity
from tests.flow.world import MODEL, ScriptedWorld

DAY_MS = 86_400_000


@dataclass
class SealedNode:
    """The node `n0`. It answers each request with its plaintext in capitals, and counts what the test says."""

    world: ScriptedWorld
    tokens: int = 5
    refuse: bool = False
    here: bool = True
    script: list[BaseException] = field(default_factory=list)
    asked: list[SealedCall] = field(default_factory=list)
    tokens_max: list[int] = field(default_factory=list)
    bytes_max: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.identity, self.key = Identity(bytes(range(32))), DhKey.new()
        self.signed = sign_keys(self.identity, {MODEL.id: MODEL.digest}, {SDK_SCHEME: self.key.public}, 1, 10 * DAY_MS)
        self.document = msgspec.json.decode(self.signed.document, type=KeyDocument)

    def choose_sealing(self, model: Model, scheme: Scheme, among: frozenset[str] | None = None) -> SealingNode | None:
        return SealingNode("n0", 7, self.signed, self.document) if scheme in self.document.keys else None

    def is_here(self, terms: LockTerms) -> bool:
        return self.here

    async def answer(
        self, terms: LockTerms, call: SealedCall, tokens_max: int, reply_bytes_max: int, request_id: str
    ) -> CheckedAnswer:
        self.asked.append(call)
        self.tokens_max.append(tokens_max)
        self.bytes_max.append(reply_bytes_max)
        if self.script:
            raise self.script.pop(0)
        digest = request_digest(call)
        if self.refuse:
            statement, signature = sign_answer(self.identity, call.lock, digest, b"", 400, 0, 1)
            answer = SealedAnswer(statement, signature)
        else:
            opened = open_sealed(self.key, call)
            parts = opened.seal_reply(opened.plaintext.upper(), self.identity)
            statement, signature = sign_answer(
                self.identity, call.lock, digest, parts.sealed, 200, self.tokens, 1, nonce=parts.nonce
            )
            answer = SealedAnswer(statement, signature, *parts)
        return CheckedAnswer(answer, read_answer(answer, terms.identity, terms.lock_id, digest))


class HpkeNode(SealedNode):
    """The same node, for our scheme."""

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = {HPKE_SCHEME: self.key.public, SDK_SCHEME: self.key.public}
        self.signed = sign_keys(self.identity, {MODEL.id: MODEL.digest}, keys, 1, 10 * DAY_MS)  # type: ignore[arg-type]
        self.document = msgspec.json.decode(self.signed.document, type=KeyDocument)
        self.among: list[frozenset[str] | None] = []

    def choose_sealing(self, model: Any, scheme: Any, among: frozenset[str] | None = None) -> Any:
        self.among.append(among)
        wanted = among is None or self.document.node_id in among
        return super().choose_sealing(model, scheme) if wanted else None

    async def answer(
        self, terms: LockTerms, call: SealedCall, tokens_max: int, reply_bytes_max: int, request_id: str
    ) -> CheckedAnswer:
        await asyncio.sleep(0)  # as a node that is somewhere else
        self.asked.append(call)
        if self.script:
            raise self.script.pop(0)
        digest = request_digest(call)
        if self.refuse:
            sealed, status, tokens = b"", 400, 0
        else:
            opened = hpke_scheme.open_sealed(
                self.key, call.ciphertext, hpke_scheme.Terms.of(call, self.document.node_id)
            )
            sealed, status, tokens = opened.seal_reply(opened.body.upper()), 200, self.tokens
        signed = sign_answer(self.identity, call.lock, digest, sealed, status, tokens, 1)
        answer = SealedAnswer(*signed, sealed)
        return CheckedAnswer(answer, read_answer(answer, terms.identity, terms.lock_id, digest))


@dataclass
class DictLocks:
    """Locks over the scripted ledger, as the port says."""

    world: ScriptedWorld
    locks: dict[int, LockTerms] = field(default_factory=dict)
    dropped: list[LockTerms] = field(default_factory=list)

    async def open(self, terms: LockTerms, hold: Hold) -> None:
        claim = self.world.claim_of(claim_key(terms.lock_id), b"")
        await self.world.ledger.hold(hold, Claim(claim.key_hash, UNUSED))
        self.locks[terms.lock_id] = terms

    def drop(self, terms: LockTerms) -> None:
        del self.locks[terms.lock_id]
        self.dropped.append(terms)
        self.world.ledger.release(Hold(terms.hold_id, terms.account_id, 0, 0, terms.key_id), HoldEnd.RELEASE)

    async def find(self, account_id: str, lock_id: int) -> FoundLock:
        terms = self.locks.get(lock_id)
        if terms is None or terms.account_id != account_id:
            raise LockNotFound("no such lock")
        prior = self._claim(terms)[1]
        used_ms = None if prior.body_hash == UNUSED else 1
        kept_bytes = await self.world.ledger.kept_bytes(account_id)
        return FoundLock(terms, LockState(used_ms, prior.state, prior.body_hash, prior.reply), kept_bytes)

    async def redeem(self, found: FoundLock, body_hash: bytes, deadline_ms: int) -> Hold | PriorRequest:
        terms, claims = found.terms, self.world.ledger.claims
        key, prior = self._claim(terms)
        if prior.body_hash == body_hash:
            return prior
        if prior.body_hash != UNUSED:
            raise LockUsed("used")
        if prior.state != "open" or terms.expires_ms <= self.world.clock.unix_ms():
            raise LockExpired("expired")
        claims[key] = PriorRequest(body_hash, prior.hold_id, "open", None)
        amount = -(-terms.units * terms.price // 1_000_000)
        return Hold(terms.hold_id, terms.account_id, amount, deadline_ms, terms.key_id)

    def _claim(self, terms: LockTerms) -> tuple[bytes, PriorRequest]:
        key = self.world.claim_of(claim_key(terms.lock_id), b"").key_hash
        return key, self.world.ledger.claims[key]


def envelope(text: bytes, node_key: bytes, lock_id: int, **more: object) -> tuple[bytes, SdkReplies]:
    """The body that an SDK sends, and what opens the reply."""
    sealed, replies = seal(text, node_key)
    body = {
        "ciphertext": encode64(sealed.ciphertext),
        "client_dh_public_key": encode64(sealed.client_key),
        "model_name": "tiny",
        "node_dh_public_key": encode64(node_key),
        "nonce": encode64(sealed.nonce),
        "num_compute_units": None,
        "plaintext_body_hash": encode64(sealed.body_hash),
        "salt": encode64(sealed.salt),
        "stack_small_id": lock_id,
        "stream": False,
    }
    return json.dumps(body | more).encode(), replies


def hpke_envelope(text: bytes, terms: LockTerms, node_id: str) -> bytes:
    """The body that our own client sends."""
    request_id = secrets.token_hex(8)
    bound = hpke_scheme.Terms(node_id, "tiny", request_id, terms.lock_id, terms.expires_ms)
    ciphertext, _ = hpke_scheme.seal(text, terms.node_key, bound)
    members = {
        "scheme": HPKE_SCHEME,
        "model_name": "tiny",
        "stack_small_id": terms.lock_id,
        "node_dh_public_key": encode64(terms.node_key),
        "ciphertext": encode64(ciphertext),
        "request_id": request_id,
        "expires_ms": terms.expires_ms,
    }
    return json.dumps(members).encode()
