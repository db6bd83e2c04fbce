"""Tokens of an OpenID Connect issuer: good on the admin API within their roles; hostile ones are refused cheaply."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from embedmesh.gateway.api.routes import OperatorAccess
from embedmesh.rules.errors import Overloaded, SetupError
from embedmesh.settings import GatewaySettings
from embedmesh.storage.store import Store
from tests.gateway.mesh import Gateway, gateway

pytest.importorskip("joserfc", reason="joserfc is not installed: pip install 'embedmesh[oidc]'")

from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from embedmesh.gateway.issuer_keys import (
    FETCH_S,
    ISSUER_DOCUMENT_BYTES_MAX,
    OLD_KEYS_S,
    UNKNOWN_KEY_S,
    IssuerKeys,
    fetch_json,
    importable,
)
from embedmesh.gateway.oidc import SIGN_IN_CHARS_MAX, Operators, SignInTerms, sign_in_terms

ISSUER = "https://login.example.com/realms/work"
ROLES = {"operators": frozenset({"admin"}), "viewers": frozenset({"admin:read"}), "auditors": frozenset({"audit"})}
TERMS = SignInTerms(ISSUER, "embedmesh", "realm_access.roles", ROLES)
RSA = RSAKey.generate_key(2048, {"kid": "rsa", "use": "sig"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})
ED = OKPKey.generate_key("Ed25519", {"kid": "ed"})
OTHER = RSAKey.generate_key(2048, {"kid": "rsa"})  # a stranger's, under the issuer's name of its key
ALL = ["RS256", "RS384", "RS512", "PS256", "ES256", "Ed25519", "EdDSA", "HS256"]
Json = dict[str, Any]


class HandClock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic(self) -> float:
        return self.now_s

    def unix_ms(self) -> int:
        return int(time.time() * 1000)


class Issuer:
    """The issuer's two documents, and how often they were asked for."""

    def __init__(self, *keys: Any) -> None:
        self.keys = [*keys]
        self.fetches = 0
        self.away = False
        self.name = ISSUER

    async def fetch(self, url: str) -> Any:
        if self.away:
            raise TimeoutError
        if url == f"{ISSUER}/.well-known/openid-configuration":
            self.fetches += 1
            return {"issuer": self.name, "jwks_uri": "https://login.example.com/keys", "more": 1}
        assert url == "https://login.example.com/keys"
        await asyncio.sleep(0)
        return {"keys": [key.as_dict(private=False) for key in self.keys]}


class CountedKeys(IssuerKeys):
    """How often a key was looked for: a signature is checked only after that."""

    looks = 0

    async def find(self, key_id: str) -> Any | None:
        self.looks += 1
        return await super().find(key_id)


class NoKeys:
    """Bearer keys: none is good."""

    async def find(self, token: str) -> None:
        return None


class World:
    def __init__(self, *keys: Any) -> None:
        self.clock = HandClock()
        self.issuer = Issuer(*keys or (RSA, EC, ED))
        self.keys = CountedKeys(ISSUER, self.clock, self.issuer.fetch)
        self.operators = Operators(TERMS, NoKeys(), self.keys, self.clock)

    async def scopes(self, token: str) -> set[str] | None:
        caller = await self.operators.find(token)
        return None if caller is None else set(caller.scopes)


def said(**changes: Any) -> Json:
    """Good claims, but for the changes; None leaves one out."""
    now = int(time.time())
    claims = {"iss": ISSUER, "sub": "ada", "aud": "embedmesh", "exp": now + 300, "iat": now}
    claims |= {"realm_access": {"roles": ["operators", "others"]}}
    return {name: value for name, value in (claims | changes).items() if value is not None}


def token(claims: Json | None = None, key: Any = RSA, alg: str = "RS256", **header: Any) -> str:
    head = {"alg": alg, "kid": key.kid} | header
    return str(
        jwt.encode({name: value for name, value in head.items() if value is not None}, claims or said(), key, ALL)
    )


def packed(value: object) -> str:
    encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(encoded).rstrip(b"=").decode()


def by_hand(header: Json | bytes, claims: Json | bytes, signature: bytes = b"x" * 32) -> str:
    return f"{packed(header)}.{packed(claims)}.{packed(signature)}"


def signed_with_the_public_key() -> str:
    """The old trick: the public key, which everybody has, as the secret of an HMAC."""
    text = f"{packed({'alg': 'HS256', 'kid': 'rsa'})}.{packed(said())}"
    mac = hmac.new(RSA.as_pem(private=False), text.encode(), hashlib.sha256).digest()
    return f"{text}.{packed(mac)}"


