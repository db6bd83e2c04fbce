"""No registration makes a gateway connect where it must not: canaries listen there, and hear nothing."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.rules.membership import Standing
from embedmesh.signing import atoma
from embedmesh.signing.invites import Invite
from tests.fleet.hostile_addresses import FORBIDDEN, HOSTILE, scripted_lookup
from tests.gateway.mesh import Applicant, Gateway, gateway, memory_folder, says, somebody
from tests.http.raw import Raw, read_reply, request, send

LOOPBACKS = ("127.0.0.1", "127.0.0.53", "127.255.255.254", "::1")
USUAL_PORTS = (80, 443, 8000, 8443, 6379, 11211)  # of the list: listened on where this machine lets us
AT_ONE_TIME = 6  # nodes that try
PORT = re.compile(r":(?:443|80|8000|8443|6379|11211)(?=/?$)")


class Canaries:
    """Listening sockets that take no connection: one that comes waits in the backlog, and is counted at the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._sockets: list[socket.socket] = []
        self.port = self._listen("127.0.0.1", 0)
        for host in LOOPBACKS:
            for port in (self.port, *USUAL_PORTS):
                self._listen(host, port)

    def _listen(self, host: str, port: int) -> int:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            sock = self._stack.enter_context(socket.create_server((host, port), family=family))
        except OSError:  # taken, or not for us, or no IPv6 here
            return port
        sock.setblocking(False)
        self._sockets.append(sock)
        return int(sock.getsockname()[1])

    def heard(self) -> list[str]:
        """Where somebody connected to."""
        found = []
        for sock in self._sockets:
            try:
                sock.accept()[0].close()
            except BlockingIOError:
                continue
            found.append(str(sock.getsockname()))
        return found

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def canaries() -> Iterator[Canaries]:
    made = Canaries()
    hosts = {sock.getsockname()[0] for sock in made._sockets}
    assert {"127.0.0.1", "127.0.0.53"} <= hosts
    yield made
    made.close()


