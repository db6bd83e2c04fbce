"""A gateway talks to whoever holds the pinned certificate's key, and to nobody else."""

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.rules.errors import SetupError
from embedmesh.signing.certificates import (
    CERTIFICATE_NAME,
    der,
    is_certificate,
    make_certificate,
    pinned_context,
    server_context,
)

Key = ec.EllipticCurvePrivateKey
PLAIN = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(
    key: Key = KEY, by: Key = KEY, ca: bool | None = False, days: tuple[int, int] = (-1, 1)
) -> x509.Certificate:
    """A certificate with our name as subject and issuer, whoever signs it."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(CERTIFICATE_NAME)
        .issuer_name(CERTIFICATE_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    return builder.sign(by, SHA256())


def in_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


DER = in_der(certificate())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The files of a node's key and certificate, made."""
    paths = tmp_path / "tls" / "key.pem", tmp_path / "tls" / "cert.pem"
    make_certificate(*paths)
    return paths


@contextmanager
def serving(context: ssl.SSLContext) -> Iterator[tuple[str, int]]:
    """A server on loopback that answers one connection with a byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError), server.accept()[0] as plain, context.wrap_socket(plain, server_side=True) as secure:
                secure.sendall(b"!")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield server.getsockname()
        finally:
            thread.join()


def hear(context: ssl.SSLContext, address: tuple[str, int]) -> tuple[bytes, str | None]:
    """The server's byte and the TLS version. Raises ssl.SSLError."""
    with socket.create_connection(address, timeout=5) as plain, context.wrap_socket(plain) as secure:
        return secure.recv(1), secure.version()


def test_another_certificate_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Another self-signed one; one that the pinned key has signed; and the pinned one itself once it has run out."""
    path_key, path_cert = files
    pinned = load_pem_private_key(path_key.read_bytes(), None)
    assert isinstance(pinned, Key)
    own = der(path_cert)
    expired = certificate(days=(-2, -1))
    for key, shown, pin in [
        (KEY, certificate(), own),
        (KEY, certificate(by=pinned), own),
        (KEY, certificate(by=pinned, ca=True), own),
        (KEY, expired, in_der(expired)),
    ]:
        (tmp_path / "key.pem").write_bytes(key.private_bytes(*PLAIN))
        (tmp_path / "cert.pem").write_bytes(shown.public_bytes(Encoding.PEM))
        chain = (tmp_path / "cert.pem").read_bytes() + path_cert.read_bytes()
        for content in {(tmp_path / "cert.pem").read_bytes(), chain}:
            (tmp_path / "cert.pem").write_bytes(content)
            with (
                serving(server_context(tmp_path / "cert.pem", tmp_path / "key.pem")) as address,
                pytest.raises(ssl.SSLCertVerificationError),
            ):
                hear(pinned_context(pin), address)


def test_older_tls_is_refused(files: tuple[Path, Path]) -> None:
    """By the server and by the client."""
    path_key, path_cert = files
    client, server = pinned_context(der(path_cert)), server_context(path_cert, path_key)
    old_client, old_server = pinned_context(der(path_cert)), server_context(path_cert, path_key)
    for old in (old_client, old_server):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    for ours, theirs in ((old_client, server), (client, old_server)):
        with serving(theirs) as address, pytest.raises(ssl.SSLError):
            hear(ours, address)


def test_the_pinned_certificate_connects(files: tuple[Path, Path]) -> None:
    """Under any name, with TLS 1.3."""
    path_key, path_cert = files
    with serving(server_context(path_cert, path_key)) as address:
        assert hear(pinned_context(der(path_cert)), address) == (b"!", "TLSv1.3")


def test_a_certificate_is_made_once(files: tuple[Path, Path]) -> None:
    """The second start changes nothing; the key is its owner's only; the certificate lasts and vouches for nobody."""
    path_key, path_cert = files
    before = path_key.read_bytes(), path_cert.read_bytes()
    make_certificate(*files)
    assert (path_key.read_bytes(), path_cert.read_bytes()) == before
    assert path_key.stat().st_mode & 0o777 == 0o600
    made = x509.load_der_x509_certificate(der(path_cert))
    assert made.subject.rfc4514_string() == "CN=embedmesh-node"
    assert made.not_valid_before_utc < NOW
    assert made.not_valid_after_utc > NOW + 19 * 365 * DAY
    assert is_certificate(der(path_cert))


def test_a_lost_certificate_is_made_anew_for_the_same_key(files: tuple[Path, Path]) -> None:
    """The key decides."""
    path_key, path_cert = files
    before = path_key.read_bytes()
    path_cert.unlink()
    make_certificate(*files)
    assert path_key.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "cert", "mode", "says"),
    [
        (KEY.private_bytes(*PLAIN), None, 0o644, "chmod 600"),
        (KEY.private_bytes(*PLAIN), None, 0o600, "restore both"),  # of another certificate
        (b"", None, 0o600, "not an EC key"),
        (KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")), None, 0o600, "not an EC"),
        (bytes(10_000), None, 0o600, "restore it"),
        (None, b"", 0o600, "not a certificate"),
        (None, certificate().public_bytes(Encoding.PEM), 0o600, "restore both"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    key: bytes | None, cert: bytes | None, mode: int, says: str, files: tuple[Path, Path]
) -> None:
    """In one line that says what to do."""
    for path, content in zip(files, (key, cert), strict=True):
        if content is not None:
            path.write_bytes(content)
            path.chmod(mode)
    with pytest.raises(SetupError, match=says) as refused:
        make_certificate(*files)
    assert "\n" not in str(refused.value)


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    """Told in one line, like everything at start-up."""
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="Cannot use"):
        make_certificate(tmp_path / "file" / "key.pem", tmp_path / "file" / "cert.pem")
    with pytest.raises(SetupError, match="Cannot use"):
        der(tmp_path / "none.pem")


@pytest.mark.parametrize(
    "offered",
    [
        b"",
        b"junk",
        DER[:-1],
        DER + b"\0",
        DER + DER,
        certificate().public_bytes(Encoding.PEM),
        in_der(certificate(ca=True)),
        in_der(certificate(ca=None)),  # OpenSSL would let it prove for others
        DER + bytes(8_192),
        bytes(10_000_000),
    ],
)
def test_what_may_not_be_pinned(offered: bytes) -> None:
    """Junk, more than one, and whatever vouches for others."""
    assert not is_certificate(offered)


def test_a_certificate_may_be_pinned() -> None:
    """One that vouches for itself only."""
    assert is_certificate(DER)


@given(st.integers(0, len(DER) - 1), st.binary(max_size=3), st.integers(0, 3))
@settings(max_examples=40)
def test_a_spoilt_certificate_raises_nothing(at: int, put: bytes, cut: int) -> None:
    """It is one or it is none; and one can be pinned."""
    offered = DER[:at] + put + DER[at + cut :]
    if is_certificate(offered):
        pinned_context(offered)
