"""A node's keys for confidential requests: made in memory, new every day, published in a document that the node signs.

The keys of one day are a set: one for each scheme, and the requests that were embedded under them, so that none is
embedded twice. When a set is followed by the next, it is kept for an overlap, and then forgotten with all it remembers;
so is everything when the node ends.
"""

from collections.abc import Mapping
from typing import NamedTuple, get_args

from embedmesh.confidential.attestation import Attester
from embedmesh.confidential.documents import sign_keys
from embedmesh.confidential.node_keys import DhKey
from embedmesh.rules.confidential import Scheme, SignedKeys
from embedmesh.rules.limits import CONFIDENTIAL_KEY_S, CONFIDENTIAL_OVERLAP_S
from embedmesh.rules.membership import NONCE_S
from embedmesh.rules.ports import Clock
from embedmesh.signing.identity import Identity

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
REPLAYS_OF_SET_MAX = 131_072  # 120 bytes each; half of them make a new set, so that the other half is for late ones
SETS_KEPT_MAX = 8  # 120 MB of replays at the very most: by then the node embeds 400 requests a second
PRESSED_OVERLAP_S = 180.0  # of a set, where there are more: twice what a lock and the way of its request last


class KeySet:
    """The keys of one span of time, and what was embedded under them. It is good for all of its document's time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()
        self._followed: float | None = None  # since when there is a newer set
        self.keys: dict[Scheme, DhKey] = {scheme: DhKey.new() for scheme in SCHEMES}
        now_ms = clock.unix_ms()
        self.not_before_ms = now_ms - NONCE_S * 1000  # clocks differ
        self.not_after_ms = now_ms + (CONFIDENTIAL_KEY_S + CONFIDENTIAL_OVERLAP_S) * 1000
        self._replays: set[bytes] = set()

    def is_old(self) -> bool:
        """Whether the next set is due."""
        return self._clock.monotonic() - self._began >= CONFIDENTIAL_KEY_S or not self._is_valid()

    def is_over(self, overlap_s: float = CONFIDENTIAL_OVERLAP_S) -> bool:
        """Whether nothing that was sealed under it can still be on its way."""
        followed_s = 0.0 if self._followed is None else self._clock.monotonic() - self._followed
        return followed_s >= overlap_s or not self._is_valid()

    def follow(self) -> None:
        """A newer set is there."""
        self._followed = self._clock.monotonic()

    def has_seen(self, digest: bytes) -> bool:
        """Whether that sealed request must not be embedded again, or there is no room to remember it."""
        return digest in self._replays or len(self._replays) >= REPLAYS_OF_SET_MAX

    def remember(self, digest: bytes) -> None:
        """It is about to be embedded."""
        self._replays.add(digest)

    def forget(self, digest: bytes) -> None:
        """It was not embedded."""
        self._replays.discard(digest)

    def is_half_full(self) -> bool:
        return len(self._replays) >= REPLAYS_OF_SET_MAX // 2

    def _is_valid(self) -> bool:
        """By the clock of its document: that one may jump, or go on while the machine sleeps."""
        return self.not_before_ms <= self._clock.unix_ms() < self.not_after_ms


class HeldKey(NamedTuple):
    """A key of ours, and the set that it belongs to."""

    key: DhKey
    of: KeySet


class KeySets:
    """All sets of a node, used on one event loop. Time is only looked at when they are used, and by `look`."""

    def __init__(self, identity: Identity, clock: Clock, attester: Attester | None = None) -> None:
        self._identity = identity
        self._clock = clock
        self._attester = attester
        self._sets = [KeySet(clock)]  # the newest comes last
        self._signed: tuple[KeySet, dict[str, str], SignedKeys] | None = None

    def signed(self, models: Mapping[str, str]) -> SignedKeys:
        """The document of the newest keys for these models (ids and digests), signed anew when either has changed."""
        self.look()
        newest, known = self._sets[-1], self._signed
        if known is None or known[0] is not newest or known[1] != models:
            public = {scheme: key.public for scheme, key in newest.keys.items()}
            times = newest.not_before_ms, newest.not_after_ms
            signed = sign_keys(self._identity, models, public, *times, attester=self._attester)
            known = self._signed = newest, dict(models), signed
        return known[2]

    def find(self, scheme: Scheme, public: bytes) -> HeldKey | None:
        """The key of this node with that scheme and public half; None if the node has no such key now."""
        self.look()
        for one in self._sets:
            if one.keys[scheme].public == public:
                return HeldKey(one.keys[scheme], one)
        return None

    def look(self) -> None:
        """Make the next set if it is due, and forget those that are over."""
        newest = self._sets[-1]
        if newest.is_old() or (newest.is_half_full() and self._has_room()):
            newest.follow()
            self._sets.append(KeySet(self._clock))
        self._sets = [one for one in self._sets[:-1] if not one.is_over()] + self._sets[-1:]

    def _has_room(self) -> bool:
        """Whether there may be one more before its time. The oldest may have to go for it, if nobody needs that one."""
        if len(self._sets) >= SETS_KEPT_MAX and self._sets[0].is_over(PRESSED_OVERLAP_S):
            del self._sets[0]
        return len(self._sets) < SETS_KEPT_MAX
