"""Lines are found in whatever pieces a file comes in, and what is wrong with one is said."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.jobs import lines
from embedmesh.jobs.lines import BadLine, LineFinder, model_named, read_line
from embedmesh.jobs.seen_ids import SeenIds

ENDPOINT = "/v1/embeddings"


def line(**members: object) -> bytes:
    whole = {"custom_id": "a", "method": "POST", "url": ENDPOINT, "body": {"model": "tiny", "input": "x"}} | members
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def found(*pieces: bytes, start: int = 0) -> list[tuple[int, int, bytes | None]]:
    finder = LineFinder(start)
    each = [tuple(one) for piece in pieces for one in finder.feed(piece)]
    return each + [tuple(one) for one in finder.end()]  # type: ignore[return-value]


@given(st.lists(st.binary(max_size=6)), st.lists(st.integers(0, 40)))
def test_lines_are_the_same_in_any_pieces(parts: list[bytes], cuts: list[int]) -> None:
    """Rows and places, too; blank lines are counted, and are no lines."""
    whole = b"\n".join(parts)
    at = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    got = found(*(whole[first:last] for first, last in zip(at, [*at[1:], len(whole)], strict=True)))
    expected, start = [], 0
    for row, data in enumerate(whole.split(b"\n"), 1):
        if data.strip(b" \t\r"):
            expected.append((row, start, data))
        start += len(data) + 1
    assert got == expected


def test_a_line_that_is_too_long_is_passed_over_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BATCH_LINE_BYTES_MAX", 10)
    finder = LineFinder()
    kept = 0
    for _ in range(1_000):
        assert list(finder.feed(b"x" * 8)) == []
        kept = max(kept, sum(map(len, finder._parts)))
    assert kept <= 10
    assert [tuple(each) for each in finder.feed(b"\n{}\n")] == [(1, 0, None), (2, 8_001, b"{}")]


def test_a_right_line() -> None:
    assert read_line(line(), ENDPOINT) == ("a", b'{"model": "tiny", "input": "x"}')
    assert read_line(line() + b"\r", ENDPOINT).custom_id == "a"


BAD = {
    "too long": (None, "line_too_long", None),
    "no JSON": (b"{", "invalid_json_line", None),
    "no object": (b'["a"]', "invalid_json_line", None),
    "two values": (line() + b"{}", "invalid_json_line", None),
    "NaN": (line().replace(b'"x"', b"NaN"), "invalid_json_line", None),
    "broken UTF-8": (line().replace(b'"x"', b'"\xff"'), "invalid_json_line", None),
    "half a surrogate pair": (line().replace(b'"a"', b'"\\ud800"'), "invalid_json_line", None),
    "a byte order mark": (b"\xef\xbb\xbf" + line(), "invalid_json_line", None),
    "deep": (line().replace(b'"x"', b"[" * 100_000 + b"]" * 100_000), "invalid_json_line", None),
    "a member too many": (line(id=1), "unknown_parameter", "id"),
    "no custom_id": (line(custom_id=...), "missing_required_parameter", "custom_id"),
    "a number": (line(custom_id=1), "invalid_type", "custom_id"),
    "an empty id": (line(custom_id=""), "invalid_value", "custom_id"),
    "a long id": (line(custom_id="a" * 513), "invalid_value", "custom_id"),
    "no method": (line(method=...), "missing_required_parameter", "method"),
    "GET": (line(method="GET"), "invalid_method", "method"),
    "another url": (line(url="/v1/chat/completions"), "invalid_url", "url"),
    "a whole url": (line(url="https://a.example/v1/embeddings"), "invalid_url", "url"),
    "no body": (line(body=...), "missing_required_parameter", "body"),
    "null": (line(body=None), "missing_required_parameter", "body"),
    "a list": (line(body=[]), "missing_required_parameter", "body"),
}


@pytest.mark.parametrize(("data", "code", "param"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_line(data: bytes | None, code: str, param: str | None) -> None:
    with pytest.raises(BadLine) as bad:
        read_line(data, ENDPOINT)
    told = bad.value.at(7)
    assert (told.code, told.param, told.line) == (code, param, 7)
    assert len(told.message) > 10


def test_the_model_that_a_body_names() -> None:
    assert model_named(b'{"input":"x","model":"tiny"}') == "tiny"
    for body in (b"{}", b'{"model":null}', b'{"model":1}', b"{", b'{"model":"\xff"}'):
        assert model_named(body) is None


def test_ids_are_new_once() -> None:
    seen = SeenIds()
    ids = [f"request-{number}" for number in range(50_000)]
    assert all(map(seen.add, ids))
    assert not any(map(seen.add, ids))
    assert sum(len(table) * 8 for table in seen._tables) < 50_000 * 40


def test_blank_lines_are_passed_over_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may have two hundred million of them: they must not take the event loop a piece at a time."""
    looked_at = 0
    keep = LineFinder._keep

    def counted(finder: LineFinder, part: bytes) -> None:
        nonlocal looked_at
        looked_at += 1
        keep(finder, part)

    monkeypatch.setattr(LineFinder, "_keep", counted)
    finder = LineFinder()
    for piece in (b"\n" * 10_000, b" \t\r\n" * 10_000, b" \n" * 10_000 + b" "):
        assert list(finder.feed(piece)) == []
    assert [tuple(each) for each in finder.feed(b"{}\n")] == [(30_001, 70_000, b" {}")]
    assert looked_at <= 10


def test_a_line_with_very_many_members_is_refused_at_the_first_that_is_unknown() -> None:
    """Nothing of it is built: a line of 4 MiB has room for half a million."""
    members = b"".join(b'"%x":0,' % number for number in range(200_000))
    tracemalloc.start()
    with pytest.raises(BadLine) as bad:
        read_line(b"{" + members + line()[1:], ENDPOINT)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (bad.value.code, bad.value.param) == ("unknown_parameter", "0")
    assert most < 4 * len(members)
