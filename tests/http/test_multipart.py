"""Forms as clients send them, part by part; and whatever is no form, which is refused without being kept."""

import asyncio
import time
from contextlib import aclosing

import pytest
from aiohttp import web

from embedmesh.http import multipart
from embedmesh.http.bodies import json_reply
from embedmesh.http.multipart import form_parts
from embedmesh.http.server import HttpServer
from tests.http.raw import Raw, read_reply, request, send, serving

LIMIT = 300_000
TYPE = "multipart/form-data; boundary=XyZ"


class Taken:
    """A route that says what parts it got."""

    def __init__(self) -> None:
        self.bugs = 0
        self.largest = 0
        self.server = HttpServer({"/form": {"POST": self.take}}, on_internal_error=self.bug)

    def bug(self) -> None:
        self.bugs += 1

    async def take(self, asked: web.BaseRequest) -> web.StreamResponse:
        found: list[list[object]] = []
        async with aclosing(form_parts(asked, LIMIT)) as parts:
            async for part in parts:
                if part.filename is None:
                    found.append([part.name, None, await part.text(64)])
                    continue
                size, last = 0, b""
                async for piece in part.pieces:
                    self.largest = max(self.largest, len(piece))
                    size, last = size + len(piece), piece
                found.append([part.name, part.filename, size, last[-3:].decode("latin-1")])
        return json_reply(found)


def part(name: str, value: bytes, *, filename: str | None = None, more: str = "") -> bytes:
    quoted = "" if filename is None else f'; filename="{filename}"'
    head = f'--XyZ\r\nContent-Disposition: form-data; name="{name}"{quoted}\r\n{more}\r\n'
    return head.encode() + value + b"\r\n"


END = b"--XyZ--\r\n"
PURPOSE, FILE = part("purpose", b"batch"), part("file", b'{"a":1}\n' * 3, filename="a.jsonl")


async def ask(body: bytes, taken: Taken | None = None, /, *, content_type: str = TYPE, **headers: str) -> Raw:
    taken = taken or Taken()
    async with serving(taken.server) as port:
        reply = await send(port, request("POST", "/form", body, content_type=content_type, **headers))
    assert taken.bugs == 0
    return reply


@pytest.mark.parametrize(
    ("body", "found"),
    {
        "fields first": (PURPOSE + FILE + END, b'[["purpose",null,"batch"],["file","a.jsonl",24,"1}\\n"]]'),
        "the file first": (FILE + PURPOSE + END, b'[["file","a.jsonl",24,"1}\\n"],["purpose",null,"batch"]]'),
        "an empty file": (part("file", b"", filename="a") + END, b'[["file","a",0,""]]'),
        "no line break at the end": (PURPOSE + END[:-2], b'[["purpose",null,"batch"]]'),
        "a preamble": (b"ignored\r\n" + PURPOSE + END, b'[["purpose",null,"batch"]]'),
        "line breaks at the end of the file": (
            part("file", b"x\r\n\r\n", filename="a") + END,
            b'[["file","a",5,"\\n\\r\\n"]]',
        ),
        "a type and a name": (
            part("file", b"x", filename="a b.txt", more="Content-Type: text/plain\r\n") + END,
            b'[["file","a b.txt",1,"x"]]',
        ),
        "no part": (END, b"[]"),
    }.values(),
)
async def test_parts_come_in_their_order(body: bytes, found: bytes) -> None:
    reply = await ask(body)
    assert (reply.status, reply.body) == (200, found)


async def test_a_name_in_another_alphabet() -> None:
    """As curl and RFC 7578 write it (UTF-8), and as some clients do (RFC 5987)."""
    for written in ('filename="Anfragen-ü.jsonl"', "filename*=UTF-8''Anfragen-%C3%BC.jsonl"):
        body = f'--XyZ\r\nContent-Disposition: form-data; name="file"; {written}\r\n\r\nx\r\n'.encode() + END
        reply = await ask(body)
        assert reply.body.decode() == '[["file","Anfragen-ü.jsonl",1,"x"]]'


async def test_a_large_file_comes_in_pieces() -> None:
    taken = Taken()
    reply = await ask(part("file", b"x" * 250_000, filename="a") + END, taken)
    assert reply.body == b'[["file","a",250000,"xxx"]]'
    assert taken.largest <= 2 * multipart.PIECE_BYTES


