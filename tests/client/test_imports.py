"""What importing the client brings along, and with whom it speaks TLS."""

import datetime
import ipaddress
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from embedmesh.client import CallNotAnswered
from tests.client.conftest import Call
from tests.client.gateway import ALIAS, ScriptedGateway

HEAVY = ["aiohttp", "click", "cryptography", "numpy", "openvino", "orjson", "rich", "tokenizers", "uvloop"]


@pytest.mark.parametrize(
    ("program", "heavy"),
    [
        ("import embedmesh.client", []),
        ("from embedmesh.client import Client; Client(base_url='http://h/v1', api_key='k')", []),
        ("from embedmesh.client import Pins", ["cryptography"]),
        ("from embedmesh.client import AsyncClient", ["aiohttp"]),
    ],
)
def test_importing_it_brings_no_more_than_it_needs(program: str, heavy: list[str]) -> None:
    told = f"{program}\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) - {"click"} == set(heavy)
    assert "click" not in done.stdout


def test_it_says_what_it_does_not_have() -> None:
    import embedmesh.client

    assert set(embedmesh.client.__all__) <= set(dir(embedmesh.client)) | {"AsyncClient", "Pins"}
    with pytest.raises(AttributeError, match="OpenAI"):
        embedmesh.client.OpenAI  # noqa: B018


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that no authority has signed, with its key behind it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "gateway.pem"
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none)
    file.write_bytes(made.public_bytes(pem) + private)
    return file


@pytest.fixture
def gateway(certificate: Path) -> Iterator[ScriptedGateway]:
    """As conftest's, over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ScriptedGateway().running(context) as running:
        yield running


def test_a_certificate_that_nobody_vouches_for_is_not_spoken_to(gateway: ScriptedGateway, call: Call) -> None:
    with pytest.raises(CallNotAnswered, match="No secure connection"):
        call(model=ALIAS, input="a")
    assert gateway.received == []


def test_an_authority_of_ones_own_can_be_named(gateway: ScriptedGateway, call: Call, certificate: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    assert call(model=ALIAS, input="a", ssl_context=context).model == ALIAS


def test_a_certificate_for_another_name_is_not_spoken_to(
    gateway: ScriptedGateway, call: Call, certificate: Path
) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    other = gateway.base_url.replace("127.0.0.1", "localhost")
    with pytest.raises(CallNotAnswered, match="No secure connection"):
        call(model=ALIAS, input="a", base_url=other, ssl_context=context)
