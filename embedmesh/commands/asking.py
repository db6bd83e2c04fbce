"""One question to a running program of ours over HTTP, with a deadline for all of it and a word while it takes long."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import click

WORD_S = 2.0  # before the person at the terminal is told that the answer takes long


class Told(NamedTuple):
    """What came back: `body` is decoded JSON."""

    status: int
    body: Any


class Unanswered(Exception):
    """No answer came. The text says why."""


def ask(
    connection: http.client.HTTPConnection,
    where: str,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    headers: Mapping[str, str],
    *,
    answer_s: float,
) -> Told:
    """The answer of `where`, within `answer_s` in all. Raises Unanswered."""
    late = threading.Event()
    try:
        with _watched(connection, where, answer_s, late):
            connection.request(method, path, json.dumps(body) if body is not None else None, dict(headers))
            response = connection.getresponse()
            return Told(response.status, json.loads(response.read()))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise Unanswered(f"no answer within {answer_s:.0f} s; whether it was done is not known") from None
        raise Unanswered(str(error)) from None
    finally:
        connection.close()


@contextmanager
def _watched(
    connection: http.client.HTTPConnection, where: str, answer_s: float, late: threading.Event
) -> Iterator[None]:
    def wait() -> None:
        click.echo(f"waiting for {where}, at most {answer_s:.0f} s", err=True)

    def end() -> None:  # time-outs of sockets are for each read: a server that drips would keep us for ever
        late.set()
        if connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    timers = [threading.Timer(WORD_S, wait), threading.Timer(answer_s, end)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