MALFORMED = {
    "broken off in a part": PURPOSE + FILE[:-10],
    "broken off between parts": PURPOSE,
    "another boundary": PURPOSE.replace(b"XyZ", b"Abc") + END.replace(b"XyZ", b"Abc"),
    "a longer boundary in the file": part("file", b"a\r\n--XyZtra\r\nb", filename="a") + END,
    "a part without a name": b"--XyZ\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
    "a part without a head": b"--XyZ\r\n\r\nx\r\n" + END,
    "a head without a colon": b"--XyZ\r\nrubbish\r\n\r\nx\r\n" + END,
    "a long header": b"--XyZ\r\nX-A: " + b"a" * 10_000 + b"\r\n\r\nx\r\n" + END,
    "many headers": b"--XyZ\r\n" + b"X-A: a\r\n" * 100 + b"\r\nx\r\n" + END,
    "base64": part("file", b"eA==", filename="a", more="Content-Transfer-Encoding: base64\r\n") + END,
    "a form within a form": part("file", b"x", more="Content-Type: multipart/mixed; boundary=In\r\n") + END,
    "more behind the end": PURPOSE + END + b"more\r\nand more\r\nand more\r\n",
    "a charset that there is not": part("_charset_", b"x" * 64) + END,
    "nothing": b"",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_no_form_is_refused(body: bytes) -> None:
    reply = await ask(body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_value")
    assert "form" in reply.error["message"]


@pytest.mark.parametrize(
    ("content_type", "more", "status"),
    [
        ("application/json", {}, 415),
        ("multipart/mixed; boundary=XyZ", {}, 415),
        ("multipart/form-data", {}, 400),
        (f"multipart/form-data; boundary={'x' * 80}", {}, 400),
        (TYPE, {"Content_Encoding": "gzip"}, 415),
    ],
)
async def test_what_is_not_sent_as_a_form_is_refused(content_type: str, more: dict[str, str], status: int) -> None:
    assert (await ask(PURPOSE + END, content_type=content_type, **more)).status == status


async def test_a_body_that_is_too_large_is_refused_by_its_length_or_its_bytes() -> None:
    large = part("file", b"x" * (LIMIT + 1), filename="a") + END
    assert (await ask(large)).status == 413
    taken = Taken()
    async with serving(taken.server) as port:
        head = f"POST /form HTTP/1.1\r\nHost: a\r\nContent-Type: {TYPE}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        reply = await send(port, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(large), large))
    assert reply.status == 413


async def test_endless_lines_before_the_first_boundary_count_too() -> None:
    assert (await ask(b"line\r\n" * (LIMIT // 6 + 1) + PURPOSE + END)).status == 413


async def test_a_small_field_stays_small() -> None:
    reply = await ask(part("purpose", b"x" * 65) + END)
    assert (reply.status, reply.error["param"]) == (400, "purpose")
    reply = await ask(part("purpose", b"\xff") + END)
    assert "UTF-8" in reply.error["message"]


async def test_a_client_that_waits_for_100_continue_gets_it() -> None:
    taken, body = Taken(), PURPOSE + END
    async with serving(taken.server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("POST", "/form", body, content_type=TYPE, Expect="100-continue")[: -len(body)])
        async with asyncio.timeout(5):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await read_reply(reader)).status == 200
        writer.close()


async def test_a_body_that_drips_is_given_up_and_one_that_comes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace is that of the whole body: each byte in time is not enough."""
    monkeypatch.setattr(multipart, "REQUEST_BODY_S", 0.3)
    monkeypatch.setattr(multipart, "UPLOAD_BYTES_A_SECOND_MIN", 10_000)
    taken = Taken()
    async with serving(taken.server) as port:
        body = part("file", b"x" * 50_000, filename="a") + END
        for piece_bytes, pause_s, status in ((10, 0.05, 408), (5_000, 0.1, 200)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            raw = request("POST", "/form", body, content_type=TYPE)
            began, at = time.monotonic(), 0
            reading = asyncio.ensure_future(read_reply(reader))
            while at < len(raw) and not reading.done():
                writer.write(raw[at : at + piece_bytes])
                at += piece_bytes
                await asyncio.sleep(pause_s)
            assert (await asyncio.wait_for(reading, 10)).status == status
            assert status == 200 or time.monotonic() - began < 10
            writer.close()
    assert taken.bugs == 0