def towards(canaries: Canaries, addresses: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each as it is; and where it has a usual port, or could have one, with the canaries'."""
    found = [(address, why) for address, why in addresses if address]  # without one a node dials out
    return found + [
        (f"{PORT.sub('', address).rstrip('/')}:{canaries.port}", why)
        for address, why in found
        if (address, why) in FORBIDDEN or "127" in address or "localhost" in address
    ]


@pytest.fixture
async def strict() -> AsyncIterator[Gateway]:
    """A gateway whose allow-list is empty, and whose resolver is the hostile list's."""
    with memory_folder() as folder:
        async with gateway(folder, networks=(), lookup=scripted_lookup) as made:
            yield made


class Insistent:
    """An invited node that registers again and again, each time rightly in every way but for its address."""

    def __init__(self, one: Applicant, invite: Invite, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._one = one
        self._invite = invite
        self._reader, self._writer = reader, writer

    async def register(self, address: str) -> Raw:
        """The gateway's answer, on a connection that is kept."""
        statement = self._one.statement(address="", certificate=self._one.certificate)
        text = json.dumps(msgspec.to_builtins(statement) | {"address": address})  # also what is no Unicode
        self._writer.write(
            request(
                "POST", "/v1/nodes", msgspec.json.encode(self._one.signed_by_it(text.encode(), self._invite)), key=None
            )
        )
        return await read_reply(self._reader)


@asynccontextmanager
async def insistent(at: Gateway, folder: Path) -> AsyncIterator[Insistent]:
    reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
    yield Insistent(Applicant(at, folder), await at.invite(), reader, writer)
    writer.close()


async def test_a_canary_would_hear(canaries: Canaries) -> None:
    """Or silence would prove nothing."""
    _, writer = await asyncio.open_connection("127.0.0.1", canaries.port)
    writer.close()
    assert len(canaries.heard()) == 1
    assert canaries.heard() == []


async def test_no_hostile_address_is_connected_to(strict: Gateway, canaries: Canaries, tmp_path: Path) -> None:
    """Every one is refused with 400, of a node that was invited, that signed it, and that has a good certificate.

    A refusal is no resolver for others either: it says what kind of address it is, and no IP.
    """
    assert len({address for address, _ in HOSTILE}) >= 60
    said = set()

    async def try_all(addresses: Sequence[tuple[str, str]], folder: Path) -> None:
        folder.mkdir()
        async with insistent(strict, folder) as node:
            for address, why in addresses:
                reply = await node.register(address)
                assert (reply.status, reply.error["code"]) == (400, "invalid_value"), (address, why)
                assert canaries.heard() == [], (address, why)
                said.add(str(reply.error["message"]))

    addresses = towards(canaries, HOSTILE)
    await asyncio.gather(*(try_all(addresses[at::AT_ONE_TIME], tmp_path / str(at)) for at in range(AT_ONE_TIME)))
    assert not [words for words in said if re.search(r"\d+\.\d+\.\d+|[0-9a-f]+:[0-9a-f:]+", words)]
    assert len(said) > 20
    assert strict.roster.records() == []
    assert list(strict.registry) == []


async def test_nor_by_the_form_of_atoma(strict: Gateway, canaries: Canaries, tmp_path: Path) -> None:
    """Of a node that is admitted: it stays where it was."""
    one = Applicant(strict, tmp_path)
    await one.join(await strict.invite())
    record = msgspec.structs.replace(strict.roster.record(one.node_id), certificate=one.certificate)
    await strict.store.nodes.save(record)  # or it would be refused for having none
    await strict.roster.reload()
    record = strict.roster.record(one.node_id)
    for address, why in towards(canaries, FORBIDDEN)[::3]:
        data = {"node_small_id": one.welcome.small_id, "public_address": address, "country": "DE"}
        body = json.dumps({"data": data, "signature": atoma.sign(one.identity, data)}).encode()
        reply = await send(strict.port, request("POST", "/v1/nodes", body, key=None))
        assert reply.status == 400, (address, why)
        assert str(reply.error["message"]).startswith("The address is refused."), (address, why)
    assert canaries.heard() == []
    assert strict.roster.record(one.node_id) == record


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_good_nodes_redirect_is_not_followed(canaries: Canaries, tmp_path: Path, status: int) -> None:
    """An address that is permitted sends the gateway on to one that is not."""
    targets = [f"https://127.0.0.1:{canaries.port}/v1/challenge", f"http://[::1]:{canaries.port}/", "/v1/challenge"]
    said: list[str] = []

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        said.append(targets[len(said)])
        writer.write(f"HTTP/1.1 {status} X\r\nLocation: {said[-1]}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()

    with memory_folder() as folder:
        async with gateway(folder) as gw:
            one, invite = Applicant(gw, tmp_path), await gw.invite()
            async with somebody(redirect, one.tls) as port:
                for _ in targets:
                    place: dict[str, Any] = {"address": f"https://127.0.0.1:{port}", "certificate": one.certificate}
                    says(await one.ask(invite, **place), 400, "Nobody answers")
    assert said == targets  # each was visited once
    assert canaries.heard() == []


class Rebinding:
    """A resolver whose first answer is good, and every later one is loopback: it hopes to be asked twice."""

    def __init__(self, first: Sequence[str]) -> None:
        self._answers = [first]
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self._answers.pop() if self._answers else ["127.0.0.1"]


ELSEWHERE = "127.0.0.2"  # plays the public address: the allow-list names just that one


async def test_a_name_is_looked_up_once_and_its_answer_kept(canaries: Canaries, tmp_path: Path) -> None:
    """For the challenge, for every call, over a restart: the IP that was judged, whatever the name says now."""
    lookup = Rebinding([ELSEWHERE])
    with memory_folder() as folder:
        async with gateway(folder, networks=(f"{ELSEWHERE}/32",), lookup=lookup) as gw:
            one = Applicant(gw, tmp_path)
            async with one.listening(host=ELSEWHERE, port=canaries.port):
                one.believe(f"https://rebinding.example:{canaries.port}")
                await one.join(await gw.invite(), **one.place)
                await gw.until_ready(one.node_id)
                await gw.answers_rightly(one.node_id)
                assert gw.roster.record(one.node_id).ip == ELSEWHERE
                await gw.end()
                async with gateway(folder, networks=(f"{ELSEWHERE}/32",), lookup=lookup) as again:
                    await again.until_ready(one.node_id)
                    await again.answers_rightly(one.node_id)
                    assert lookup.asked == 1
                    one.gateway = again
                    says(await one.ask(**one.place), 400, "resolves to a loopback address")
                    assert again.roster.record(one.node_id).standing is Standing.ADMITTED
                    await again.answers_rightly(one.node_id)
    assert lookup.asked == 2
    assert canaries.heard() == []


async def test_a_second_answer_is_not_asked_for_where_the_first_leads_nowhere(
    canaries: Canaries, tmp_path: Path
) -> None:
    """Nobody listens at the good one: that is a refusal, and no reason to look again. All answers must be good."""
    with memory_folder() as folder:
        for first, words in (
            ([ELSEWHERE], "Nobody answers"),
            ([ELSEWHERE, "127.0.0.1"], "a loopback address"),
            ([ELSEWHERE, "::1"], "a loopback address"),
        ):
            lookup = Rebinding(first)
            async with (
                gateway(folder, networks=(f"{ELSEWHERE}/32",), lookup=lookup) as gw,
                insistent(gw, tmp_path) as node,
            ):
                says(await node.register(f"https://rebinding.example:{canaries.port}"), 400, words)
            assert lookup.asked == 1
    assert canaries.heard() == []
