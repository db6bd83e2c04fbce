"""docs/reference/contract.md promises what the code does: its tables of errors and limits are the code's."""

import re
from pathlib import Path

import pytest

from embedmesh.http.failures import TABLE
from embedmesh.rules import limits

PAGE = (Path(__file__).parent.parent / "docs/reference/contract.md").read_text()


def test_the_errors_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    promised = {(int(status), kind, code) for status, kind, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert promised == {(status, kind, failure.code) for failure, (status, kind) in TABLE.items()}


LIMITS = re.findall(r"^\| .* \| ([\d, ]+) \| (`\w+`(?:, `\w+`)*) \|$", PAGE, re.MULTILINE)


def test_there_are_limits() -> None:
    assert len(LIMITS) >= 8


@pytest.mark.parametrize(("numbers", "names"), LIMITS)
def test_a_limit_is_the_one_that_is_enforced(numbers: str, names: str) -> None:
    promised = [float(number) for number in numbers.split(", ")]
    assert promised == [getattr(limits, name) for name in re.findall(r"`(\w+)`", names)]
