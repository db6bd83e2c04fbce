"""Before a node's address is used, whoever answers there shows that it is that node; the visit has a bound."""

import asyncio
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from embedmesh.gateway.nodes import registration
from embedmesh.rules.membership import CHALLENGE, ChallengeAnswer
from embedmesh.signing.identity import Identity, verify
from tests.gateway.mesh import Applicant, Gateway, Script, gateway, memory_folder, says, somebody, until
from tests.http.raw import Raw, request, send

pytestmark = pytest.mark.asyncio(loop_scope="module")


def ca_certificate(applicant: Applicant) -> bytes:
    """One that says it vouches for others."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    return built.sign(key, SHA256()).public_bytes(Encoding.DER)


CERTIFICATES: list[tuple[str, Callable[[Applicant], bytes]]] = [
    ("none", lambda one: b""),
    ("one that vouches for others", ca_certificate),
    ("garbage", lambda one: b"garbage" * 100),
    ("PEM", lambda one: b"-----BEGIN CERTIFICATE-----\n"),
    ("half of it", lambda one: one.certificate[:200]),
    ("two", lambda one: one.certificate * 2),
]


@pytest.mark.parametrize("make", [make for _, make in CERTIFICATES], ids=[name for name, _ in CERTIFICATES])
async def test_a_certificate_that_cannot_be_pinned_is_refused(
    gw: Gateway, applicant: Applicant, make: Callable[[Applicant], bytes]
) -> None:
    """Before anybody is connected to."""

    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("the gateway connected")

    async with somebody(nobody) as port:
        reply = await applicant.ask(await gw.invite(), address=f"https://127.0.0.1:{port}", certificate=make(applicant))
    says(reply, 400, "certificate")


def says_always(raw: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()

    return script


def http(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


SIGNED_JUNK = msgspec.json.encode({"signature": Identity(bytes(32)).sign(CHALLENGE, b"anything")})

ANSWERS = {
    "a redirect": http(b"", "302 Found", "Location: https://node.example/v1/challenge\r\n"),
    "a permanent redirect": http(b"", "308 Permanent Redirect", "Location: /v1/challenge\r\n"),
    "a web page": http(b"<html>It works!</html>"),
    "somebody else's signature": http(SIGNED_JUNK),
    "a signature with another status": http(SIGNED_JUNK, "201 Created"),
    "an empty answer": http(b""),
    "an answer nested without end": http(b"[" * 4_000),
    "a large answer": http(b" " * 100_000),
    "an answer without end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096,
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("said", ANSWERS.values(), ids=ANSWERS)
async def test_an_address_where_another_answers_is_refused(gw: Gateway, applicant: Applicant, said: bytes) -> None:
    """With the right certificate even: what counts is the identity. One message for all: it is no port scanner."""
    async with somebody(says_always(said), applicant.tls) as port:
        place = {"address": f"https://127.0.0.1:{port}", "certificate": applicant.certificate}
        says(await applicant.ask(await gw.invite(), **place), 400, "Nobody answers at the node's address as the node")
    assert gw.node(applicant.node_id) is None


async def test_an_address_that_does_not_answer_keeps_nobody_waiting(
    gw: Gateway, applicant: Applicant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is slow at: the whole visit has a bound."""
    monkeypatch.setattr(registration, "CHALLENGE_S", 0.1)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in http(SIGNED_JUNK):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    invite = await gw.invite()
    for script, tls in ((hang, None), (hang, applicant.tls), (drip, applicant.tls)):
        async with somebody(script, tls) as port:
            place = {"address": f"https://127.0.0.1:{port}", "certificate": applicant.certificate}
            async with asyncio.timeout(1):
                says(await applicant.ask(invite, **place), 400, "Nobody answers")


