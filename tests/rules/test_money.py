"""Money is whole nano-USD, and no request is free."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.rules.money import AMOUNT_MAX_NANOUSD, cost_nanousd, format_usd, parse_usd, payable_nanousd

TOKENS = st.integers(1, 300_000)
PRICES = st.integers(0, 10**13)


@pytest.mark.parametrize(
    ("tokens", "price", "cost"),
    [
        (0, 20_000_000, 0),
        (1, 0, 0),
        (1, 1, 1),  # a millionth of a nano-USD is charged as one
        (1, 20_000_000, 20),
        (3, 333_333, 1),
        (999_999, 1, 1),
        (1_000_000, 1, 1),
        (1_000_001, 1, 2),
        (300_000, 10**13, 3 * 10**12),
    ],
)
def test_a_cost_is_rounded_up_once(tokens: int, price: int, cost: int) -> None:
    """Tokens times price over a million, up to the next whole nano-USD."""
    assert cost_nanousd(tokens, price) == cost


@given(TOKENS, PRICES)
def test_rounding_costs_less_than_one_nanousd(tokens: int, price: int) -> None:
    """The rounded cost is the exact one or less than one nano-USD above it, and never free where a price is set."""
    excess = cost_nanousd(tokens, price) * 1_000_000 - tokens * price
    assert 0 <= excess < 1_000_000
    assert (cost_nanousd(tokens, price) == 0) == (price == 0)


@given(TOKENS, TOKENS, PRICES)
def test_splitting_a_request_never_makes_it_cheaper(first: int, second: int, price: int) -> None:
    """Two requests cost at least as much as one with the same tokens, and at most one nano-USD more."""
    apart = cost_nanousd(first, price) + cost_nanousd(second, price)
    assert 0 <= apart - cost_nanousd(first + second, price) <= 1


@pytest.mark.parametrize(
    ("ask", "cap", "left", "payable"),
    [
        (30, None, 100, 60),
        (30, 40, 100, 60),  # it asks for less than it may get
        (30, 20, 100, 40),
        (30, 0, 100, 0),
        (30, None, 59, 59),  # the caller pays no more
        (30, 20, 39, 39),
    ],
)
def test_a_node_gets_what_it_asks_within_the_cap_and_what_is_left(
    ask: int, cap: int | None, left: int, payable: int
) -> None:
    """For two million tokens: the least of the three."""
    assert payable_nanousd(2_000_000, ask, cap, left) == payable


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "-",
        "+1",
        " 1",
        "1 ",
        "1e3",
        "1,000",
        "0x1",
        "nan",
        "--1",
        "1.2.3",
        "1.0000000001",
        "\u00b2",
        "\u0661",
        "1_0",
        "1234567890",
    ],
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    """Only plain decimal digits with at most nine decimals are an amount."""
    with pytest.raises(ValueError) as told:
        parse_usd(text)
    assert str(told.value) == "not an amount of US dollars: use digits with at most 9 decimals, as in 12.50"


@pytest.mark.parametrize(
    ("text", "nanousd", "shown"),
    [
        ("0", 0, "$0.00"),
        ("12", 12_000_000_000, "$12.00"),
        ("12.5", 12_500_000_000, "$12.50"),
        ("-0.000000001", -1, "-$0.000000001"),
        (".5", 500_000_000, "$0.50"),
        ("1.", 1_000_000_000, "$1.00"),
        ("999999999.999999999", 999_999_999_999_999_999, "$999,999,999.999999999"),
    ],
)
def test_amounts_are_read_and_shown(text: str, nanousd: int, shown: str) -> None:
    """An amount is read without a float on the way, and shown with as many decimals as it needs."""
    assert parse_usd(text) == nanousd
    assert format_usd(nanousd) == shown


@given(st.integers(-(10**18) + 1, 10**18 - 1))
def test_what_is_shown_can_be_read(nanousd: int) -> None:
    """Reading what was shown gives the same amount."""
    assert parse_usd(format_usd(nanousd).replace("$", "").replace(",", "")) == nanousd


def test_the_largest_amount_fits_two_of_it() -> None:
    """Adding two accounts' balances cannot leave a signed 64-bit integer."""
    assert 2 * AMOUNT_MAX_NANOUSD - 1 < 2**63
