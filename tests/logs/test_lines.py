"""A log line is one line, in both forms, and holds nobody's values."""

import json
import logging
import sys
import threading
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.logs.lines import LOG_LINE_BYTES_MAX, LineFormat, LogFormat
from embedmesh.rules.request_record import CURRENT, RequestRecord

FORMS: tuple[LogFormat, ...] = ("text", "json")
SECRETS = (
    "em_0123456789abcdefghijklABCDEFGHIJABCDEF",
    "em_admin_0123456789abcdefghijklABCDEFGHIJABCDEF",
    "emj_abcdefgh.ijklmnop",
    "Bearer 0123456789abcdef0123",
    "postgresql://user:hidden@host/db",
    "password=hidden",
)


def line(form: LogFormat, name: str, message: str, *args: object, **more: Any) -> str:
    record = logging.LogRecord(name, logging.WARNING, "/home/x/library.py", 7, message, args, more.pop("exc", None))
    record.funcName = "speak"
    vars(record).update(more)
    said = LineFormat(form, "embedmesh-test").of_record(record).decode()
    assert said.endswith("\n") and said.count("\n") == 1
    return said


@given(text=st.text(max_size=3_000), form=st.sampled_from(FORMS))
def test_whatever_is_said_is_one_line_that_a_terminal_shows_as_it_is(text: str, form: LogFormat) -> None:
    said = line(form, "embedmesh.x", "got %s", text)[:-1]
    assert len(said.encode()) <= 2 * LOG_LINE_BYTES_MAX
    if form == "json":
        assert json.loads(said)["level"] == "warning"
    assert not any(ord(each) < 0x20 or 0x7F <= ord(each) < 0xA0 or 0x2028 <= ord(each) <= 0x202E for each in said)


@pytest.mark.parametrize("form", FORMS)
def test_fields_of_a_line(form: LogFormat) -> None:
    said = line(form, "embedmesh.fleet", "node %s is ejected", "n1", node="n1", request_id="req_1")
    if form == "text":
        assert said.endswith("WARNING embedmesh.fleet: node n1 is ejected [request_id=req_1]\n"), "n1 is said already"
        return
    found = json.loads(said)
    at = datetime.fromisoformat(found.pop("ts"))
    assert at.tzinfo is not None and at.utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert found.pop("process.pid") > 0
    assert found == {
        "level": "warning",
        "logger": "embedmesh.fleet",
        "message": "node n1 is ejected",
        "service.name": "embedmesh-test",
        "request_id": "req_1",
        "node": "n1",
    }


def test_a_line_within_a_request_has_its_ids_until_it_is_over() -> None:
    """The caller's id and the ledger's are told apart."""
    record = RequestRecord("theirs", account="local", node="n1")
    token = CURRENT.set(record)
    try:
        found = json.loads(line("json", "embedmesh.x", "so", request_id="req_1"))
        assert {name: found[name] for name in ("request_id", "ledger_id", "account", "node")} == {
            "request_id": "theirs", "ledger_id": "req_1", "account": "local", "node": "n1",
        }  # fmt: skip
        assert "theirs" in line("text", "asyncio", "from a library")
        record.over = True
        assert "theirs" not in line("json", "embedmesh.x", "so")
    finally:
        CURRENT.reset(token)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_not_written(form: LogFormat, secret: str) -> None:
    said = line(form, "embedmesh.x", "got %s, you see", secret, request_id=secret)
    assert secret not in said and "hidden" not in said and "0123456789" not in said and "abcdefgh" not in said
    assert "(secret)" in said and "you see" in said
    access = LineFormat(form, "t").of_requests([RequestRecord(SECRETS[0], method="GET")]).decode()
    assert SECRETS[0] not in access


@pytest.mark.parametrize("form", FORMS)
def test_of_an_exception_its_type_and_places(form: LogFormat) -> None:
    def inner(text: str) -> None:
        raise ValueError(text)

    try:
        inner("a text of a caller")
    except ValueError:
        said = line(form, "embedmesh.x", "it failed", exc=sys.exc_info())
    assert "text of" not in said and "raise" not in said
    assert "ValueError" in said and "test_lines.py" in said and "in inner < test_lines.py" in said


@pytest.mark.parametrize("form", FORMS)
def test_the_words_of_libraries_are_not_repeated(form: LogFormat) -> None:
    """Their templates are, which are part of their source; what is filled in, or was formatted before, is not."""
    assert "private" not in line(form, "asyncio", "Task exception: ValueError('private')")
    said = line(form, "psycopg.pool", "error connecting in %r: %s", "pool", "private")
    assert "private" not in said and "error connecting in %r: %s (library.py:7 in speak)" in said
    assert "private" not in line(form, "py.warnings", "%s", "private")
    assert "private" not in line(form, "embedmesh_other", "private")


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_template_costs_nobody_anything(form: LogFormat) -> None:
    assert "%d of them" in line(form, "embedmesh.x", "%d of them", "three")


def test_lines_are_made_in_several_threads() -> None:
    """The second that a line shows is its own."""
    made = LineFormat("text", "t")
    wrong: list[str] = []

    def make(at: float) -> None:
        record = logging.LogRecord("embedmesh.x", logging.INFO, "", 0, "so", None, None)
        record.created = at
        expected = datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
        for _ in range(2_000):
            said = made.of_record(record).decode()
            if not said.startswith(expected):
                wrong.append(said)

    threads = [threading.Thread(target=make, args=(1e9 + at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
