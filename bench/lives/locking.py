"""Locks and confidential requests in a world: scripted nodes that answer sealed, and envelopes that nobody opens."""

import asyncio
import random

import msgspec
import orjson

from bench.lives.nodes import FAILURES, SLOW_S_MAX
from embedmesh.dialects.confidential import TAG_BYTES
from embedmesh.rules.base64s import encode64
from embedmesh.rules.confidential import (
    SDK_SCHEME,
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
from embedmesh.rules.models import Model

LOCK, SEALED = "lock", "sealed"  # what an errand wants
LOCKS_OF_KEY, LOCKS_OF_ACCOUNT = 5, 8  # unused ones at one time: so few that they are met
BYTES_A_TOKEN = 4  # of these texts
NONE_ODDS = 0.03  # that no node can be locked
REFUSED_ODDS = 0.08  # of a request whose seal or content is wrong
DAY_MS = 86_400_000


class SealingNodes:
    """All nodes, for one gateway. Implements `flow.confidential.SealedNodes`."""

    def __init__(self, dice: random.Random, number: int, bad_odds: float, slow_odds: float) -> None:
        self._dice = dice
        self._number = number
        self._bad_odds = bad_odds
        self._slow_odds = slow_odds

    def choose_sealing(self, model: Model, scheme: Scheme, among: frozenset[str] | None = None) -> SealingNode | None:
        if self._dice.random() < NONE_ODDS:
            return None
        number = int(self._dice.random() * self._number)
        key = bytes([number]) * 32
        document = KeyDocument(1, f"n{number}", key, {model.id: model.digest}, {scheme: key}, 0, DAY_MS)
        return SealingNode(f"n{number}", number, SignedKeys(msgspec.json.encode(document), bytes(64)), document)

    def is_here(self, terms: LockTerms) -> bool:
        return True  # all gateways know all nodes

    async def answer(
        self, terms: LockTerms, call: SealedCall, tokens_max: int, reply_bytes_max: int, request_id: str
    ) -> CheckedAnswer:
        """Never the same again, so that replies can be told apart."""
        dice = self._dice
        await asyncio.sleep(dice.random() * (SLOW_S_MAX if dice.random() < self._slow_odds else 0.05))
        if dice.random() < self._bad_odds:
            raise dice.choice(FAILURES)("by dice")
        status, tokens = (400, 0) if dice.random() < REFUSED_ODDS else (200, tokens_of(call))
        digest = bytes(32)
        statement = AnswerStatement(1, terms.node_id, terms.lock_id, digest, digest, status, tokens, 0)  # type: ignore[arg-type]
        sealed = SealedAnswer(msgspec.json.encode(statement), bytes(64), dice.randbytes(24), dice.randbytes(12))
        return CheckedAnswer(sealed, statement)


def tokens_of(call: SealedCall) -> int:
    """What a node counts."""
    return (len(call.ciphertext) - TAG_BYTES) // BYTES_A_TOKEN


def envelope(terms: LockTerms, tokens: int, dice: random.Random) -> bytes:
    """As an SDK seals it; every time anew."""
    return orjson.dumps(
        {
            "ciphertext": encode64(dice.randbytes(tokens * BYTES_A_TOKEN + TAG_BYTES)),
            "client_dh_public_key": encode64(dice.randbytes(32)),
            "model_name": "tiny",
            "node_dh_public_key": encode64(terms.node_key),
            "nonce": encode64(dice.randbytes(12)),
            "plaintext_body_hash": encode64(dice.randbytes(32)),
            "salt": encode64(dice.randbytes(16)),
            "scheme": SDK_SCHEME,
            "stack_small_id": terms.lock_id,
        }
    )