@pytest.mark.parametrize(
    ("values", "scopes"),
    [
        (["operators"], {"admin"}),
        (["viewers", "auditors", 7, None], {"admin:read", "audit"}),
        ("auditors viewers", {"admin:read", "audit"}),
        (["Operators", "others"], set()),
        ([], set()),
        ({"operators": True}, set()),
    ],
)
async def test_a_token_has_the_scopes_of_its_roles(values: Any, scopes: set[str]) -> None:
    assert await World().scopes(token(said(realm_access={"roles": values}))) == scopes


@pytest.mark.parametrize(
    ("key", "alg"), [(RSA, "RS256"), (RSA, "PS256"), (RSA, "RS512"), (EC, "ES256"), (ED, "Ed25519"), (ED, "EdDSA")]
)
@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")  # EdDSA has a new name: Ed25519
async def test_each_allowed_algorithm_is_good(key: Any, alg: str) -> None:
    assert await World().scopes(token(key=key, alg=alg)) == {"admin"}
    assert await World().scopes(token(said(aud=["other", "embedmesh"]), key, alg, typ="at+jwt")) == {"admin"}


async def test_a_header_may_be_long_and_have_what_we_do_not_know() -> None:
    """An issuer names a chain of certificates, and members of its own."""
    head = {"alg": "RS256", "kid": "rsa", "x5c": [packed(b"x" * 900)], "pi.atm": "1"}
    loose = JWSRegistry(algorithms=ALL, strict_check_header=False)
    assert await World().scopes(str(jwt.encode(head, said(), RSA, registry=loose))) == {"admin"}


async def test_whatever_an_issuer_sends_ends_nothing() -> None:
    world = World()

    async def odd(url: str) -> Any:
        raise ZeroDivisionError

    keys = IssuerKeys(ISSUER, world.clock, odd)
    with pytest.raises(Overloaded):
        await keys.find("rsa")


CHEAP: dict[str, Callable[[], str]] = {
    "alg none": lambda: by_hand({"alg": "none"}, said(), b""),
    "alg None": lambda: by_hand({"alg": "None", "kid": "rsa"}, said(), b""),
    "no alg": lambda: by_hand({"kid": "rsa"}, said()),
    "hmac with the public key": signed_with_the_public_key,
    "another issuer": lambda: token(said(iss="https://evil.example.com")),
    "an issuer that begins alike": lambda: token(said(iss=ISSUER + "/")),
    "another audience": lambda: token(said(aud=["other"])),
    "no audience": lambda: token(said(aud=None)),
    "expired": lambda: token(said(exp=int(time.time()) - 31)),
    "no end": lambda: token(said(exp=None)),
    "an end that is a text": lambda: token(said(exp="9999999999")),
    "not yet": lambda: token(said(nbf=int(time.time()) + 40)),
    "nobody": lambda: token(said(sub="")),
    "a subject that no row should have": lambda: token(said(sub="a\x1b[2J")),
    "bound to a key": lambda: token(said(cnf={"jkt": "x"})),
    "critical extension": lambda: by_hand({"alg": "RS256", "kid": "rsa", "crit": ["b64"], "b64": False}, said()),
    "an id token hint of another type": lambda: token(typ="logout+jwt"),
    "no json": lambda: by_hand(b"{", said()),
    "claims that are no object": lambda: by_hand({"alg": "RS256", "kid": "rsa"}, b"[]"),
    "deep": lambda: by_hand({"alg": "RS256", "kid": "rsa"}, b"[" * 4_000),
    "padding": lambda: token().replace(".", "=.", 1),
    "empty parts": lambda: "..",
    "not ascii": lambda: "\u00e9.\u00e9.\u00e9",
}
DEAR: dict[str, Callable[[], str]] = {
    "a stranger's key": lambda: token(key=OTHER),
    "a changed claim": lambda: ".".join((token().split(".")[0], packed(said(sub="eve")), token().split(".")[2])),
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "an algorithm of another kind of key": lambda: by_hand({"alg": "ES256", "kid": "rsa"}, said(), b"x" * 64),
    "the stranger's key in the head": lambda: token(key=OTHER, jwk=OTHER.as_dict(private=False)),
    "the stranger's key at an address": lambda: token(key=OTHER, jku="https://evil.example.com/keys"),
    "an unknown key": lambda: token(kid="other"),
    "no key id, and several keys": lambda: token(kid=None),
}


