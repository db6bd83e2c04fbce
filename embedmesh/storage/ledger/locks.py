"""Locks in the store: opened at one gateway, redeemed at any, released by the sweep where nobody uses them.

A lock stands on a hold like any other, whose deadline is the lock's expiry. The hold's claim says which request has
used it, and keeps that one's reply. A gateway that dies leaves its unused locks as they are: they end in time.
"""

from collections.abc import Awaitable, Callable

from embedmesh.rules.confidential import LOCK_ID_MAX, UNUSED, FoundLock, LockTerms, claim_key
from embedmesh.rules.holds import Claim, Hold, PriorRequest
from embedmesh.rules.ids import new_id
from embedmesh.rules.ports import Clock
from embedmesh.storage.ledger.group_commit import Writer
from embedmesh.storage.ledger.open_lock import DropLock, OpenLock, one_too_many, unused_of, values_of_unused
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.redeem_lock import RedeemLock, Redemption, found_in, not_found, prior_use, which_lock
from embedmesh.storage.reads import Reads
from embedmesh.storage.secrets.secret import claim_of
from embedmesh.storage.sql import LOCKS_SQL


class StoredLocks:
    """Implements the port `Locks` for one gateway, whose name is `owner`."""

    def __init__(
        self,
        writer: Writer,
        reads: Reads,
        clock: Clock,
        owner: str,
        key_secret: bytes,
        *,
        place: Callable[[Callable[[], PlaceHold]], Awaitable[PriorRequest | None]],
        redeem: Callable[[RedeemLock], Awaitable[Hold | PriorRequest]],
        unsealed: Callable[[PriorRequest], PriorRequest],
    ) -> None:
        """`place` makes a hold and writes it, again once tabs were recalled for it; `redeem` writes and waits."""
        self._writer = writer
        self._reads = reads
        self._clock = clock
        self._owner = owner
        self._key_secret = key_secret
        self._place = place
        self._redeem = redeem
        self._unsealed = unsealed

    async def open(self, terms: LockTerms, hold: Hold) -> None:
        """Whether there may be one more is looked up first, so that a refusal costs no write; the write decides."""
        agreed = terms.hold_id, terms.account_id, terms.key_id, terms.expires_ms
        assert agreed == (hold.hold_id, hold.account_id, hold.key_id, hold.deadline_ms), "a lock and its hold agree"
        now_ms = self._clock.unix_ms()
        rows = await self._reads.ask(LOCKS_SQL["unused_locks"], values_of_unused(now_ms, terms.account_id))
        if (refusal := one_too_many(unused_of(rows), terms.key_id, now_ms)) is not None:
            raise refusal
        claim = Claim(claim_of(self._key_secret, claim_key(terms.lock_id), b"").key_hash, UNUSED)
        await self._place(lambda: OpenLock(terms, hold, self._owner, claim, self._writer.submit))

    def drop(self, terms: LockTerms) -> None:
        self._writer.submit(DropLock(Hold(terms.hold_id, terms.account_id, 0, terms.expires_ms, terms.key_id)))

    async def find(self, account_id: str, lock_id: int) -> FoundLock:
        found = None
        if 0 <= lock_id <= LOCK_ID_MAX:
            found = found_in(await self._reads.ask(LOCKS_SQL["find_lock"], which_lock(account_id, lock_id)))
        if found is None:
            raise not_found()
        return found

    async def redeem(self, found: FoundLock, body_hash: bytes, deadline_ms: int) -> Hold | PriorRequest:
        """What may not be used is told without a write, so that to ask again what became of it is cheap."""
        assert len(body_hash) == len(UNUSED) and body_hash != UNUSED
        if not found.is_free(self._clock.unix_ms()):
            return self._unsealed(prior_use(found, body_hash))
        asked = Redemption(found.terms, new_id("use", self._clock), body_hash, deadline_ms)
        got = await self._redeem(RedeemLock(asked, self._owner, self._writer.submit))
        return got if isinstance(got, Hold) else self._unsealed(got)
