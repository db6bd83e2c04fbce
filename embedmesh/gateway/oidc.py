"""Operators who have signed in: a bearer token (JWT, RFC 7519) of one OpenID Connect issuer, within its roles.

Checks go from cheap to dear: form, algorithm, issuer, audience and times, then the key, last the signature. What
is wrong with a token is never said. No answer of the issuer is waited for where a bearer key is sent.
"""

import base64
import binascii
import warnings
from collections.abc import Mapping
from typing import Any

import msgspec
from joserfc import jws
from joserfc.errors import JoseError, SecurityWarning
from msgspec import UNSET, UnsetType

from embedmesh.flow.identify import HEADER_CHARS_MAX
from embedmesh.gateway.issuer_keys import IssuerKeys, checked_url
from embedmesh.rules.errors import SetupError
from embedmesh.rules.ports import Caller, Clock, Keys
from embedmesh.settings import GatewaySettings

ALGORITHMS = (  # no HS, no none
    *(f"{kind}{bits}" for kind in ("RS", "PS", "ES") for bits in (256, 384, 512)),
    "Ed25519",
    "EdDSA",
)
SIGN_IN_CHARS_MAX = 7_168  # of a token: the header that carries it has at most 8,190
CLOCK_SKEW_S = 30  # between the issuer's clock and ours
SUBJECT_CHARS_MAX = 255  # OpenID Connect Core, section 2
SCOPES_OF_ROLE = {"admin": {"admin"}, "read": {"admin:read"}, "audit": {"audit"}}
SIGNED_IN = "oidc:operators"  # stands in for an account: no account can have this id
TYPES = (None, "jwt", "at+jwt", "application/at+jwt")


# What an issuer writes into a header besides is its own affair: a chain of certificates, names that are not registered.
REGISTRY = jws.JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
REGISTRY.max_header_length = REGISTRY.max_signature_length = SIGN_IN_CHARS_MAX


class SignInTerms(msgspec.Struct, frozen=True):
    """Whose tokens are good, for whom they must be, and what scopes the values of a claim give."""

    issuer: str
    audience: str
    role_claim: str
    roles: Mapping[str, frozenset[str]]


class TokenHeader(msgspec.Struct, frozen=True):
    """What we look at in a token's header. Where its keys are is the issuer's word, not the token's."""

    alg: str
    kid: str = ""
    typ: str | None = None
    crit: Any | UnsetType = UNSET


class Claims(msgspec.Struct, frozen=True):
    """What we look at in a token's claims. With `cnf` it is no bearer token: its owner would have to prove a key."""

    iss: str
    sub: str
    aud: str | list[str]
    exp: int | float
    nbf: int | float = 0
    cnf: Any | UnsetType = UNSET


class Operators:
    """Implements the port `Keys`, for the admin API: bearer keys, and tokens of the issuer."""

    def __init__(self, terms: SignInTerms, keys: Keys, issuer: IssuerKeys, clock: Clock) -> None:
        self._terms = terms
        self._keys = keys
        self._issuer = issuer
        self._clock = clock

    async def find(self, token: str) -> Caller | None:
        """Raises StoreUnavailable for a key, Overloaded for a token where the issuer is away."""
        if token.count(".") != 2:
            return await self._keys.find(token) if len(token) <= HEADER_CHARS_MAX else None
        plausible = self._plausible(token)
        if plausible is None:
            return None
        header, claims, scopes = plausible
        key = await self._issuer.find(header.kid)
        if key is None or not _is_signed(token, key):
            return None
        return Caller(SIGNED_IN, f"oidc:{claims.iss}#{claims.sub}", scopes)

    def _plausible(self, token: str) -> tuple[TokenHeader, Claims, frozenset[str]] | None:
        """Header, claims and scopes of a token that is good if its signature is."""
        try:
            head, body, _ = token.split(".")
            header = msgspec.json.decode(_unpacked(head), type=TokenHeader)
            said = msgspec.json.decode(_unpacked(body), type=dict[str, Any])
            claims = msgspec.convert(said, Claims)
        except (msgspec.MsgspecError, binascii.Error, ValueError, RecursionError):
            return None
        now_s = self._clock.unix_ms() / 1000
        good = (
            header.alg in ALGORITHMS
            and header.crit is UNSET
            and (header.typ and header.typ.lower()) in TYPES
            and claims.cnf is UNSET
            and claims.iss == self._terms.issuer
            and self._terms.audience in ([claims.aud] if isinstance(claims.aud, str) else claims.aud)
            and claims.nbf - CLOCK_SKEW_S <= now_s < claims.exp + CLOCK_SKEW_S
            and 0 < len(claims.sub) <= SUBJECT_CHARS_MAX
            and claims.sub.isprintable()
        )
        return (header, claims, self._scopes(said)) if good else None

    def _scopes(self, said: Mapping[str, Any]) -> frozenset[str]:
        values = _claim(said, self._terms.role_claim)
        values = values.split() if isinstance(values, str) else values if isinstance(values, list) else []
        given = (self._terms.roles[value] for value in values if isinstance(value, str) and value in self._terms.roles)
        return frozenset[str]().union(*given)


def sign_in_terms(settings: GatewaySettings) -> SignInTerms:
    """The settings `oidc_...`, checked. Raises SetupError."""
    try:
        issuer = checked_url(settings.oidc_issuer)
    except ValueError:
        raise SetupError("--oidc-issuer is an https URL; http only on this machine.") from None
    if not settings.oidc_audience:
        raise SetupError("--oidc-issuer needs --oidc-audience: for whom the issuer must have made a token.")
    roles: dict[str, frozenset[str]] = {}
    for text in settings.oidc_role:
        value, _, role = text.rpartition("=")
        if not value or role not in SCOPES_OF_ROLE:
            raise SetupError(f"--oidc-role {text}: write VALUE=ROLE, where ROLE is one of {', '.join(SCOPES_OF_ROLE)}.")
        roles[value] = roles.get(value, frozenset()) | SCOPES_OF_ROLE[role]
    if not roles:
        raise SetupError(
            "--oidc-issuer needs --oidc-role, such as operators=admin: without a role a token may nothing."
        )
    return SignInTerms(issuer, settings.oidc_audience, settings.oidc_role_claim, roles)


def _claim(said: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, or else by its path: `realm_access.roles`."""
    if name in said:
        return said[name]
    found: Any = said
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _unpacked(segment: str) -> bytes:
    """Base64url without padding, and nothing else. Raises ValueError."""
    unpacked = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    if base64.urlsafe_b64encode(unpacked).rstrip(b"=").decode() != segment:
        raise ValueError("not base64url")
    return unpacked


def _is_signed(token: str, key: Any) -> bool:
    """Whether the signature is right. A key of another kind than the algorithm's is none for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecurityWarning)  # EdDSA has a new name, which issuers do not use yet
            jws.deserialize_compact(token, key, registry=REGISTRY)
    except (JoseError, ValueError, TypeError):
        return False
    return True
