"""Confidential requests to nodes: which nodes take them, under which keys, and whether an answer is the node's own.

The gateway gives out only keys that it has verified: the document is signed by the identity that the node is known by.
"""

from typing import Protocol

import msgspec

from embedmesh.confidential.documents import read_keys
from embedmesh.confidential.failures import Untrusted
from embedmesh.confidential.statements import read_answer, request_digest
from embedmesh.fleet.candidates import candidates_of
from embedmesh.fleet.registry import Node, Registry
from embedmesh.rules.confidential import (
    AnswerStatement,
    CheckedAnswer,
    KeyDocument,
    LockTerms,
    Scheme,
    SealedAnswer,
    SealedCall,
    SealingNode,
    SignedKeys,
)
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.limits import LOCK_S_MAX, REQUEST_MIN_S
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.rules.ports import Clock, Dice

LASTS_MS = int((LOCK_S_MAX + REQUEST_MIN_S) * 1000)  # a key that is given out is good for the lock and its request
READ_MAX = 1_024  # documents of nodes, some 500 bytes each
SKEW_MS = 60_000  # between our clock and a node's
ENCODE = msgspec.msgpack.Encoder().encode
DECODE = msgspec.msgpack.Decoder(SealedAnswer).decode


class SealedClient(Protocol):
    """What is needed of the links to nodes."""

    async def post_sealed(self, node_id: str, body: bytes, limit: int, request_id: str) -> bytes:
        """The body of a node's reply of at most `limit` bytes. Raises a NodeFailure."""
        ...


class SealingNodes:
    """Implements `flow.confidential.SealedNodes`."""

    def __init__(self, registry: Registry, client: SealedClient, clock: Clock, dice: Dice) -> None:
        self._registry = registry
        self._client = client
        self._clock = clock
        self._dice = dice
        self._read: dict[str, tuple[SignedKeys, KeyDocument | None]] = {}  # by node: what was verified last

    def choose_sealing(self, model: Model, scheme: Scheme, among: frozenset[str] | None = None) -> SealingNode | None:
        now, now_ms = self._clock.monotonic(), self._clock.unix_ms()
        able = {}
        for node in self._registry.ready(model.id):
            document = self._document(node)
            if document is None or (among is not None and document.node_id not in among):
                continue
            if _is_good(document, model, scheme, now_ms):
                able[node.node_id] = node, document
        candidates = candidates_of([node for node, _ in able.values()], None, now, self._dice)
        if not candidates:
            return None
        best_s = min(candidate.finish_s(1, True) for candidate in candidates)
        first = [each.node for each in candidates if each.finish_s(1, True) <= best_s * 1.05]
        node = first[int(self._dice.random() * len(first))]
        signed, document = node.keys, able[node.node_id][1]
        assert signed is not None
        return SealingNode(node.node_id, node.small_id, signed, document)

    def is_here(self, terms: LockTerms) -> bool:
        node = self._registry.find(terms.node_id)
        document = None if node is None else self._document(node)
        return document is not None and document.public_key == terms.identity

    async def answer(
        self, terms: LockTerms, call: SealedCall, tokens_max: int, reply_bytes_max: int, request_id: str
    ) -> CheckedAnswer:
        body = await self._client.post_sealed(terms.node_id, ENCODE(call), reply_bytes_max, request_id)
        try:
            answer = DECODE(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's sealed answer is not of the protocol's form") from None
        try:
            statement = read_answer(answer, terms.identity, terms.lock_id, request_digest(call))
        except Untrusted as error:
            raise WrongAnswer(f"the node's statement does not fit ({error})", check=Check.SIGNATURE) from None
        if statement.tokens > tokens_max:
            raise WrongAnswer("the node counted more tokens than the sealed request can be", check=Check.TOKENS)
        self._note(terms.node_id, len(call.ciphertext), statement)
        return CheckedAnswer(answer, statement)

    def _note(self, node_id: str, sealed_bytes: int, statement: AnswerStatement) -> None:
        """For the operator's eye: a node that counts too much has more tokens for its bytes than the others."""
        node = self._registry.find(node_id)
        if node is not None and statement.status == 200:
            node.counts["sealed_answers"] += 1
            node.counts["sealed_tokens"] += statement.tokens
            node.counts["sealed_bytes"] += sealed_bytes

    def _document(self, node: Node) -> KeyDocument | None:
        """What the node's identity has signed of its keys; None if it has no keys, or they are not its own."""
        signed = node.keys
        if signed is None:
            return None
        known = self._read.get(node.node_id)
        if known is not None and known[0] == signed:
            return known[1]
        try:
            document = read_keys(signed)
        except Untrusted:
            document = None
        if document is not None and node.kind != "local" and document.node_id != node.node_id:
            document = None  # of another node; a local one is known by its socket
        if len(self._read) > READ_MAX:
            self._read.clear()  # nodes come and go
        self._read[node.node_id] = signed, document
        return document


def _is_good(document: KeyDocument, model: Model, scheme: Scheme, now_ms: int) -> bool:
    lasts = document.not_before_ms <= now_ms + SKEW_MS and now_ms + LASTS_MS <= document.not_after_ms
    return lasts and scheme in document.keys and document.models.get(model.id) == model.digest
