"""The form of log lines: text, or JSON objects. One line each, whatever it says.

Nobody's values are in them. Our own lines are written to hold none. The words of libraries may quote whatever they were
given, so of those only the template of a line is taken, and where it was logged; of exceptions their type and places.
"""

import logging
import os
import re
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

import msgspec

from embedmesh.rules.request_record import CURRENT, RequestRecord

LogFormat = Literal["text", "json"]
LOG_LINE_BYTES_MAX = 4_096  # PIPE_BUF: processes that share a pipe write no further into each other's lines
LOG_MESSAGE_CHARS_MAX = 1_000
FRAMES_MAX = 12  # of a traceback, the innermost
OWN = "embedmesh"
NO_ROUTE, NO_STATUS = "(no route)", "(no reply)"
ACCESS_LOGGER = "embedmesh.access"

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What ends a line, or makes a terminal or an editor show something else than what is there."""
SECRET = re.compile(
    r"\bem(?:_admin)?_[0-9A-Za-z]{30,}|\bemj_[\w.-]{8,}|(?i:\b(?:bearer|basic))\s+[\w.~+/=-]{16,}"
    r"|(?<=://)[^/\s@]+(?=@)|(?<=password=)\S+"
)
"""Keys and join tokens of ours, credentials of a header, and those in a URL or DSN. None should come this far."""


class LogLine(msgspec.Struct, omit_defaults=True):
    """A line as JSON. Names with a dot are those of OpenTelemetry's semantic conventions, and mostly of ECS, too."""

    ts: datetime
    level: str
    logger: str
    message: str
    service: str = msgspec.field(name="service.name")
    pid: int = msgspec.field(name="process.pid")
    request_id: str = ""
    ledger_id: str = ""
    node: str = ""
    account: str = ""
    exception: str = msgspec.field(default="", name="exception.type")
    stack: str = msgspec.field(default="", name="exception.stacktrace")


class AccessLine(msgspec.Struct, omit_defaults=True):
    """A request that has ended, as JSON."""

    ts: datetime
    level: str
    logger: str
    message: str
    service: str = msgspec.field(name="service.name")
    pid: int = msgspec.field(name="process.pid")
    method: str = msgspec.field(name="http.request.method")
    duration_ms: float
    outcome: str
    request_id: str = ""
    route: str = msgspec.field(default="", name="http.route")
    status: int = msgspec.field(default=0, name="http.response.status_code")
    bytes_in: int = msgspec.field(default=0, name="http.request.body.size")
    bytes_out: int = msgspec.field(default=0, name="http.response.body.size")
    node: str = ""
    account: str = ""
    ledger_id: str = ""
    model: str = msgspec.field(default="", name="gen_ai.request.model")
    tokens: int = 0
    cost_nanousd: int = 0
    client: str = msgspec.field(default="", name="client.address")


def printable(text: str, chars_max: int = LOG_MESSAGE_CHARS_MAX) -> str:
    """The text on one line, without secrets, and without what a terminal takes for a command."""
    if len(text) > chars_max:
        text = text[:chars_max] + "…"
    text = UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return SECRET.sub("(secret)", text)


def places(trace: TracebackType | None) -> str:
    """Where an exception was raised, innermost first, as `file.py:12 in function < …`: no values, no lines of code."""
    frames = traceback.extract_tb(trace)[-FRAMES_MAX:]
    return " < ".join(f"{each.filename.rpartition('/')[2]}:{each.lineno} in {each.name}" for each in reversed(frames))


