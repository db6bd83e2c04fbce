"""The parts of the bench of generation: its node says what is asked for, its readers note all of it."""

import asyncio

import pytest

from bench.generation.contenders import DIRECT, OURS
from bench.generation.figures import Row, Turn, targets_of
from bench.generation.node import CheapNode, Spoken
from bench.generation.readers import Alone, Target, Together, alone, connected, together


async def listening() -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(CheapNode, "127.0.0.1", 0)


async def test_a_stream_is_as_it_was_asked_for() -> None:
    async with await listening() as server:
        target = Target(server.sockets[0].getsockname()[1], "scripted")
        reader = await connected(target.port)
        for spoken in Spoken(40, 0.002), Spoken(1_000), Spoken(2, text_bytes=500):
            await reader.ask(target.request(spoken))
            assert len(reader.delays) == len(reader.ways) == spoken.events
            assert all(0 <= way <= delay + 1e-6 for way, delay in zip(reader.ways, reader.delays, strict=True))
            assert reader.first_s > 0
        reader.close()
        found = await alone(target, 2, Spoken(5, 0.001))
        assert found.first_p50_ms > 0 and 0 < found.event_p50_ms <= found.event_p99_ms


async def test_streams_that_run_together_are_all_read() -> None:
    async with await listening() as server:
        target = Target(server.sockets[0].getsockname()[1], "scripted")
        found = await together(target, 3, Spoken(70, 0.02), lambda: 0.0)
    assert found.cpu_us == 0 and 0 < found.in_time <= 1


async def test_what_is_no_stream_is_not_measured() -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        target = Target(server.sockets[0].getsockname()[1], "scripted")
        with pytest.raises(RuntimeError, match="503"):
            await alone(target, 1, Spoken(1))


def row(name: str, *firsts: float) -> Row:
    together = Together(1.0, 2.0, 1.0, 30.0, 0.3)
    return Row.of(name, [Turn(Alone(first, 0.2, 0.3), together, 0.1) for first in firsts])


def test_targets_are_of_the_best_rounds_of_both() -> None:
    rows = {DIRECT: row(DIRECT, 0.5, 0.1), OURS: row(OURS, 9.0, 2.0)}
    first, *others = targets_of(rows, 300.0)
    assert first.found is not None and first.found.median == pytest.approx(1.9)
    assert [each.verdict for each in others] == ["reached"] * 4 + ["missed"]
    assert targets_of({OURS: rows[OURS]}, None)[0].verdict == "not measured"
