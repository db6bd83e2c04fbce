"""Sends to one place, in one form, whatever a program says: its log, warnings, and exceptions that nobody caught."""

import logging
import sys
import threading
import warnings
from types import TracebackType
from typing import Any, Literal

from embedmesh.logs.lines import LineFormat, LogFormat, places, printable
from embedmesh.logs.writer import LogHandler, LogWriter

LogLevel = Literal["debug", "info", "warning", "error"]
FOREIGN_LEVEL = logging.WARNING  # of libraries, whose lines say where and not what
QUIET_LOGGERS = {"asyncio": logging.ERROR}

log = logging.getLogger("embedmesh.process")

STDERR_FD, NO_FD = 2, -1  # where it was closed before we began, the number may be that of any other file now

_writer: LogWriter | None = None


def start_logging(program: str, form: LogFormat = "text", level: LogLevel = "info") -> LogWriter:
    """Log to standard error from now on, in a thread of its own. Once a process; a second call changes the level."""
    global _writer
    if _writer is None:
        _writer = LogWriter(LineFormat(form, f"embedmesh-{program}"), STDERR_FD if sys.stderr is not None else NO_FD)
        logging.getLogger().handlers[:] = [LogHandler(_writer)]
        catch_uncaught()
    set_level(level)
    return _writer


def set_level(level: LogLevel) -> None:
    """Log lines of that level and above; libraries' from FOREIGN_LEVEL on."""
    logging.getLogger().setLevel(max(FOREIGN_LEVEL, logging.getLevelName(level.upper())))
    logging.getLogger("embedmesh").setLevel(level.upper())
    for name, quiet in QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(quiet)


def tell(line: str, level: int = logging.INFO) -> None:
    """A line for the person who started the program: as it is among text, as a log line among JSON."""
    line = printable(line)
    if _writer is None:
        print(line, file=sys.stderr)  # noqa: T201 - before there is a log
    elif _writer.form.is_json:
        log.log(level, "%s", line)
    else:
        _writer.put_line(line.encode() + b"\n")


def name_node(node_id: str) -> None:
    """This process is that node: its lines say so."""
    if _writer is not None:
        _writer.form.node = node_id


def dropped_lines() -> int:
    """Log lines of this process that were dropped since its start."""
    return 0 if _writer is None else _writer.dropped


def catch_uncaught() -> None:
    """Log exceptions that nobody caught, and warnings, by type and place: their words may quote anything."""

    def uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        log.critical("nobody caught %s at %s", kind.__name__, places(trace))

    def warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        log.warning("%s at %s:%d", category.__name__, filename.rpartition("/")[2], lineno)

    sys.excepthook = uncaught
    threading.excepthook = lambda said: uncaught(said.exc_type, said.exc_value, said.exc_traceback)
    sys.unraisablehook = lambda said: uncaught(said.exc_type, said.exc_value, said.exc_traceback)
    warnings.showwarning = warned
