"""How many keys an account may have, how deep keys may make keys, and what a rotated key hands over to the new one.

Call it in a transaction that has locked the account, so that two callers who make keys at once count each other's.
"""

from embedmesh.rules.errors import InsufficientScope, InvalidValue, RateLimited
from embedmesh.rules.limits import ACCOUNT_KEYS_A_DAY_MAX, ACCOUNT_KEYS_MAX, KEYS_ABOVE_MAX
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.sql import KEYS_SQL
from embedmesh.storage.times import MS_PER_DAY, MS_PER_MINUTE

HAND_OVER = (  # in this order
    "hand_over_place",
    "hand_over_draws",
    "draw_from_new",
    "hand_over_children",
    "hand_over_drawn",
    "hand_over_drawn_days",
    "add_held",
    "add_spent",
)


def check_room(session: BooksSession, account_id: str, *, made_by_a_key: bool) -> None:
    """Raise InvalidValue, or RateLimited, where the account has as many keys as it may."""
    now_ms = session.clock.unix_ms()
    span = {"account_id": account_id, "now_ms": now_ms, "since_ms": now_ms - MS_PER_DAY}
    good, made, first_ms = session.rows(KEYS_SQL["count_keys"], span)[0]
    if good >= ACCOUNT_KEYS_MAX:
        raise InvalidValue(
            f"An account has at most {ACCOUNT_KEYS_MAX:,} good keys, and this one has them. Revoke some."
        )
    if made_by_a_key and made >= ACCOUNT_KEYS_A_DAY_MAX:
        raise RateLimited(
            f"Keys make at most {ACCOUNT_KEYS_A_DAY_MAX:,} keys of an account in 24 hours. Wait, or ask the operator "
            "for one.",
            retry_after_s=(first_ms + MS_PER_DAY - now_ms) / 1000,
        )


def check_depth(session: BooksSession, parent_id: str) -> None:
    """Raise InsufficientScope where a key is too deep to make others."""
    if session.rows(KEYS_SQL["count_above"], {"key_id": parent_id})[0][0] >= KEYS_ABOVE_MAX:
        raise InsufficientScope(
            f"Keys make keys to a depth of {KEYS_ABOVE_MAX}, and this API key is as deep. Use one above."
        )


def hand_over(session: BooksSession, old_id: str, new_id: str) -> None:
    """Put the old key, and all keys below it, below the new one, which has then spent and used what the old one has."""
    row = {"old_id": old_id, "new_id": new_id}
    for statement in HAND_OVER:
        session.run(KEYS_SQL[statement], row)
    session.run(KEYS_SQL["add_leased"], row | {"minute": session.clock.unix_ms() // MS_PER_MINUTE})
