"""The conformance matrix: no row of it can be kept by a gateway that answers anything, or that refuses everything."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from bench.conformance.__main__ import ROWS
from bench.conformance.bed import Bed
from bench.conformance.caller import Target
from bench.conformance.node import ConformanceNode, Truth
from bench.conformance.page import PAGE
from bench.conformance.peers import three_nodes
from bench.conformance.row import tried
from tests.data import model_folder

VECTORS = b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.1,0.2,0.3]}]}'
REFUSAL = b'{"error":"no"}'


@contextmanager
def answering(status: int, body: bytes, node: ConformanceNode) -> Iterator[int]:
    """A gateway that says the same to everything, as if it had asked the first node."""

    class SaysTheSame(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            node.met += 1
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), SaysTheSame)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.model
@pytest.mark.parametrize(("status", "body"), [(200, VECTORS), (500, REFUSAL), (400, REFUSAL)])
def test_no_row_is_kept_by_a_gateway_that_says_the_same_to_everything(status: int, body: bytes) -> None:
    with ExitStack() as stack:
        truth = Truth(model_folder())
        first, second, third = three_nodes(stack, truth)
        port = stack.enter_context(answering(status, body, first))
        bed = Bed(Target(port, "sk-key"), first, second, third, truth, keys=True, money=lambda: (0, 0), repeats=True)
        found = {row.promise: tried(row, bed) for row in ROWS}
    kept = {promise: cell for promise, cell in found.items() if cell.state != "broken"}
    if status == 400:
        kept = {promise: cell for promise, cell in kept.items() if "refused" not in promise}
    assert kept == {}


def test_each_row_has_words_of_its_own_and_is_on_the_page() -> None:
    promises = [row.promise for row in ROWS]
    assert len(set(promises)) == len(promises)
    lines = PAGE.read_text().splitlines()
    shown = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert [promise for promise in promises if promise not in shown] == []
