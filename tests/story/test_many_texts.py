"""Many texts by our own client at `embedmesh serve`: as plain calls give it, charged once, whatever breaks."""

import asyncio
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from embedmesh.client import AsyncClient, BulkProgress, Client
from tests.story.endpoint import MODEL, SAME, Endpoint, Vectors, run_json

TEXTS = [f"text {number} of a library" for number in range(120)]  # few and short: the node shares its cores


class Cutter:
    """Stands between client and gateway, and closes connections: before a reply, or in the middle of it."""

    def __init__(self, port: int, *, in_reply: bool) -> None:
        self._port = port
        self._in_reply = in_reply
        self._dice = random.Random(19)
        self.cuts = 0

    @contextmanager
    def running(self) -> Iterator[str]:
        """The base URL by which it is asked."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            listener.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                gateway = socket.create_connection(("127.0.0.1", self._port))
                for one, other in ((caller, gateway), (gateway, caller)):
                    threading.Thread(target=self._pump, args=(one, other, one is gateway), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(2_048):
                # a reply comes in five pieces or more, a request in one
                cut = is_reply == self._in_reply and self._dice.random() < (0.1 if is_reply else 0.3)
                sink.sendall(data[: len(data) // 2] if cut and is_reply else data)
                if cut:
                    self.cuts += 1
                    break
            for each in (source, sink):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def plain(endpoint: Endpoint) -> Vectors:
    return np.concatenate([endpoint.embed(TEXTS[at : at + 50]) for at in range(0, len(TEXTS), 50)])


@pytest.fixture(scope="module")
def cost_nanousd(endpoint: Endpoint, plain: Vectors) -> int:
    """Of the texts, four a request, as the gateway says; and the vectors are those of plain calls."""
    told: list[BulkProgress] = []
    with Client(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        found = client.embed(TEXTS, model=MODEL, batch_size=4, progress=told.append)
        streamed = np.concatenate([vectors for _, vectors in client.embed_stream(iter(TEXTS), model=MODEL)])
        narrow = client.embed(TEXTS[:50], model=MODEL, dimensions=64)
    assert np.abs(found - plain).max() < SAME and np.abs(streamed - plain).max() < SAME
    assert narrow.shape == (50, 64)
    return told[-1].cost_nanousd


def embed_cut_off(endpoint: Endpoint, cutter: Cutter, *, idempotent: bool) -> tuple[Vectors, int]:
    """The vectors that come by way of the cutter, and what was charged."""

    async def run(base_url: str) -> Vectors:
        async with AsyncClient(base_url=base_url, api_key=endpoint.api_key) as client:
            return await client.embed(TEXTS, model=MODEL, batch_size=4, concurrency=4, idempotent=idempotent)

    before = endpoint.account().balance_nanousd
    with cutter.running() as base_url:
        found = asyncio.run(run(base_url))
    assert cutter.cuts >= 3
    return found, before - endpoint.account().balance_nanousd


@pytest.mark.parametrize("in_reply", [False, True], ids=["before the reply", "in the reply"])
def test_with_keys_what_is_cut_off_is_charged_once(
    endpoint: Endpoint, plain: Vectors, cost_nanousd: int, in_reply: bool
) -> None:
    cutter = Cutter(endpoint_port(endpoint), in_reply=in_reply)
    found, charged_nanousd = embed_cut_off(endpoint, cutter, idempotent=True)
    assert np.abs(found - plain).max() < SAME
    assert charged_nanousd == cost_nanousd


def test_without_keys_a_cut_costs_one_request_at_most(endpoint: Endpoint, plain: Vectors, cost_nanousd: int) -> None:
    """None, where the gateway learns of it; one, where the system's buffers had taken the whole reply."""
    cutter = Cutter(endpoint_port(endpoint), in_reply=False)
    found, charged_nanousd = embed_cut_off(endpoint, cutter, idempotent=False)
    assert np.abs(found - plain).max() < SAME
    request_nanousd = cost_nanousd * 4 // len(TEXTS)
    assert cost_nanousd <= charged_nanousd <= cost_nanousd + (request_nanousd + 100) * cutter.cuts


def endpoint_port(endpoint: Endpoint) -> int:
    return int(endpoint.base_url.rpartition(":")[2].partition("/")[0])


def test_a_key_that_may_have_two_requests_at_one_time(endpoint: Endpoint, plain: Vectors) -> None:
    """The others are refused, wait, and become fewer."""
    options = ("--name", "two", "--concurrency", 2, "--offline", "--data-dir", endpoint.data_dir)
    key = run_json("keys", "create", *options)["key"]
    with Client(base_url=endpoint.base_url, api_key=key) as client:
        found = client.embed(TEXTS, model=MODEL, batch_size=4, concurrency=16)
    assert np.abs(found - plain).max() < SAME
