"""Days and months of the ledger: UTC, in days since 1970."""

from datetime import UTC, datetime

from embedmesh.rules.errors import InvalidValue

MS_PER_MINUTE = 60_000
MS_PER_DAY = 86_400_000


def first_day_of_month(now_ms: int) -> int:
    """The first day of the month that a moment is in."""
    start = datetime.fromtimestamp(now_ms / 1000, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return int(start.timestamp()) * 1000 // MS_PER_DAY


def month_span_ms(month: str) -> tuple[int, int]:
    """From when until when a month like `2026-11` is. Raises InvalidValue."""
    try:
        start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
        end = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    except ValueError:
        raise InvalidValue("A month is written as in 2026-11.", param="month") from None
    return int(start.timestamp()) * 1000, int(end.timestamp()) * 1000
