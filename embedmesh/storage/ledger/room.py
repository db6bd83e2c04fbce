"""What a hold may be: how much an account and a key have left, and which limit has no room."""

from typing import Any

from embedmesh.rules.errors import Failure, InsufficientQuota, RateLimited
from embedmesh.rules.holds import Hold
from embedmesh.rules.money import format_usd
from embedmesh.storage.cached.rate_limits import KEY_ABOVE, THIS_KEY
from embedmesh.storage.db import Db, Row
from embedmesh.storage.sql import HOLDS_SQL
from embedmesh.storage.times import MS_PER_DAY, first_day_of_month

CONCURRENCY_AGAIN_S = 1.0  # a request of the same key ends in about that time, or later

Room = list[Row]
"""What an account has available, and for a key and each key above it: its limits, and how much of them is used."""


def read_room(db: Db, now_ms: int, account_id: str, key_id: str | None) -> Room:
    """No rows where no customer has that account."""
    days = {"day": now_ms // MS_PER_DAY, "month_day": first_day_of_month(now_ms)}
    return list(db.execute(HOLDS_SQL["read_room"], {"account_id": account_id, "key_id": key_id} | days).fetchall())


def available_nanousd(room: Room) -> int:
    """The most that a hold could be: what the account has, or what is left of a budget."""
    most = room[0][0] if room else 0
    for *_, budget_day, spent_day, budget_month, spent_month, held in room:
        for budget, spent in ((budget_day, spent_day), (budget_month, spent_month)):
            if budget is not None:
                most = min(most, budget - spent - held)
    return int(most)


def refusal(hold: Hold, room: Room) -> Failure:
    """What to say to a caller whose hold was not placed: the account, or one of the key's own limits."""
    if not room:
        return InsufficientQuota("This account cannot be charged.")
    amount, available = hold.amount_nanousd, room[0][0]
    for _, key_id, *limits in room:
        if (failure := _no_room_of(THIS_KEY if key_id == hold.key_id else KEY_ABOVE, amount, limits)) is not None:
            return failure
    if available >= amount:  # another gateway has ended something since
        return RateLimited(
            "There was no room for this request a moment ago, and there is now. Try again.",
            retry_after_s=CONCURRENCY_AGAIN_S,
        )
    return InsufficientQuota(
        f"The account's balance does not cover this request: it needs {format_usd(amount)}, and "
        f"{format_usd(max(0, available))} is available. Add credit."
    )


def _no_room_of(whose: str, amount: int, limits: list[Any]) -> Failure | None:
    """What to say where a key's own limits have no room for `amount`; None where they have."""
    concurrency, in_use, budget_day, spent_day, budget_month, spent_month, held = limits
    if concurrency is not None and in_use >= concurrency:
        return RateLimited(
            f"{whose} has {concurrency} requests under way, which is all it may. Wait for one of them.",
            retry_after_s=CONCURRENCY_AGAIN_S,
        )
    for budget, spent, period in ((budget_day, spent_day, "day"), (budget_month, spent_month, "month")):
        if budget is not None and spent + held + amount > budget:
            return InsufficientQuota(
                f"{whose} has a budget of {format_usd(budget)} a {period} (UTC), which does not cover this request: "
                f"{format_usd(max(0, budget - spent - held))} is left."
            )
    return None