@pytest.mark.parametrize("name", [*CHEAP, *DEAR])
async def test_a_hostile_token_is_none_and_most_cost_no_look_at_a_key(name: str) -> None:
    """Nothing that a token says makes us fetch from where it says."""
    world = World()
    assert await world.scopes(token()) == {"admin"}
    asked = world.issuer.fetches, world.keys.looks
    assert await world.scopes((CHEAP | DEAR)[name]()) is None
    assert world.issuer.fetches == asked[0]
    assert world.keys.looks == asked[1] + (name in DEAR)


async def test_a_flood_of_unknown_keys_makes_one_fetch_a_minute() -> None:
    """Waiting or not; and a key that the issuer has just begun to use is found within that minute."""
    world = World(RSA)
    assert await world.scopes(token()) == {"admin"}
    flood = [token(kid=f"k{number}") for number in range(300)]
    for minute in range(3):
        world.clock.now_s += UNKNOWN_KEY_S
        assert set(await asyncio.gather(*map(world.scopes, flood))) == {None}
        assert world.issuer.fetches == minute + 2
    world.issuer.keys.append(EC)
    new = token(key=EC, alg="ES256")
    assert await world.scopes(new) is None
    world.clock.now_s += UNKNOWN_KEY_S
    assert await world.scopes(new) == {"admin"}
    world.issuer.keys = [EC]  # withdrawn: found at the next fetch
    world.clock.now_s += UNKNOWN_KEY_S
    assert await world.scopes(token(kid="again")) is None
    assert await world.scopes(token()) is None


async def test_an_issuer_that_is_away_leaves_its_keys_for_a_day() -> None:
    """One that never answered, or says that it is another, leaves none."""
    world = World()
    assert await world.scopes(token()) == {"admin"}
    world.issuer.away = True
    world.clock.now_s += OLD_KEYS_S
    assert await world.scopes(token()) == {"admin"}
    world.clock.now_s += 1
    with pytest.raises(Overloaded):
        await world.scopes(token())
    world.issuer.away = False
    world.clock.now_s += UNKNOWN_KEY_S
    assert await world.scopes(token(kid="any")) is None and await world.scopes(token()) == {"admin"}
    other = World()
    other.issuer.name = "https://evil.example.com"
    with pytest.raises(Overloaded):
        await other.scopes(token())


def test_keys_that_cannot_be_used_are_left_out() -> None:
    """Secrets, private keys, keys for encryption, giants, and nonsense."""
    weird = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
        RSA.as_dict(private=True),
        RSA.as_dict(private=False) | {"kid": "enc", "use": "enc"},
        {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": "giant", "e": "AQAB", "n": packed(b"\xff" * 2_048)},
        {"kty": "EC", "kid": "half", "crv": "P-256"},
        {"kid": "nothing"},
    ]
    assert set(importable([*weird, EC.as_dict(private=False)])) == {"ec"}
    assert len(importable([EC.as_dict(private=False) | {"kid": str(number)} for number in range(500)])) == 64


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(handler: Callable[[web.BaseRequest], Any]) -> AsyncIterator[str]:
    server = web.Server(handler)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, sock).start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        await runner.cleanup()


async def answer(request: web.BaseRequest) -> web.StreamResponse:
    if request.path == "/huge":
        return web.Response(body=b"[" + b" " * ISSUER_DOCUMENT_BYTES_MAX + b"]")
    if request.path == "/bomb":
        return web.Response(body=b"{}", headers={"Content-Encoding": "gzip"})
    if request.path == "/moved":
        return web.Response(status=302, headers={"Location": "/good"})
    if request.path == "/html":
        return web.Response(text="<html>")
    if request.path == "/stuck":
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"{")
        await asyncio.sleep(3_600)
    return web.json_response({"good": True})


async def test_a_document_is_bounded_in_size_and_time_and_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FETCH_S <= 5.0
    monkeypatch.setattr("embedmesh.gateway.issuer_keys.FETCH_S", 0.5)
    async with serving(answer) as url:
        assert await fetch_json(f"{url}/good") == {"good": True}
        assert await fetch_json(f"{url}/bomb") == {}  # as it was sent: nothing is unpacked
        for path in ("huge", "moved", "html"):
            with pytest.raises((ValueError, msgspec.DecodeError)):
                await fetch_json(f"{url}/{path}")
        with pytest.raises(TimeoutError):
            await fetch_json(f"{url}/stuck")


