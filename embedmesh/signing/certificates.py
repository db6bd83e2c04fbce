"""A node's own TLS certificate, which its gateway pins.

There is no authority. The node makes a certificate that proves itself only, and registers it under its identity's
signature. The gateway then trusts just that one on just that node's connections, whatever the address is.
"""

import datetime
import ssl
import warnings
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from embedmesh.rules.errors import SetupError
from embedmesh.signing.private import make_once, read_private

CERTIFICATE_BYTES_MAX = 8_192  # ours have about 400; an RSA one with a long name has 2,000
CERTIFICATE_DAYS = 20 * 365  # it is replaced by registering another, not by running out
CLOCK_SKEW_DAYS = 1  # a gateway's clock may be behind the node's
CERTIFICATE_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "embedmesh-node")])
TLS_KEY = "TLS key"
PARSE_ERRORS = (  # all that the two parsers raise for a bad certificate
    ValueError,
    Warning,
    UnsupportedAlgorithm,
    ssl.SSLError,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def make_certificate(path_key: Path, path_cert: Path) -> None:
    """Make both files (PEM, mode 0600) where they are missing: EC P-256, self-signed. Raises SetupError.

    The key comes first: whichever of two processes wins, the certificate is of the key that stayed.
    """
    try:
        if not path_key.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            make_once(path_key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        key = _load_key(path_key)
        if not path_cert.exists():
            make_once(path_cert, _self_signed(key).public_bytes(Encoding.PEM))
        certificate = _load_certificate(path_cert)
    except OSError as error:
        raise SetupError(f"Cannot use {path_key} and {path_cert}: {error.strerror}.") from None
    if certificate.public_key() != key.public_key():
        raise SetupError(f"{path_cert} is not of the key {path_key}: restore both from a backup, or remove both.")


def der(path_cert: Path) -> bytes:
    """The certificate's DER form: what a node registers. Raises SetupError."""
    try:
        return _load_certificate(path_cert).public_bytes(Encoding.DER)
    except OSError as error:
        raise SetupError(f"Cannot use {path_cert}: {error.strerror}.") from None


def server_context(path_cert: Path, path_key: Path) -> ssl.SSLContext:
    """For the node's port: TLS 1.3 (RFC 8446) with this certificate. Call `make_certificate` first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(path_cert, path_key)
    return context


def pinned_context(certificate_der: bytes) -> ssl.SSLContext:
    """For the gateway: TLS 1.3 with the holder of this certificate's key only. Names are not checked.

    Only for a certificate that `is_certificate` has accepted: others might certify further ones. Raises ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody yet
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate_der)
    return context


def unverified_context() -> ssl.SSLContext:
    """For our own port, which may have a certificate for another name: nothing secret is sent or read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def names_of(path_cert: Path) -> list[str]:
    """The host names and addresses that a certificate (PEM, the first of its file) is for. Raises SetupError."""
    try:
        certificate = _load_certificate(path_cert)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except OSError as error:
        raise SetupError(f"{path_cert} cannot be read ({error.strerror}).") from None
    addresses = [str(each) for each in found.get_values_for_type(x509.IPAddress)]
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def is_certificate(certificate_der: bytes) -> bool:
    """Whether this is a certificate that may be pinned: one that certifies no others (CA:FALSE)."""
    if len(certificate_der) > CERTIFICATE_BYTES_MAX:
        return False
    try:
        with warnings.catch_warnings(action="error"):  # a warning now is an error in a later release
            certificate = x509.load_der_x509_certificate(certificate_der)
            is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        pinned_context(certificate_der)  # OpenSSL must read it too
    except PARSE_ERRORS:
        return False
    return not is_authority


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(CERTIFICATE_NAME)
        .issuer_name(CERTIFICATE_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=CLOCK_SKEW_DAYS))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, SHA256())
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(read_private(path, TLS_KEY), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SetupError(f"The {TLS_KEY} {path} is not an EC key in PEM: restore it from a backup, or remove it.")
    return key


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise SetupError(f"{path} is not a certificate in PEM: restore it from a backup, or remove it.") from None
