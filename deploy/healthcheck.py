"""Exit code 0 if a gateway or a node of this container answers `GET /health`; it needs neither curl nor a shell.

A gateway, `serve` and a node with --standalone listen on EMBEDMESH_PORT, every node on EMBEDMESH_MONITOR. Where plain
HTTP is not spoken TLS is, with a certificate for another name than ours: it is not checked, as nothing is told.
"""

import os
import socket
import ssl
import sys
import time

ANSWER_S = 15.0  # of each port, less than the runtime waits for us, so that we end by ourselves
PORT = 8080


def answers(host: str, port: int) -> bool:
    """Whether something there says 200."""
    until = time.monotonic() + ANSWER_S
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    return _says_200(host, port, until, None) or _says_200(host, port, until, unchecked)


def _says_200(host: str, port: int, until: float, tls: ssl.SSLContext | None) -> bool:
    try:
        with (
            socket.create_connection((host, port), max(0.1, until - time.monotonic())) as plain,
            plain if tls is None else tls.wrap_socket(plain) as sock,
        ):
            sock.settimeout(max(0.1, until - time.monotonic()))
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return sock.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError:  # ssl.SSLError is one
        return False


def main() -> int:
    """0 or 1, as Docker has it."""
    ports = [os.environ.get("EMBEDMESH_PORT") or str(PORT), os.environ.get("EMBEDMESH_MONITOR", "").rpartition(":")[2]]
    return 0 if any(answers("127.0.0.1", int(port)) for port in ports if port.isdecimal()) else 1


if __name__ == "__main__":
    sys.exit(main())
