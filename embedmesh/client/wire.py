"""Requests over http.client, each with one deadline for all of it, on connections that are kept."""

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from embedmesh.client.access import Access
from embedmesh.client.steps import HttpAnswer, NoAnswer, ToSend
from embedmesh.rules.tls_failures import tls_failure

CLIENT_REPLY_BYTES_MAX = 512 * 1024 * 1024  # 2,048 vectors of width 16,384 in base64, sealed, in base64 again
CONNECT_WITHIN_S = 10.0
CLIENT_IDLE_MAX = 16  # connections that are kept; a program has few threads
CLIENT_IDLE_S = 60.0  # a gateway closes them after 75
CHUNK = 64 * 1024


class Late(Exception):
    """The deadline has passed."""


class Wire:
    """Connections to one gateway. May be used by several threads."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._idle: list[tuple[float, _Line]] = []
        self._closed = False

    def send(self, request: ToSend, deadline: float) -> HttpAnswer | NoAnswer:
        """The reply, by the deadline (of `time.monotonic`). Raises Late."""
        answer = self._answer(request, deadline, lambda line: line.exchange(request, self._access, deadline))
        assert not isinstance(answer, Pieces)
        return answer

    def open(self, request: ToSend, deadline: float) -> "HttpAnswer | Pieces | NoAnswer":
        """The same, but a reply of status 200 is read by its reader. Raises Late."""
        return self._answer(request, deadline, lambda line: line.open(request, self._access, deadline))

    def _answer(
        self, request: ToSend, deadline: float, ask: "Callable[[_Line], HttpAnswer | Pieces]"
    ) -> "HttpAnswer | Pieces | NoAnswer":
        line = self._kept()
        try:
            if line is None:
                line = _Line(self._access, deadline)
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise Late from None
            return NoAnswer("connect", f"{self._access.base_url} cannot be reached in time")
        except ssl.SSLError as error:
            return NoAnswer("tls", str(tls_failure(self._access.base_url, error)))
        except OSError as error:
            return NoAnswer("connect", f"{self._access.base_url} cannot be reached ({error.strerror or error})")
        try:
            answer = ask(line)
        except TimeoutError:
            line.close()
            raise Late from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            line.close()
            self._drop_idle()  # they may be as old
            return NoAnswer("broken", f"the connection to {self._access.base_url} broke ({type(error).__name__})")
        except BaseException:
            line.close()
            raise
        if not isinstance(answer, Pieces):
            self._keep(line)
        return answer

    def close(self) -> None:
        """Close the kept connections; those in use close when they are done."""
        self._closed = True
        self._drop_idle()

    def _kept(self) -> "_Line | None":
        oldest = time.monotonic() - CLIENT_IDLE_S
        with self._lock:
            while self._idle:
                since, line = self._idle.pop()
                if since > oldest:
                    return line
                line.close()
        return None

    def _keep(self, line: "_Line") -> None:
        with self._lock:
            if line.is_open and not self._closed and len(self._idle) < CLIENT_IDLE_MAX:
                self._idle.append((time.monotonic(), line))
                return
        line.close()

    def _drop_idle(self) -> None:
        with self._lock:
            dropped, self._idle = self._idle, []
        for _, line in dropped:
            line.close()


class _Line:
    """One connection."""

    def __init__(self, access: Access, deadline: float) -> None:
        """Raises OSError."""
        within_s = min(CONNECT_WITHIN_S, _left_s(deadline))
        sock = socket.create_connection((access.host, access.port), within_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if access.tls is not None:
                sock = access.tls.wrap_socket(sock, server_hostname=access.host)
        except BaseException:
            sock.close()
            raise
        self._timed = _TimedSocket(sock)
        self._http = http.client.HTTPConnection(access.host, access.port)
        self._http.sock = self._timed  # of a socket, http.client uses these three methods

    @property
    def is_open(self) -> bool:
        """Whether another request may be sent."""
        return self._http.sock is not None

    def exchange(self, request: ToSend, access: Access, deadline: float) -> HttpAnswer:
        """Raises TimeoutError, OSError, HTTPException, and ValueError where the reply is cut short or too large."""
        return self._whole(self._head(request, access, deadline))

    def open(self, request: ToSend, access: Access, deadline: float) -> "HttpAnswer | Pieces":
        """The same, but a reply of status 200 is not read yet: its connection is used for nothing else."""
        response = self._head(request, access, deadline)
        return Pieces(self, response) if response.status == 200 else self._whole(response)

    def until(self, deadline: float) -> None:
        """What is read from now on must come by then."""
        self._timed.deadline = deadline

    def _head(self, request: ToSend, access: Access, deadline: float) -> http.client.HTTPResponse:
        self._timed.deadline = deadline
        self._http.request("POST", access.path + request.path, request.body, {**access.headers, **request.headers})
        return self._http.getresponse()

    def _whole(self, response: http.client.HTTPResponse) -> HttpAnswer:
        if (response.length or 0) > CLIENT_REPLY_BYTES_MAX or response.getheader("content-encoding"):
            raise ValueError("too large, or encoded")
        parts: list[bytes] = []
        size = 0
        while part := response.read(CHUNK * 16):
            size += len(part)
            if size > CLIENT_REPLY_BYTES_MAX:
                raise ValueError("too large")
            parts.append(part)
        if response.length:
            raise ValueError("cut short")
        headers = {name.lower(): value for name, value in response.getheaders()}
        return HttpAnswer(response.status, headers, b"".join(parts))

    def close(self) -> None:
        self._http.close()


class Pieces:
    """A reply that is read as it comes."""

    def __init__(self, line: _Line, response: http.client.HTTPResponse) -> None:
        self._line = line
        self._response = response

    def read(self, within_s: float) -> bytes:
        """What has come; nothing at its end. Raises TimeoutError, OSError or HTTPException where it breaks."""
        self._line.until(time.monotonic() + within_s)
        return self._response.read1(CHUNK)

    def close(self) -> None:
        """No more is wanted."""
        self._line.close()


class _TimedSocket:
    """A socket whose every read and write ends at the deadline: a socket's own timeouts begin anew at each byte."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.deadline = 0.0

    def sendall(self, data: Any) -> None:
        rest = memoryview(data)
        while rest:
            self._sock.settimeout(_left_s(self.deadline))
            rest = rest[self._sock.send(rest[:CHUNK]) :]

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self), CHUNK)

    def raw(self) -> socket.SocketIO:
        return self._sock.makefile("rb", buffering=0)

    def arm(self) -> None:
        self._sock.settimeout(_left_s(self.deadline))

    def close(self) -> None:
        self._sock.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket) -> None:
        self._timed = timed
        self._raw = timed.raw()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._timed.arm()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left_s(deadline: float) -> float:
    """Seconds until then. Raises TimeoutError."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
