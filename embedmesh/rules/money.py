"""Money is integers of nano-USD (1e-9 USD). Prices are nano-USD per one million tokens, or of what else is metered."""

from collections.abc import Iterable

from embedmesh.rules.holds import Metered

TOKENS_PER_PRICE_UNIT = 1_000_000
NANOUSD_PER_USD = 1_000_000_000
AMOUNT_MAX_NANOUSD = 2**62  # fits SQLite's and PostgreSQL's signed 64-bit integers with a bit to spare


def cost_nanousd(tokens: int, price: int) -> int:
    """What `tokens` cost at `price` (nano-USD per million tokens), rounded up once, so that no request is free."""
    return -(-tokens * price // TOKENS_PER_PRICE_UNIT)


def bill_nanousd(metered: Iterable[Metered]) -> int:
    """What all meters of one request cost together, rounded up once."""
    total = 0
    for each in metered:
        total += each.quantity * each.price
    return -(-total // TOKENS_PER_PRICE_UNIT)


def payable_nanousd(tokens: int, ask: int, cap: int | None, left_nanousd: int) -> int:
    """What a node gets for `tokens`: what it asks, at most the operator's `cap` (both nano-USD per million tokens), and
    at most what is left of the caller's cost.
    """
    return min(cost_nanousd(tokens, ask if cap is None else min(ask, cap)), left_nanousd)


def parse_usd(text: str) -> int:
    """Nano-USD of a decimal USD amount like `12.5` (at most 9 decimals; no floats on the way). Raises ValueError."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    whole, _, fraction = digits.partition(".")
    if not (whole + fraction).isascii() or not (whole + fraction).isdigit() or len(fraction) > 9 or len(whole) > 9:
        raise ValueError("not an amount of US dollars: use digits with at most 9 decimals, as in 12.50")
    return sign * (int(whole or "0") * NANOUSD_PER_USD + int(fraction.ljust(9, "0") or "0"))


def plain_usd(nanousd: int) -> str:
    """An amount as `parse_usd` reads it, with all nine decimals; for files and command lines."""
    whole, fraction = divmod(abs(nanousd), NANOUSD_PER_USD)
    return f"{'-' if nanousd < 0 else ''}{whole}.{fraction:09d}"


def format_usd(nanousd: int) -> str:
    """`$12.50` for humans; all nine decimals where they are needed."""
    whole, fraction = divmod(abs(nanousd), NANOUSD_PER_USD)
    decimals = f"{fraction:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanousd < 0 else ''}${whole:,}.{decimals}"
