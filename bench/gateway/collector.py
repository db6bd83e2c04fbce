"""Takes traces and throws them away: `python -m bench.gateway.collector` prints its port, then listens on loopback."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bench.gateway.measure import OTHER_CORE
from bench.rig.processes import HOST


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def collecting() -> Iterator[str]:
    """Its URL, while it runs beside the clients."""
    command = ["taskset", "--cpu-list", str(OTHER_CORE), sys.executable, "-m", "bench.gateway.collector"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://{HOST}:{int(process.stdout.readline())}"
        finally:
            process.kill()


if __name__ == "__main__":
    with ThreadingHTTPServer((HOST, 0), _Sink) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
