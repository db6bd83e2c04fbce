"""TLS on a server's port: versions, a renewed certificate, handshakes that nobody ends."""

import asyncio
import datetime
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from embedmesh.http.connections import Connections
from embedmesh.http.server import HttpServer
from embedmesh.http.tls import Certificate
from embedmesh.rules.errors import SetupError
from tests.data import CHECKOUT
from tests.http.raw import read_reply, request

LOCAL = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
NO_PASSPHRASE = NoEncryption()


class Pair:
    """A certificate and its key, as an operator has them, in two files. It proves itself."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key = folder / "tls.pem", folder / "tls.key"

    def write(self, name: str, encryption: KeySerializationEncryption = NO_PASSPHRASE) -> "Pair":
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(LOCAL, critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, SHA256())
        )
        self.certificate.write_bytes(made.public_bytes(Encoding.PEM))
        self.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
        return self

    def trusted(self) -> ssl.SSLContext:
        """A caller's, who trusts what the file holds now."""
        return ssl.create_default_context(cafile=str(self.certificate))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path).write("first")


@asynccontextmanager
async def serving_tls(certificate: Certificate, connections_max: int = 100) -> AsyncIterator[int]:
    async def hello(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="hello")

    connections = Connections(connections_max)
    server = HttpServer({path: {"GET": hello} for path in ("/hello", "/health")}, head_s=20.0, connections=connections)
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    await server.start(sock, certificate)
    try:
        yield sock.getsockname()[1]
    finally:
        await server.drain(0.1)


@asynccontextmanager
async def connected(port: int, context: ssl.SSLContext) -> AsyncIterator[tuple[ssl.SSLObject, asyncio.StreamReader]]:
    """A connection on which one request was answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(request("GET", "/hello"))
        async with asyncio.timeout(20):
            assert (await read_reply(reader)).body == b"hello"
        yield writer.get_extra_info("ssl_object"), reader
    finally:
        writer.close()


def name_of(tls: ssl.SSLObject) -> object:
    shown = tls.getpeercert()
    assert shown is not None
    return shown["subject"][0][0][1]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_versions_of_today_are_spoken(pair: Pair, version: ssl.TLSVersion) -> None:
    context = pair.trusted()
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with serving_tls(Certificate(pair.certificate, pair.key)) as port, connected(port, context) as (tls, _):
        assert tls.version() == version.name.replace("v1_", "v1.")
        assert tls.selected_alpn_protocol() == "http/1.1"


async def test_a_containers_health_check_asks_over_tls_whatever_the_certificate(pair: Pair) -> None:
    check = [sys.executable, str(CHECKOUT / "deploy" / "healthcheck.py")]
    async with serving_tls(Certificate(pair.certificate, pair.key)) as port:
        environment = os.environ | {"EMBEDMESH_PORT": str(port), "EMBEDMESH_MONITOR": ""}
        assert (await asyncio.to_thread(subprocess.run, check, env=environment)).returncode == 0


async def test_files_that_are_written_while_they_are_read_keep_nobody_out(pair: Pair) -> None:
    """Half a pair changes nothing, at whatever moment it is met: each connection gets a whole one."""
    certificate, written = Certificate(pair.certificate, pair.key), threading.Event()

    def write() -> None:
        while not written.is_set():
            pair.write("another")
            time.sleep(0.001)

    writer = threading.Thread(target=write)
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    async with serving_tls(certificate) as port:
        writer.start()
        try:
            for _ in range(60):
                certificate.look()
                async with connected(port, anybody):
                    pass
        finally:
            written.set()
            writer.join()


async def test_other_files_are_used_from_a_reload_on_or_nothing_changes(pair: Pair, tmp_path: Path) -> None:
    certificate = Certificate(pair.certificate, pair.key)
    (tmp_path / "new").mkdir()
    other = Pair(tmp_path / "new").write("second")
    with pytest.raises(SetupError, match="are no certificate"):
        certificate.prepare(other.certificate, pair.key)
    async with serving_tls(certificate) as port:
        apply = certificate.prepare(other.certificate, other.key)
        async with connected(port, pair.trusted()) as (tls, _):
            assert name_of(tls) == "first"
        certificate.expires_s = 1.0
        apply()
        assert certificate.expires_s > time.time()
        async with connected(port, other.trusted()) as (tls, _):
            assert name_of(tls) == "second"
        other.write("third")
        certificate.look()
        async with connected(port, other.trusted()) as (tls, _):
            assert name_of(tls) == "third"


async def test_older_ones_and_plain_http_are_not(pair: Pair) -> None:
    context = pair.trusted()
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with serving_tls(Certificate(pair.certificate, pair.key)) as port:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=context)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("GET", "/hello"))
        async with asyncio.timeout(20):
            assert b"hello" not in await reader.read()
        writer.close()


async def test_a_renewed_certificate_is_used_from_the_next_connection_on(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = Certificate(pair.certificate, pair.key)
    old = pair.trusted()
    async with serving_tls(certificate) as port, connected(port, old) as (first, reader):
        assert name_of(first) == "first"
        key = pair.key.read_bytes()
        pair.write("second")
        theirs = pair.key.read_bytes()
        pair.key.write_bytes(key)  # half a pair, as while somebody copies it
        with caplog.at_level(logging.INFO, "embedmesh.http"):
            certificate.look()
            certificate.look()
        assert [record.levelname for record in caplog.records] == ["ERROR"], "told once"
        async with connected(port, old) as (still, _):
            assert name_of(still) == "first"
        pair.key.write_bytes(theirs)
        certificate.look()
        async with connected(port, pair.trusted()) as (now, _):
            assert name_of(now) == "second"
        assert not reader.at_eof(), "who was there stays"


async def test_handshakes_that_nobody_ends_keep_nobody_out(pair: Pair) -> None:
    """Forty strangers connect and say nothing, or the beginning of something: one who speaks is served."""
    async with serving_tls(Certificate(pair.certificate, pair.key), connections_max=10) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        for _, writer in silent[::2]:
            writer.write(b"\x16\x03\x01\x02\x00\x01")
        async with connected(port, pair.trusted()):
            pass
        for _, writer in silent:
            writer.close()


def test_an_expiry_is_of_what_is_used(pair: Pair, tmp_path: Path) -> None:
    authorities = tmp_path / "ca.pem"
    authorities.write_bytes(pair.certificate.read_bytes())
    certificate = Certificate(pair.certificate, pair.key, authorities)
    certificate.expires_s = 1.0
    pair.write("second")
    authorities.write_text("nothing")
    certificate.look()
    assert certificate.expires_s == 1.0


@pytest.mark.parametrize("what", ["missing", "no PEM", "another's key", "encrypted", "half"])
def test_what_cannot_be_used_is_named(pair: Pair, tmp_path: Path, what: str) -> None:
    if what == "missing":
        pair.key.unlink()
    elif what == "no PEM":
        pair.certificate.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    elif what == "another's key":
        (tmp_path / "other").mkdir()
        pair.key = Pair(tmp_path / "other").write("other").key
    elif what == "encrypted":
        pair.write("first", BestAvailableEncryption(b"secret"))
    with pytest.raises(SetupError) as refused:
        Certificate.given(pair.certificate, None if what == "half" else pair.key, None)
    words = {"encrypted": "passphrase", "half": "--tls-key", "missing": str(pair.key)}
    assert words.get(what, str(pair.certificate)) in str(refused.value)