class LineFormat:
    """Makes lines of one process."""

    def __init__(self, form: LogFormat, service: str) -> None:
        """`service` is what JSON calls the process: `embedmesh-gateway`."""
        self.is_json = form == "json"
        self._service = service
        self._pid = os.getpid()
        self.node = ""  # that this process is, once it is known
        self._encode = msgspec.json.Encoder().encode
        self._encode_lines = msgspec.json.Encoder().encode_lines
        self._stamp = -1, ""

    def of_record(self, record: logging.LogRecord) -> bytes:
        """One line, its end included."""
        request, said = CURRENT.get(), vars(record)
        if request is None or request.over:
            request = RequestRecord("")
        own_id = str(said.get("request_id", ""))
        ids = {
            "request_id": request.request_id or own_id,
            "ledger_id": own_id if request.request_id else "",
            "node": str(said.get("node") or request.node or self.node),
            "account": request.account,
        }
        if ids["ledger_id"] == ids["request_id"]:
            ids["ledger_id"] = ""
        ids = {name: printable(each) for name, each in ids.items() if each}
        message, kind, stack = printable(said_by(record)), "", ""
        if record.exc_info and record.exc_info[0] is not None:
            kind, stack = record.exc_info[0].__name__, places(record.exc_info[2])
        if self.is_json:
            at = datetime.fromtimestamp(record.created, UTC)
            level, logger = record.levelname.lower(), record.name
            line = LogLine(at, level, logger, message, self._service, self._pid, **ids, exception=kind, stack=stack)
            return self._encode(line) + b"\n"
        more = [f"{name}={value}" for name, value in ids.items() if value not in message]
        text = f"{self._time(record.created)} {record.levelname} {record.name}: {message}"
        text += f": {kind} at {stack}" if kind else ""
        if more:
            text += f" [{' '.join(more)}]"
        return f"{text}\n".encode()

    def of_requests(self, records: Sequence[RequestRecord]) -> bytes:
        """Lines of the access log."""
        if self.is_json:
            return self._encode_lines([self._access_line(record) for record in records])
        return b"".join(map(self._access_text, records))

    def _access_line(self, record: RequestRecord) -> AccessLine:
        method, route, status, outcome, account = (
            record.method, record.route, record.status, record.outcome, record.account,
        )  # fmt: skip
        return AccessLine(
            datetime.fromtimestamp(record.ended_at, UTC), "info", ACCESS_LOGGER,
            f"{method} {route or NO_ROUTE} {status or NO_STATUS} {outcome}", self._service, self._pid,
            method, round(record.seconds * 1000, 3), outcome, _shown_id(record.request_id), route, status,
            record.bytes_in, record.bytes_out, record.node or self.node,
            account if account.isprintable() else printable(account), record.own_id, record.model,
            record.tokens, record.nanousd, record.client,
        )  # fmt: skip

    def _access_text(self, record: RequestRecord) -> bytes:
        request_id, account, node = _shown_id(record.request_id), record.account, record.node or self.node
        if not account.isprintable():
            account = printable(account)
        message = f"{record.method} {record.route or NO_ROUTE} {record.status or NO_STATUS} {record.outcome}"
        named = {
            "in": record.bytes_in, "out": record.bytes_out, "tokens": record.tokens, "nanousd": record.nanousd,
            "model": record.model, "client": record.client, "request_id": request_id, "ledger_id": record.own_id,
            "node": node, "account": account,
        }  # fmt: skip
        more = " ".join(f"{name}={value}" for name, value in named.items() if value)
        shown = f"{message} {record.seconds * 1000:.3f} ms"
        text = f"{self._time(record.ended_at)} INFO {ACCESS_LOGGER}: {shown} [{more}]"
        return (text + "\n").encode()

    def _time(self, at: float) -> str:
        """Local time, as `logging` writes it."""
        second = int(at)
        stamp = self._stamp  # one value: several threads make lines
        if second != stamp[0]:
            shown = datetime.fromtimestamp(second).strftime("%Y-%m-%d %H:%M:%S")
            stamp = self._stamp = second, shown
        return f"{stamp[1]},{int((at - second) * 1000):03d}"


def _shown_id(request_id: str) -> str:
    """A caller may have chosen it. It has no blank, colon or equals sign, so that only keys of ours may be in it."""
    return SECRET.sub("(secret)", request_id) if "em" in request_id else request_id


def said_by(record: logging.LogRecord) -> str:
    """What a line says: of a library, its template if that is one, and where it was logged."""
    if record.name == OWN or record.name.startswith(OWN + "."):
        try:
            return record.getMessage()
        except Exception:  # noqa: BLE001 - a wrong template must not cost the line, nor its caller
            return str(record.msg)
    template = record.msg if isinstance(record.msg, str) and record.args and record.msg.strip("%s ") else "(not shown)"
    return f"{template} ({record.filename}:{record.lineno} in {record.funcName})"