@asynccontextmanager
async def signed_in(folder: Path, world: World) -> AsyncIterator[Gateway]:
    def access(store: Store) -> OperatorAccess:
        return OperatorAccess(Operators(TERMS, store.keys, world.keys, world.clock), SIGN_IN_CHARS_MAX)

    async with gateway(folder, operators=access) as gw:
        yield gw


async def test_a_gateway_takes_tokens_on_the_admin_api_alone(tmp_path: Path) -> None:
    """Within their roles; the audit has who signed in; keys are good beside them, also where the issuer is away."""
    world = World()
    async with signed_in(tmp_path, world) as gw:
        ada, bob = token(), token(said(sub="bob", realm_access={"roles": ["viewers"]}))
        nobody = token(said(realm_access={"roles": []}))
        assert (await gw.ask("POST", "/v1/admin/accounts", {"id": "x"}, key=ada)).status == 200
        row = gw.books.acts.list(rows_max=1)[0]
        assert (row.verb, row.actor, row.origin) == ("account.create", f"oidc:{ISSUER}#ada", "127.0.0.1")
        assert (await gw.ask("GET", "/v1/admin/accounts", key=bob)).status == 200
        for refused in (bob, nobody):
            reply = await gw.ask("POST", "/v1/admin/accounts", {"id": "y"}, key=refused)
            assert (reply.status, reply.error["code"]) == (403, "insufficient_scope")
        assert (await gw.ask("GET", "/metrics", key=ada)).status == 200
        body = {"model": "tiny", "input": "a"}
        for method, path, sent in (
            ("POST", "/v1/embeddings", body), ("GET", "/v1/models", None), ("GET", "/v1/account", None),
            ("POST", "/v1/account/keys", {"scopes": ["keys"]}),
        ):  # fmt: skip
            assert (await gw.ask(method, path, sent, key=ada)).status == 401, path
        long = token(said(more="x" * SIGN_IN_CHARS_MAX))
        wrong = {(await gw.ask("GET", "/v1/admin/accounts", key=each)).body for each in
                 (CHEAP["expired"](), DEAR["a stranger's key"](), "em_wrong", "a" * 600)}  # fmt: skip
        assert len(wrong) == 1  # whatever is wrong, the answer is one
        assert (await gw.ask("GET", "/v1/admin/accounts", key=long)).status in (400, 401, 431)
        world.issuer.away = True
        world.clock.now_s += OLD_KEYS_S + 1
        away = await gw.ask("GET", "/v1/admin/accounts", key=ada)
        assert (away.status, away.error["code"]) == (503, "overloaded")
        key_id = gw.books.keys.create("a", ["embeddings"])[0].key_id
        assert (await gw.admin("DELETE", f"/keys/{key_id}")).status == 200  # the operator's way stays open


def settings(**given: Any) -> GatewaySettings:
    good: Json = {"oidc_issuer": ISSUER, "oidc_audience": "embedmesh", "oidc_role": ("operators=admin",)}
    return GatewaySettings(data_dir=Path("/nowhere"), **(good | given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"oidc_issuer": "http://login.example.com"}, "an https URL"),
        ({"oidc_issuer": "login.example.com"}, "an https URL"),
        ({"oidc_issuer": "https://ada@login.example.com"}, "an https URL"),
        ({"oidc_audience": ""}, "--oidc-audience"),
        ({"oidc_role": ()}, "--oidc-role"),
        ({"oidc_role": ("operators",)}, "VALUE=ROLE"),
        ({"oidc_role": ("operators=root",)}, "admin, read, audit"),
        ({"oidc_role": ("=admin",)}, "VALUE=ROLE"),
    ],
)
def test_a_setting_that_is_wrong_is_told(given: Json, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        sign_in_terms(settings(**given))


def test_settings_become_terms() -> None:
    """An issuer on this machine may be plain HTTP; a value may have several roles, and an equals sign."""
    given = settings(oidc_issuer="http://127.0.0.1:9/x", oidc_role=("a=read", "a=audit", "cn=ops=admin"))
    assert sign_in_terms(given) == SignInTerms(
        "http://127.0.0.1:9/x",
        "embedmesh",
        "roles",
        {"a": frozenset({"admin:read", "audit"}), "cn=ops": frozenset({"admin"})},
    )
