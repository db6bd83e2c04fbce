"""What `nodes invite` tells the person at the other machine: an address and a trust that work there."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509

from embedmesh.commands.joining import _own_address, from_elsewhere
from tests.http import test_tls

HERE = "Another machine cannot reach this address"


@pytest.fixture
def own() -> str:
    """This machine's address for others."""
    if not (found := _own_address()):
        pytest.skip("this machine has no address for others")
    return found


@contextmanager
def listening(host: str, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A port that takes connections, and with a context says who it is."""
    with socket.create_server((host, 0)) as server:

        def take() -> None:
            while True:
                try:
                    taken, _ = server.accept()
                    with taken if context is None else context.wrap_socket(taken, server_side=True):
                        pass
                except ssl.SSLError:
                    continue
                except OSError:
                    if server.fileno() < 0:
                        return

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def certified(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> ssl.SSLContext:
    """A port's context with a certificate for these, which this process trusts."""
    each = [x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names]
    monkeypatch.setattr(test_tls, "LOCAL", x509.SubjectAlternativeName(each))
    pair = test_tls.Pair(folder).write("gateway")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair.certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    return context


def test_an_address_for_others_stays_and_one_for_here_becomes_one_for_others(own: str) -> None:
    assert from_elsewhere("http://10.0.0.1:8443") == ("http://10.0.0.1:8443", "", "")
    for host in ("127.0.0.1", "localhost"):
        with listening("0.0.0.0") as port:
            assert from_elsewhere(f"http://{host}:{port}") == (f"http://{own}:{port}", "", "")
        with listening("127.0.0.1") as port:
            root, trust, remark = from_elsewhere(f"http://{host}:{port}")
            assert (root, trust) == (f"http://{host}:{port}", "") and HERE in remark


def test_with_tls_the_address_is_one_that_the_certificate_names(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = "SSL_CERT_FILE=tls.pem "
    for names, root in (
        (("127.0.0.1", "gw.example", own), f"https://{own}"),
        (("127.0.0.1", "*.example", "gw.example"), "https://gw.example"),
        (("127.0.0.1", "localhost"), ""),
    ):
        context = certified(tmp_path, monkeypatch, *names)
        with listening("0.0.0.0", context) as port:
            found = from_elsewhere(f"https://127.0.0.1:{port}")
        assert found.trust == trust and f"Copy {tmp_path}/tls.pem there first" in found.remark
        assert found.root == (f"{root}:{port}" if root else f"https://127.0.0.1:{port}")
        assert ("names no address that another machine can use" in found.remark) == (not root)
