"""TLS in front of a server: the certificate, which is read again when it changes, and handshakes, which are bounded.

The event loop's own TLS server makes its state for a connection, some 300 kB, before anybody has counted it, and lets a
stranger hold it for as long as a handshake may take. Here a connection is counted first, like any other.
"""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from embedmesh.http.connections import Connections, Origins
from embedmesh.rules.errors import SetupError

log = logging.getLogger("embedmesh.http")

ACCEPT_AGAIN_S = 1.0  # as the event loop's own servers wait
CERTIFICATE_LOOK_S = 5.0  # a renewed one is in use within seconds; a look is two calls of the kernel


class TlsListener:
    """Takes connections from a listening socket, and serves those that end a handshake in time.

    One that has not is idle from the start: the first to be closed for others.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: Callable[[], ssl.SSLContext],
        connection: Callable[[], asyncio.Protocol],
        within_s: float,
        origins: Origins,
        connections: Connections,
    ) -> None:
        """`context` is asked for each connection; `connection` makes what speaks behind TLS, in at most `within_s`."""
        self._sock = sock
        self._context = context
        self._connection = connection
        self._within_s = within_s
        self._origins = origins
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting = self._loop.create_task(self._accept())

    def close(self) -> None:
        """Take no more."""
        self._accepting.cancel()
        for handshake in self._handshakes:
            handshake.cancel()
        self._sock.close()

    async def _accept(self) -> None:
        while True:
            try:
                sock, peer = await self._loop.sock_accept(self._sock)
            except ConnectionError:  # gone again
                continue
            except OSError as error:  # no files or no memory left
                log.error("no connection can be taken (%s); trying again", error.strerror)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            handshake = _Handshake(self._loop.time())
            if not self._connections.made(handshake, self._origins.of_peer(peer), handshake.made_at):
                sock.close()
                continue
            handshake.task = task = self._loop.create_task(self._shake(sock, handshake))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _shake(self, sock: socket.socket, handshake: "_Handshake") -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._connection, sock, ssl=self._context(), ssl_handshake_timeout=self._within_s
            )
        except (OSError, asyncio.CancelledError):  # an SSLError is one: of a caller that speaks no TLS, or has gone
            sock.close()
        finally:
            self._connections.lost(handshake)


class _Handshake:
    """A connection that has not spoken TLS yet."""

    def __init__(self, made_at: float) -> None:
        self.made_at = made_at
        self.task: asyncio.Task[None] | None = None

    def idle_since(self) -> float | None:
        return self.made_at

    def force_close(self) -> None:
        if self.task is not None:
            self.task.cancel()


class Certificate:
    """What a port proves itself with, and whose certificates it asks callers for. TLS 1.2 (RFC 5246) and 1.3."""

    @classmethod
    def given(cls, certificate: Path | None, key: Path | None, client_authorities: Path | None) -> "Certificate | None":
        """That of a gateway's settings; None for plain HTTP. Raises SetupError."""
        if certificate is not None and key is not None:
            return cls(certificate, key, client_authorities)
        if (certificate, key, client_authorities) != (None, None, None):
            raise SetupError("--tls-cert and --tls-key go together, and --tls-client-ca needs both.")
        return None

    def __init__(self, certificate: Path, key: Path, client_authorities: Path | None = None) -> None:
        """Raises SetupError, which names the file."""
        self._files = (certificate, key, *([client_authorities] if client_authorities is not None else []))
        self._seen = self._stamps()
        self.expires_s = 0.0  # in seconds since 1970: of what `context` holds
        self.context = self._made()

    async def watch(self) -> None:
        """Look whether the files have changed, for ever. One that cannot be used is told, and the old one stays."""
        while True:
            await asyncio.sleep(CERTIFICATE_LOOK_S)
            self.look()

    def prepare(self, certificate: Path, key: Path) -> Callable[[], None]:
        """What takes the certificate from these files from then on. Raises SetupError where they cannot be used."""
        made = Certificate(certificate, key, *self._files[2:])

        def apply() -> None:
            if made._seen != self._seen:
                log.info("the certificate was read again from %s", certificate)
            self._files, self._seen = made._files, made._seen
            self.context, self.expires_s = made.context, made.expires_s

        return apply

    def look(self) -> None:
        """Use what the files hold now, for connections from here on."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self.context = self._made()  # one of its own: half a pair must not replace a whole one
        except SetupError as error:
            log.error("the certificate stays as it was: %s", error)
        else:
            log.info("the certificate was read again from %s", self._files[0])

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        certificate, key, *authorities = self._files
        try:
            context.load_cert_chain(certificate, key, password=_no_passphrase)
            expires_s = _expires_s(certificate)
            for file in authorities:
                context.load_verify_locations(file)
                context.verify_mode = ssl.CERT_OPTIONAL  # who needs one is decided by what is asked for
            self.expires_s = expires_s
        except ssl.SSLError as error:
            what = f"{certificate} and {key} are no certificate (PEM) and its key"
            if authorities:
                what += f", or {authorities[0]} holds no certificates"
            raise SetupError(f"{what} ({error.reason or 'unreadable'}).") from None
        except OSError as error:
            file = next((each for each in self._files if not os.access(each, os.R_OK)), certificate)  # it does not say
            raise SetupError(f"{file} cannot be read ({error.strerror}).") from None

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file is written or replaced; None for one that is missing."""
        stamps: list[tuple[int, int, int] | None] = []
        for file in self._files:
            found = None
            with contextlib.suppress(OSError):
                status = file.stat()
                found = (status.st_ino, status.st_mtime_ns, status.st_size)
            stamps.append(found)
        return stamps


def _expires_s(certificate: Path) -> float:
    """When it expires; 0 where it is one that TLS takes and its parser does not."""
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()
    except ValueError:
        return 0.0


def _no_passphrase() -> str:
    raise SetupError("The key of the certificate is encrypted. Give one without a passphrase, readable by us only.")
