"""The port that `embedmesh serve` has bound, as clients on this machine find it: its URL, certificate and replies."""

import asyncio
import contextlib
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from embedmesh.rules.tls_failures import TRUST_VARIABLE, system_context

READY_POLL_S = 0.05
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - not bound here, only recognised
HANDSHAKE_S = 5.0  # with ourselves: milliseconds, unless the machine is very busy


def base_url(host: str, port: int, certificate: Path | None = None) -> str:
    """The base URL for a client on this machine: with a name that the port's certificate has, if there is one."""
    address = ANY_ADDRESS.get(host, host)
    if certificate is None:
        return f"http://{_bracketed(address)}:{port}/v1"
    from embedmesh.signing.certificates import names_of  # brings a TLS library along

    names = names_of(certificate)
    named = [name for name in (address, "localhost", *names) if name in names and "*" not in name]
    return f"https://{_bracketed((*named, address)[0])}:{port}/v1"


async def until_ready(host: str, port: int, path: str, replies: int, *, tls: bool) -> None:
    """Wait until the path has said 200 that many times in a row: /readyz does once a worker has embedded something."""
    right = 0
    host = ANY_ADDRESS.get(host, host)
    context = None
    if tls:
        from embedmesh.signing.certificates import unverified_context

        context = unverified_context()
    while right < replies:
        status = b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            status = await reader.readline()
            writer.close()
        right = right + 1 if b" 200 " in status else 0
        if not right:
            await asyncio.sleep(READY_POLL_S)


async def authority_to_name(host: str, port: int, url: str, certificate: Path) -> Path | None:
    """The file that clients on this machine must be told to trust; None where the system trusts the certificate."""
    if await _trusts(system_context(), host, port, url):
        return None
    ours = os.environ.get(TRUST_VARIABLE)  # who reads our words may not have it set
    if ours and await _trusts(ssl.create_default_context(), host, port, url):
        return Path(ours)
    return certificate


async def _trusts(context: ssl.SSLContext, host: str, port: int, url: str) -> bool:
    name = urlsplit(url).hostname
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            address = ANY_ADDRESS.get(host, host)
            _, writer = await asyncio.open_connection(address, port, ssl=context, server_hostname=name)
            writer.close()
    except ssl.SSLCertVerificationError:
        return False
    except (OSError, TimeoutError):
        return True  # nobody knows: then nothing is told
    return True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
