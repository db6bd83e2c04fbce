"""Why there is no TLS connection to a server, and what to do: the same words in the client, the commands and a node."""

import os
import ssl
from typing import NamedTuple

TRUST_VARIABLE = "SSL_CERT_FILE"  # OpenSSL's own: a file of the authorities that a process trusts
NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"})
"""OpenSSL's reasons where the first bytes that come back are not those of TLS."""
OTHER_NAME = frozenset({62, 64})  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
OTHER_TIME = frozenset({9, 10})  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED


class TlsFailure(NamedTuple):
    """What is wrong, and what to do: two clauses without a full stop."""

    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.what}; {self.todo}"


def cause_of(error: Exception) -> OSError:
    """The `ssl.SSLError` behind one of aiohttp's `ClientSSLError`, which has it under one of two names."""
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
    return cause if isinstance(cause, OSError) else ssl.SSLError()


def tls_failure(url: str, error: OSError) -> TlsFailure:
    """Of an `ssl.SSLError` from a connection to `url`, which is shown."""
    code = getattr(error, "verify_code", None)
    if code is None:
        reason = getattr(error, "reason", None) or "the handshake failed"
        todo = "is its address http://, without TLS?" if reason in NO_TLS else "does a gateway listen there?"
        return TlsFailure(f"no secure connection to {url} ({reason})", todo)
    why = (getattr(error, "verify_message", "") or "it cannot be verified").rstrip(".")
    todo = f"set {TRUST_VARIABLE} to a file with that certificate, or with its authority's (PEM)"
    if code in OTHER_NAME:
        todo = "use an address that its certificate names"
    elif code in OTHER_TIME:
        todo = "have it renewed, or set this machine's clock"
    return TlsFailure(f"no secure connection to {url}: its certificate is not trusted ({why})", todo)


def system_context() -> ssl.SSLContext:
    """Trusts the system's authorities, whatever SSL_CERT_FILE says: as who does not have it set."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    paths = ssl.get_default_verify_paths()
    file, folder = paths.openssl_cafile, paths.openssl_capath
    if os.path.isfile(file) or os.path.isdir(folder):  # noqa: PTH112, PTH113 - these are texts
        context.load_verify_locations(
            cafile=file if os.path.isfile(file) else None,  # noqa: PTH113
            capath=folder if os.path.isdir(folder) else None,  # noqa: PTH112
        )
    return context
