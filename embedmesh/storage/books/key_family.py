"""How many keys an account may have, how deep keys may make keys, and what a rotated key hands over to the new one.

All of it inside a transaction that has locked the account, so that two who make keys at once count each other's.
"""

from embedmesh.rules.errors import InsufficientScope, InvalidValue, RateLimited
from embedmesh.storage.books.session import Session
from embedmesh.storage.cached.rate_limits import MINUTE_MS
from embedmesh.storage.ledger.holds import MS_PER_DAY
from embedmesh.storage.sql import load

KEYS = load("keys.sql")
KEYS_MAX = 1_000  # good ones of an account: a revocation ends all below a key in one statement, in milliseconds
MADE_A_DAY_MAX = 1_000  # by keys of an account: keys are never deleted, and nobody shall fill the store with them
ABOVE_MAX = 4  # keys above a key: a hold looks at each of them
HAND_OVER = (  # in this order
    "hand_over_draws",
    "draw_from_new",
    "hand_over_children",
    "hand_over_drawn",
    "hand_over_drawn_days",
    "add_held",
    "add_spent",
)


def check_room(session: Session, account_id: str, *, made_by_a_key: bool) -> None:
    """Raise InvalidValue, or RateLimited, where the account has as many keys as it may."""
    now_ms = session.clock.unix_ms()
    asked = {"account_id": account_id, "now_ms": now_ms, "since_ms": now_ms - MS_PER_DAY}
    good, made, first_ms = session.rows(KEYS["count_keys"], asked)[0]
    if good >= KEYS_MAX:
        raise InvalidValue(f"An account has at most {KEYS_MAX:,} good keys, and this one has them. Revoke some.")
    if made_by_a_key and made >= MADE_A_DAY_MAX:
        raise RateLimited(
            f"Keys make at most {MADE_A_DAY_MAX:,} keys of an account in 24 hours. Wait, or ask the operator for one.",
            retry_after_s=(first_ms + MS_PER_DAY - now_ms) / 1000,
        )


def check_depth(session: Session, parent_id: str) -> None:
    """Raise InsufficientScope where a key has so many above it that it makes no others."""
    if session.rows(KEYS["count_above"], {"key_id": parent_id})[0][0] >= ABOVE_MAX:
        raise InsufficientScope(
            f"Keys make keys to a depth of {ABOVE_MAX}, and this API key is as deep. Use one above."
        )


def hand_over(session: Session, old_id: str, new_id: str) -> None:
    """What is below the old key, and itself, is below the new one; that has spent and used what the old one has."""
    row = {"old_id": old_id, "new_id": new_id}
    for statement in HAND_OVER:
        session.run(KEYS[statement], row)
    session.run(KEYS["add_granted"], row | {"minute": session.clock.unix_ms() // MINUTE_MS})