async def test_no_more_than_a_few_addresses_are_visited_at_one_time(
    gw: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further registrations wait for their turn."""
    monkeypatch.setattr(registration, "CHALLENGE_S", 0.1)
    there = most = 0

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal there, most
        there += 1
        most = max(most, there)
        try:
            await reader.read()
        finally:
            there -= 1

    async with somebody(hang) as port:

        async def ask(number: int) -> Raw:
            one = Applicant(gw, tmp_path, f"n{number}")
            place = {"address": f"https://127.0.0.1:{port}", "certificate": one.certificate}
            return await one.ask(await gw.invite(), **place)

        replies = await asyncio.gather(*(ask(number) for number in range(12)))
    assert {reply.status for reply in replies} == {400}
    assert 1 < most <= registration.ADDRESS_CHECKS_MAX


@pytest.mark.parametrize(
    "how", ["not listening", "another certificate", "plain", "another gateway's", "another address"]
)
async def test_its_own_address_said_wrongly_is_refused(
    gw: Gateway, applicant: Applicant, tmp_path: Path, how: str
) -> None:
    """The node is there, and something about it is not as it was registered."""
    place: dict[str, Any] = {"certificate": applicant.certificate}
    believes = {
        "another gateway's": {"gateway": "somebody else's"},
        "another address": {"address": "https://node.example"},
    }
    async with applicant.listening(plain=how == "plain", **believes.get(how, {})) as address:
        place["address"] = address.replace("http:", "https:")
        if how == "another certificate":
            place["certificate"] = Applicant(gw, tmp_path, "other").certificate
        if how == "not listening":
            async with somebody(says_always(b"")) as port:
                pass
            place["address"] = f"https://127.0.0.1:{port}"
        says(await applicant.ask(await gw.invite(), **place), 400, "Nobody answers")


async def test_the_address_of_another_node_is_refused(gw: Gateway, applicant: Applicant, tmp_path: Path) -> None:
    """Even with that node's certificate, which anybody may see: the one who answers there signs as itself."""
    victim = Applicant(gw, tmp_path, "victim")
    async with victim.member():
        says(await applicant.ask(await gw.invite(), **victim.place), 400, "Nobody answers")
        await gw.answers_rightly(victim.node_id)


async def test_plain_http_is_taken_inside_a_network_of_the_allow_list(gw: Gateway, applicant: Applicant) -> None:
    """It needs no certificate there, and every message is signed all the same."""
    async with applicant.listening(plain=True) as address:
        await applicant.join(await gw.invite(), address=address)
        await gw.until_ready(applicant.node_id)
        await gw.answers_rightly(applicant.node_id)
        assert gw.roster.record(applicant.node_id).certificate == b""


async def test_a_stranger_cannot_make_a_node_answer_its_challenge(gw: Gateway, applicant: Applicant) -> None:
    """Only its own gateway is told that it is here: a challenge is signed by the gateway's identity."""
    nonce, stranger = bytes(32), Identity(bytes(32))
    challenges = [
        (gw.identity.public_key, stranger.sign(CHALLENGE, nonce)),
        (stranger.public_key, stranger.sign(CHALLENGE, nonce)),
        (gw.identity.public_key, gw.identity.sign(CHALLENGE, b"n" * 32)),
        (gw.identity.public_key, gw.identity.sign(b"transcript", nonce)),
        (gw.identity.public_key, gw.identity.sign(CHALLENGE, nonce)),
    ]
    async with applicant.listening(plain=True) as address:
        port = int(address.rpartition(":")[2])
        replies = [
            await send(
                port,
                request(
                    "POST",
                    "/v1/challenge",
                    msgspec.json.encode({"nonce": nonce, "gateway_key": key, "signature": signature}),
                    key=None,
                ),
            )
            for key, signature in challenges
        ]
    assert [reply.status for reply in replies] == [401] * 4 + [200]
    answer = msgspec.json.decode(replies[-1].body, type=ChallengeAnswer)
    assert verify(applicant.identity.public_key, CHALLENGE, nonce + address.encode(), answer.signature)


async def test_challenges_of_strangers_are_few_and_keep_no_room_of_the_gateways_work(
    gw: Gateway, applicant: Applicant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half ones take of a room of their own, and a flood of them is refused before a signature is looked at."""
    monkeypatch.setattr("embedmesh.node.signed_api.CHALLENGES_A_MINUTE_MAX", 10)
    junk = request("POST", "/v1/challenge", b'{"nonce":1}', key=None)
    async with applicant.listening(plain=True) as address:
        port, door = int(address.rpartition(":")[2]), applicant.door
        _, half = await asyncio.open_connection("127.0.0.1", port)
        half.write(junk[:-1])
        await until("half of it has come", lambda: door._challenge_bodies.taken == 10)
        assert door.bodies.taken == 0
        said = [(await send(port, junk)).status for _ in range(12)]
        assert said == [400] * said.count(400) + [503] * said.count(503)
        assert 0 < said.count(400) < 8
        half.close()


async def test_plain_http_outside_the_allow_list_is_refused(gw: Gateway, applicant: Applicant) -> None:
    """Whoever is there; and without an allow-list neither is https on such a network. Nobody is connected to."""

    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("the gateway connected")

    invite = await gw.invite()
    says(await applicant.ask(invite, address="http://93.184.216.34"), 400, "Plain http is not permitted there")
    with memory_folder() as folder:
        async with somebody(nobody) as port, gateway(folder, networks=()) as strict:
            applicant.gateway = strict
            place = {"address": f"https://127.0.0.1:{port}", "certificate": applicant.certificate}
            says(await applicant.ask(await strict.invite(), **place), 400, "a loopback address")
            place["address"] = f"http://127.0.0.1:{port}"
            says(await applicant.ask(await strict.invite(), **place), 400, "a loopback address")
