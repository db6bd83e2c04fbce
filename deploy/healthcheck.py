"""Exit code 0 if a gateway or a node of this container answers `GET /health`; it needs neither curl nor a shell.

A gateway, `serve` and a node with --standalone listen on EMBEDMESH_PORT, every node on EMBEDMESH_MONITOR.
"""

import os
import socket
import sys

ANSWER_S = 15.0  # less than the runtime waits for us, so that we end by ourselves
PORT = 8080


def answers(host: str, port: int) -> bool:
    """Whether something there says 200."""
    try:
        with socket.create_connection((host, port), ANSWER_S) as sock:
            sock.settimeout(ANSWER_S)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return sock.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def main() -> int:
    """0 or 1, as Docker has it."""
    ports = [os.environ.get("EMBEDMESH_PORT") or str(PORT), os.environ.get("EMBEDMESH_MONITOR", "").rpartition(":")[2]]
    return 0 if any(answers("127.0.0.1", int(port)) for port in ports if port.isdecimal()) else 1


if __name__ == "__main__":
    sys.exit(main())
