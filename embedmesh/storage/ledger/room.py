"""What a hold may be: how much an account and a key have left, and which limit has no room."""

from enum import Enum
from typing import Any, NamedTuple

from embedmesh.rules.errors import Failure, InsufficientQuota, RateLimited
from embedmesh.rules.holds import Hold
from embedmesh.rules.money import format_usd
from embedmesh.storage.cached.rate_limits import KEY_ABOVE, THIS_KEY
from embedmesh.storage.db import Db, Row
from embedmesh.storage.sql import HOLDS_SQL, TABS_SQL
from embedmesh.storage.times import MS_PER_DAY, first_day_of_month

AGAIN_S = 1.0  # there is room already


class Lacks(Enum):
    """What a hold that was not placed found too little of."""

    MONEY = "money"
    BUDGET = "budget"
    NOTHING = "nothing"  # another gateway has ended something since
    OTHER = "other"  # an account that can be charged


class NoRoom(NamedTuple):
    """Why a hold was not placed, and what to say to its caller."""

    lacks: Lacks
    failure: Failure


class Recall(NamedTuple):
    """Whose tabs have some of what a hold lacks: an account's, or of those the ones that share a budget with a key."""

    account_id: str
    key_id: str | None


class LiveTabs(NamedTuple):
    """How many tabs an account has that have not ended, and how many of these share a budget with a key."""

    of_account: int
    of_budget: int

    def to_recall(self, lacks: Lacks, account_id: str, key_id: str | None) -> Recall | None:
        """The tabs that may have what a hold lacks."""
        if lacks is Lacks.MONEY and self.of_account:
            return Recall(account_id, None)
        if lacks is Lacks.BUDGET and self.of_budget:
            return Recall(account_id, key_id)
        return None


Room = list[Row]
"""What an account has available, and for a key and each key above it: its limits, and how much of them is used."""


def read_room(db: Db, now_ms: int, account_id: str, key_id: str | None) -> Room:
    """No rows where no customer has that account."""
    days = {"day": now_ms // MS_PER_DAY, "month_day": first_day_of_month(now_ms)}
    return list(db.execute(HOLDS_SQL["read_room"], {"account_id": account_id, "key_id": key_id} | days).fetchall())


def count_live_tabs(db: Db, account_id: str, key_id: str | None) -> LiveTabs:
    """Read them before the room of a hold that was refused: then what one of them gives back is seen there."""

    def count(key: str | None) -> int:
        row = db.execute(TABS_SQL["count_live_tabs"], {"account_id": account_id, "key_id": key}).fetchone()
        assert row is not None
        return int(row[0])

    of_account = count(None)
    return LiveTabs(of_account, count(key_id) if of_account and key_id is not None else 0)


def available_nanousd(db: Db, now_ms: int, account_id: str, key_id: str | None) -> int:
    """The most that a hold could be: what the account has, or what is left of a budget; tabs could be recalled."""
    room = read_room(db, now_ms, account_id, key_id)
    most = room[0][0] if room else 0
    for *_, budget_day, spent_day, budget_month, spent_month, held in room:
        for budget, spent in ((budget_day, spent_day), (budget_month, spent_month)):
            if budget is not None:
                most = min(most, budget - spent - held)
    ((unspent,),) = db.execute(TABS_SQL["unspent_of_account"], {"account_id": account_id}).fetchall()
    return int(most + unspent)


def refusal(hold: Hold, room: Room) -> NoRoom:
    """Why a hold was not placed: the account, or one of the key's own limits."""
    if not room:
        return NoRoom(Lacks.OTHER, InsufficientQuota("This account cannot be charged."))
    amount, available = hold.amount_nanousd, room[0][0]
    for _, key_id, *limits in room:
        if (refused := _no_room_of(THIS_KEY if key_id == hold.key_id else KEY_ABOVE, amount, limits)) is not None:
            return refused
    if available >= amount:
        words = "There was no room for this request a moment ago, and there is now. Try again."
        return NoRoom(Lacks.NOTHING, RateLimited(words, retry_after_s=AGAIN_S))
    words = (
        f"The account's balance does not cover this request: it needs {format_usd(amount)}, and "
        f"{format_usd(max(0, available))} is available. Add credit."
    )
    return NoRoom(Lacks.MONEY, InsufficientQuota(words))


def _no_room_of(whose: str, amount: int, limits: list[Any]) -> NoRoom | None:
    """What to say where a key's own limits have no room for `amount`; None where they have."""
    budget_day, spent_day, budget_month, spent_month, held = limits
    for budget, spent, period in ((budget_day, spent_day, "day"), (budget_month, spent_month, "month")):
        if budget is not None and spent + held + amount > budget:
            words = (
                f"{whose} has a budget of {format_usd(budget)} a {period} (UTC), which does not cover this request: "
                f"{format_usd(max(0, budget - spent - held))} is left."
            )
            return NoRoom(Lacks.BUDGET, InsufficientQuota(words))
    return None
