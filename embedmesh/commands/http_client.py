"""How commands speak HTTP: one request, one deadline for the whole reply, and a line on stderr while it takes long.

`embedmesh embed` alone has another, that of `embedmesh.client.bulk`: it has several requests in flight.
"""

import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import click

from embedmesh.rules.errors import SetupError
from embedmesh.rules.tls_failures import tls_failure

CLIENT_CERTIFICATE = "EMBEDMESH_CLIENT_CERT"  # a file with certificate and key, for gateways with --tls-client-ca
NOTICE_S = 2.0  # before the person at the terminal reads that a reply takes long

Connect = Callable[[float], http.client.HTTPConnection]
"""Opens a connection whose reads and writes time out after that many seconds."""


class HttpReply(NamedTuple):
    """A whole reply."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The decoded body. Raises ValueError where it is not JSON."""
        return json.loads(self.body)


class NoReply(Exception):
    """No reply came. The text says why; `kind` says what failed: connecting, TLS, the deadline, or the reply itself."""

    def __init__(self, text: str, kind: Literal["connect", "tls", "late", "broken"]) -> None:
        super().__init__(text)
        self.kind = kind


class HttpClient:
    """Sends requests to one server. `name` is how the person at the terminal knows it."""

    def __init__(self, name: str, connect: Connect, *, key: str = "", reply_s: float, reply_bytes_max: int) -> None:
        self.name = name
        self._connect = connect
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._reply_s = reply_s
        self._reply_bytes_max = reply_bytes_max

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> HttpReply:
        """The reply, within `reply_s` seconds in all. Raises NoReply; UnicodeEncodeError if nothing was sent."""
        encoded = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        late = threading.Event()
        connection = None
        try:
            connection = self._connect(self._reply_s)
            with self._deadline(connection.sock, late):
                connection.request(method, path, encoded, headers)
                response = connection.getresponse()
                raw = response.read(self._reply_bytes_max + 1)
            if len(raw) > self._reply_bytes_max:
                raise ValueError(f"the answer has more than {self._reply_bytes_max:,} bytes")
            if response.length:
                raise ValueError("the answer ended in the middle")
            return HttpReply(response.status, raw)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                unknown = f"no answer within {self._reply_s:.0f} s; whether it was done is not known"
                raise NoReply(unknown, "late") from None
            if connection is None and isinstance(error, ssl.SSLError):
                raise NoReply(str(tls_failure(self.name, error)), "tls") from None
            reason = getattr(error, "strerror", None) or str(error)
            raise NoReply(reason, "connect" if connection is None else "broken") from None
        finally:
            if connection is not None:
                connection.close()

    @contextmanager
    def _deadline(self, sock: socket.socket, late: threading.Event) -> Iterator[None]:
        """Ends the connection when the time is up: timeouts of sockets are for each read, and a server may drip."""

        def notice() -> None:
            click.echo(f"waiting for {self.name}, at most {self._reply_s:.0f} s", err=True)

        def end() -> None:
            late.set()
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

        timers = [threading.Timer(NOTICE_S, notice), threading.Timer(self._reply_s, end)]
        for timer in timers:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()


def to_url(base_url: str) -> Connect:
    """Connections to the host and port of a URL. Raises SetupError for a client certificate that cannot be used."""
    parts = urlsplit(base_url)
    host, port = parts.hostname or "", parts.port
    tls = _client_context() if parts.scheme == "https" else None

    def connect(timeout_s: float) -> http.client.HTTPConnection:
        if tls is None:
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls)
        connection.connect()
        return connection

    return connect


def _client_context() -> ssl.SSLContext:
    """The system's authorities, or SSL_CERT_FILE's; and our own certificate, where the environment names one."""
    context = ssl.create_default_context()
    if file := os.environ.get(CLIENT_CERTIFICATE):
        try:
            context.load_cert_chain(file)
        except OSError as error:  # an SSLError is one
            why = getattr(error, "reason", None) or error.strerror
            raise SetupError(f"{CLIENT_CERTIFICATE}: {file} is no certificate with its key, PEM ({why}).") from None
    return context


def to_unix(path: Path) -> Connect:
    """Connections to a Unix socket."""

    def open_socket() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return sock

    return over(open_socket)


def over(open_socket: Callable[[], socket.socket]) -> Connect:
    """Connections over sockets that `open_socket` opens."""

    def connect(timeout_s: float) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=timeout_s)
        connection.sock = open_socket()
        connection.sock.settimeout(timeout_s)
        return connection

    return connect
