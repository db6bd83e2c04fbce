"""A message is accepted if the other side of the session said exactly this, now, and for the first time."""

import base64
import datetime
import hashlib
import hmac
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.signing.messages import (
    REPLY_COVERS,
    REQUEST_COVERS,
    CheckedRequest,
    Mac,
    RequestChecker,
    RequestSigner,
    SignedRequest,
    Unauthenticated,
    content_digest,
)
from embedmesh.signing.session import Session

SESSION = Session("0123456789abcdef", bytes(range(32)))
OTHER = Session("fedcba9876543210", bytes(32))
NODE = "node_" + "a" * 32
INSTANCE = "00112233445566ff"
METHOD, PATH, BODY, REQUEST_ID = "POST", "/v1/embeddings", b"some ids", "req_1"
REPLY = b"some vectors"
NOW = 1_700_000_000


def sign(session: Session = SESSION, now_s: int = NOW, **changes: Any) -> SignedRequest:
    """A request as a gateway that has just started signs it."""
    fields = {"method": METHOD, "path": PATH, "body": BODY, "request_id": REQUEST_ID} | changes
    return RequestSigner(session, NODE, INSTANCE).sign(**fields, now_s=now_s)


def received(request: SignedRequest) -> dict[str, str]:
    """Its headers as a server hands them over."""
    lines = request.headers.decode("ascii").removesuffix("\r\n").split("\r\n")
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


def checker(*sessions: Session) -> RequestChecker:
    """A node that has agreed these sessions, one after the other."""
    node = RequestChecker(NODE)
    for session in sessions or (SESSION,):
        node.add(session, NOW)
    return node


def check(
    node: RequestChecker,
    headers: dict[str, str],
    now_s: int = NOW,
    *,
    method: str = METHOD,
    path: str = PATH,
    body: bytes = BODY,
) -> CheckedRequest:
    """Let a node check a request, the usual one unless something is changed, with these headers."""
    checked = node.check_head(method, path, headers, now_s)
    checked.check_body(body, now_s)
    return checked


def replied(headers: list[tuple[str, str]]) -> dict[bytes, bytes]:
    """A reply's headers as a client hands them over."""
    return {name.lower().encode(): value.encode() for name, value in headers}


HEADERS = received(sign())
INPUT, SIGNATURE = HEADERS["signature-input"], HEADERS["signature"]


def by_hand(params: str, session: Session = SESSION) -> dict[str, str]:
    """A genuine signature with parameters of our choice."""
    base = (
        f'"@method": {METHOD}\n"@path": {PATH}\n"content-digest": {content_digest(BODY)}\n"embedmesh-node": {NODE}\n'
        f'"embedmesh-request-id": {REQUEST_ID}\n"@signature-params": {params}'
    )
    mac = base64.b64encode(hmac.digest(session.key, base.encode(), "sha256")).decode()
    return HEADERS | {"signature-input": f"em={params}", "signature": f"em=:{mac}:"}


CREATED, NONCE, KEY_ID, ALG = (
    f"created={NOW}",
    f'nonce="{INSTANCE}-1"',
    f'keyid="{SESSION.key_id}"',
    'alg="hmac-sha256"',
)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"method": "GET"}, "signature"),
        ({"path": "/v1/models"}, "signature"),
        ({"path": PATH + "?"}, "signature"),
        ({"path": PATH + "?a=b"}, "signature"),
        ({"path": PATH + '\n"content-digest": x'}, "signature"),
        ({"path": "/\u00e9"}, "malformed"),
        ({"path": "/\udce9"}, "malformed"),
        ({"body": b""}, "digest"),
        ({"body": BODY + b"\0"}, "digest"),
    ],
)
def test_another_request_is_refused(changed: dict[str, Any], reason: str) -> None:
    """What the signature covers and the headers do not repeat."""
    with pytest.raises(Unauthenticated, match=reason):
        check(checker(), HEADERS, **changed)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"content-digest": content_digest(b"")}, "signature"),
        ({"content-digest": HEADERS["content-digest"] + ", sha-512=:AA==:"}, "signature"),
        ({"content-digest": "\u00e9"}, "malformed"),
        ({"embedmesh-node": "node_" + "b" * 32}, "node"),
        ({"embedmesh-request-id": "req_2"}, "signature"),
        ({"embedmesh-request-id": "\udce9"}, "malformed"),
        ({"signature": ""}, "signature"),
        ({"signature": "em=::"}, "signature"),
        ({"signature": SIGNATURE.replace("em=", "sig=")}, "signature"),
        ({"signature": SIGNATURE + ", sig=:AA==:"}, "signature"),
        ({"signature": SIGNATURE + ";a"}, "signature"),
        ({"signature": SIGNATURE[:-1] + "\u00e9"}, "signature"),
        ({"signature-input": INPUT.replace("em=", "sig=")}, "malformed"),
        ({"signature-input": INPUT + f", sig={REQUEST_COVERS}"}, "malformed"),
        ({"signature-input": INPUT + " "}, "malformed"),
        ({"signature-input": INPUT.replace(";created", "; created")}, "malformed"),
        ({"signature-input": INPUT.replace(INSTANCE, INSTANCE.upper())}, "malformed"),
        ({"signature-input": INPUT.replace("-1", "-2")}, "signature"),
        ({"signature-input": INPUT.replace(SESSION.key_id, OTHER.key_id)}, "key"),
        ({"signature-input": INPUT.replace(str(NOW), str(NOW + 1))}, "signature"),
        ({"signature-input": INPUT.replace(str(NOW), "\u0661" + str(NOW)[1:])}, "malformed"),
        ({"signature-input": INPUT.replace(str(NOW), "9" * 5_000)}, "malformed"),
    ],
)
def test_a_changed_header_is_refused(changed: dict[str, Any], reason: str) -> None:
    """Any value but the signed one, any form but the one of this profile."""
    with pytest.raises(Unauthenticated, match=reason):
        check(checker(), HEADERS | changed)


@pytest.mark.parametrize(
    "params",
    [
        f"{REQUEST_COVERS};{NONCE};{CREATED};{KEY_ID};{ALG}",
        f"{REQUEST_COVERS};{CREATED};{KEY_ID};{ALG};{NONCE}",
        f"{REQUEST_COVERS};{CREATED};{NONCE};{KEY_ID}",
        f"{REQUEST_COVERS};{CREATED};{KEY_ID};{ALG}",
        f"{REQUEST_COVERS};{NONCE};{KEY_ID};{ALG}",
        f"{REQUEST_COVERS};{CREATED};{NONCE};{KEY_ID};{ALG};expires={NOW}",
        f'{REQUEST_COVERS};{CREATED};{NONCE};{KEY_ID};{ALG};tag="a"',
        f'{REQUEST_COVERS};{CREATED};{NONCE};{KEY_ID};alg="ed25519"',
        f'{REQUEST_COVERS};{CREATED};nonce="1";{KEY_ID};{ALG}',
        f'{REQUEST_COVERS};{CREATED};nonce="{INSTANCE}-";{KEY_ID};{ALG}',
        f'{REQUEST_COVERS};{CREATED};nonce="{INSTANCE}-{"1" * 17}";{KEY_ID};{ALG}',
        f'{REQUEST_COVERS};{CREATED};nonce="{INSTANCE}-0x1";{KEY_ID};{ALG}',
        f"{REQUEST_COVERS};created=0{NOW};{NONCE};{KEY_ID};{ALG}",
        f'{REQUEST_COVERS};created="{NOW}";{NONCE};{KEY_ID};{ALG}',
        f'("@method" "@path" "content-digest" "embedmesh-node");{CREATED};{NONCE};{KEY_ID};{ALG}',
        f"();{CREATED};{NONCE};{KEY_ID};{ALG}",
    ],
)
def test_another_profile_is_refused(params: str) -> None:
    """Even where the signature is genuine: the parameters and their order are fixed."""
    with pytest.raises(Unauthenticated, match="malformed"):
        check(checker(), by_hand(params))


@pytest.mark.parametrize("name", list(HEADERS))
def test_a_missing_header_is_refused(name: str) -> None:
    """All five are needed."""
    with pytest.raises(Unauthenticated, match="missing"):
        check(checker(), {other: value for other, value in HEADERS.items() if other != name})


@given(st.sampled_from(list(HEADERS)), st.integers(0), st.characters())
@settings(max_examples=40)
def test_a_request_cannot_be_changed(name: str, at: int, put: str) -> None:
    """One character of any header."""
    value = HEADERS[name]
    at %= len(value)
    changed = value[:at] + put + value[at + 1 :]
    if changed != value:
        with pytest.raises(Unauthenticated):
            check(checker(), HEADERS | {name: changed})


@pytest.mark.parametrize(("late_s", "accepted"), [(-61, False), (-60, True), (0, True), (60, True), (61, False)])
def test_a_message_is_good_for_a_minute(late_s: int, accepted: bool) -> None:
    """Clocks may differ by 60 s, to either side; of request and reply alike."""
    request = sign()
    headers = replied(check(checker(), received(request)).sign_reply(200, REPLY, 1, NOW))
    if accepted:
        check(checker(), HEADERS, NOW + late_s)
        request.check_reply(200, REPLY, headers, NOW + late_s)
        return
    with pytest.raises(Unauthenticated, match="time"):
        check(checker(), HEADERS, NOW + late_s)
    with pytest.raises(Unauthenticated, match="time"):
        request.check_reply(200, REPLY, headers, NOW + late_s)


def test_a_request_is_accepted_once() -> None:
    """Again it is refused; a changed one does not use up the genuine one; the next one is accepted."""
    node, signer = checker(), RequestSigner(SESSION, NODE, INSTANCE)
    first, second = (received(signer.sign(METHOD, PATH, BODY, REQUEST_ID, NOW)) for _ in range(2))
    with pytest.raises(Unauthenticated, match="digest"):
        check(node, first, body=b"")
    check(node, first)
    with pytest.raises(Unauthenticated, match="replay"):
        check(node, first)
    check(node, second)


def test_a_request_is_not_accepted_by_who_made_it() -> None:
    """Each side signs under its own session, so a gateway's request is nothing to a gateway."""
    with pytest.raises(Unauthenticated, match="key"):
        check(checker(OTHER), HEADERS)


def test_without_a_session_nothing_is_accepted() -> None:
    """A node that has just started."""
    with pytest.raises(Unauthenticated, match="key"):
        check(RequestChecker(NODE), HEADERS)


def test_sessions_overlap() -> None:
    """The session before the newest is good for two minutes more, and keeps its memory; an older one is not."""
    third = Session("f" * 16, b"3" * 32)
    node = checker()
    check(node, HEADERS)
    node.add(OTHER, NOW)
    node.add(SESSION, NOW)  # again: changes nothing
    with pytest.raises(Unauthenticated, match="replay"):
        check(node, HEADERS)
    check(node, received(sign(OTHER)))
    signer = RequestSigner(SESSION, NODE, "1" * 16)
    for late_s in (60, 120):
        check(node, received(signer.sign(METHOD, PATH, BODY, REQUEST_ID, NOW + late_s)), NOW + late_s)
    late = received(signer.sign(METHOD, PATH, BODY, REQUEST_ID, NOW + 121))
    with pytest.raises(Unauthenticated, match="key"):
        check(node, late, NOW + 121)
    node.add(third, NOW)
    with pytest.raises(Unauthenticated, match="key"):
        check(node, received(signer.sign(METHOD, PATH, BODY, REQUEST_ID, NOW)))


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "/v1/embeddings?a=b"},
        {"path": "/\u00e9"},
        {"path": "/ HTTP/1.1\r\nHost: other"},
        {"request_id": "req\n"},
        {"request_id": "req\r"},
        {"method": "GET\n"},
    ],
)
def test_what_cannot_stand_in_a_head_is_not_signed(changed: dict[str, Any]) -> None:
    """No value can add a line, and no query goes unsigned."""
    with pytest.raises(ValueError):
        sign(**changed)


# -- replies -----------------------------------------------------------------------------------------------------------

ASKED = sign()
ANSWERED = replied(check(checker(), received(ASKED)).sign_reply(200, REPLY, 17, NOW))
REPLY_INPUT, REPLY_SIGNATURE = ANSWERED[b"signature-input"], ANSWERED[b"signature"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"status": 201}, "signature"),
        ({"body": b""}, "digest"),
        ({b"content-digest": content_digest(b"").encode()}, "signature"),
        ({b"content-digest": b"\xff"}, "malformed"),
        ({b"embedmesh-receipt": b"18"}, "signature"),
        ({b"embedmesh-receipt": b"017"}, "malformed"),
        ({b"embedmesh-receipt": b"-1"}, "malformed"),
        ({b"embedmesh-receipt": b""}, "malformed"),
        ({b"embedmesh-receipt": b"9" * 16}, "malformed"),
        ({b"signature-input": REPLY_INPUT.replace(b"em=", b"sig=")}, "malformed"),
        ({b"signature-input": REPLY_INPUT + b";expires=1"}, "malformed"),
        ({b"signature-input": REPLY_INPUT.replace(b'"@path";req ', b"")}, "malformed"),
        ({b"signature-input": REPLY_INPUT.replace(SESSION.key_id.encode(), OTHER.key_id.encode())}, "key"),
        ({b"signature": SIGNATURE.encode()}, "signature"),
        ({b"signature": REPLY_SIGNATURE + b" "}, "signature"),
        ({b"signature": b""}, "signature"),
    ],
)
def test_a_changed_reply_is_refused(changed: dict[Any, Any], reason: str) -> None:
    """Status, body, receipt number, and everything that says so."""
    status, body = changed.get("status", 200), changed.get("body", REPLY)
    headers = ANSWERED | {name: value for name, value in changed.items() if isinstance(name, bytes)}
    with pytest.raises(Unauthenticated, match=reason):
        ASKED.check_reply(status, body, headers, NOW)


@pytest.mark.parametrize("name", list(ANSWERED))
def test_a_reply_that_lacks_a_header_is_refused(name: bytes) -> None:
    """All four are needed."""
    with pytest.raises(Unauthenticated, match="missing"):
        ASKED.check_reply(200, REPLY, {other: value for other, value in ANSWERED.items() if other != name}, NOW)


def test_the_reply_to_another_request_is_refused() -> None:
    """Even to one that differs in its nonce only; each is good for its own."""
    node, signer = checker(), RequestSigner(SESSION, NODE, INSTANCE)
    one, other = (signer.sign(METHOD, PATH, BODY, REQUEST_ID, NOW) for _ in range(2))
    replies = [replied(check(node, received(each)).sign_reply(200, REPLY, 1, NOW)) for each in (one, other)]
    for asked, headers in ((one, replies[1]), (other, replies[0])):
        with pytest.raises(Unauthenticated, match="signature"):
            asked.check_reply(200, REPLY, headers, NOW)
    assert one.check_reply(200, REPLY, replies[0], NOW) == 1


@given(st.binary(max_size=2_000), st.binary(max_size=2_000), st.integers(100, 599), st.integers(0, 10**15 - 1))
@settings(max_examples=40)
def test_what_was_signed_is_accepted(body: bytes, reply: bytes, status: int, receipt: int) -> None:
    """Whatever the bodies, the status and the receipt number."""
    request = sign(body=body)
    checked = check(checker(), received(request), body=body)
    assert checked.request_id == REQUEST_ID
    assert request.check_reply(status, reply, replied(checked.sign_reply(status, reply, receipt, NOW)), NOW) == receipt


# -- the same, by others -----------------------------------------------------------------------------------------------


def test_the_mac_is_hmac_sha256() -> None:
    """RFC 9421 appendix B.2.5, and any message under any key."""
    key = "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
    base = (
        b'"date": Tue, 20 Apr 2021 02:07:55 GMT\n"@authority": example.com\n"content-type": application/json\n'
        b'"@signature-params": ("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"'
    )
    mac = Mac(Session("test-shared-secret", base64.b64decode(key)))
    assert mac.sign(base) == ":pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:"


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=500))
@settings(max_examples=40)
def test_the_mac_is_what_hmac_says(key: bytes, message: bytes) -> None:
    """For every key and message."""
    expected = base64.b64encode(hmac.digest(key, message, "sha256")).decode()
    assert Mac(Session("0" * 16, key)).sign(message) == f":{expected}:"


def test_a_request_and_its_reply_are_written_down() -> None:
    """Every header and both signature bases, literally, as RFC 9421 sections 2.4 and 2.5 have them."""
    digest = "sha-256=:" + base64.b64encode(hashlib.sha256(BODY).digest()).decode() + ":"
    params = (
        '("@method" "@path" "content-digest" "embedmesh-node" "embedmesh-request-id")'
        ';created=1700000000;nonce="00112233445566ff-1";keyid="0123456789abcdef";alg="hmac-sha256"'
    )
    base = (
        '"@method": POST\n'
        '"@path": /v1/embeddings\n'
        f'"content-digest": {digest}\n'
        '"embedmesh-node": node_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n'
        '"embedmesh-request-id": req_1\n'
        f'"@signature-params": {params}'
    )
    signature = ":" + base64.b64encode(hmac.digest(SESSION.key, base.encode(), "sha256")).decode() + ":"
    assert sign().headers.decode() == (
        f"Content-Digest: {digest}\r\n"
        "Embedmesh-Node: node_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n"
        "Embedmesh-Request-Id: req_1\r\n"
        f"Signature-Input: em={params}\r\n"
        f"Signature: em={signature}\r\n"
    )
    reply_digest = "sha-256=:" + base64.b64encode(hashlib.sha256(REPLY).digest()).decode() + ":"
    reply_params = (
        '("@status" "content-digest" "embedmesh-receipt" "@method";req "@path";req "content-digest";req'
        ' "embedmesh-node";req "embedmesh-request-id";req "signature";req;key="em")'
        ';created=1700000001;keyid="0123456789abcdef";alg="hmac-sha256"'
    )
    reply_base = (
        '"@status": 200\n'
        f'"content-digest": {reply_digest}\n'
        '"embedmesh-receipt": 17\n'
        '"@method";req: POST\n'
        '"@path";req: /v1/embeddings\n'
        f'"content-digest";req: {digest}\n'
        '"embedmesh-node";req: node_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n'
        '"embedmesh-request-id";req: req_1\n'
        f'"signature";req;key="em": {signature}\n'
        f'"@signature-params": {reply_params}'
    )
    reply_signature = ":" + base64.b64encode(hmac.digest(SESSION.key, reply_base.encode(), "sha256")).decode() + ":"
    assert check(checker(), received(sign())).sign_reply(200, REPLY, 17, NOW + 1) == [
        ("Content-Digest", reply_digest),
        ("Embedmesh-Receipt", "17"),
        ("Signature-Input", f"em={reply_params}"),
        ("Signature", f"em={reply_signature}"),
    ]


def covered(seen: Any) -> str:
    """What another implementation has found covered, in our form; its last component is always the parameters."""
    *components, last = seen.covered_components
    assert last == '"@signature-params"'
    return f"({' '.join(components)})"


def test_another_implementation_agrees() -> None:
    """PyPI's `http-message-signatures` verifies our requests and replies, and we refuse its order of parameters."""
    others = pytest.importorskip("http_message_signatures")
    keys = {SESSION.key_id: SESSION.key}
    resolver = others.MappingKeyResolver(public_keys=keys, private_keys=keys)
    verifier = others.HTTPMessageVerifier(signature_algorithm=others.algorithms.HMAC_SHA256, key_resolver=resolver)
    request = sign()
    asked = SimpleNamespace(method=METHOD, url=f"https://node.example{PATH}", headers=received(request))
    signed = check(checker(), received(request)).sign_reply(200, REPLY, 17, NOW)
    answered = SimpleNamespace(status_code=200, headers=dict(signed), request=asked)

    (seen,) = verifier.verify(asked, max_age=None, body=BODY)
    assert (seen.label, covered(seen)) == ("em", REQUEST_COVERS)
    (seen,) = verifier.verify(answered, max_age=None, body=REPLY)
    assert (seen.label, covered(seen)) == ("em", REPLY_COVERS)

    signer = others.HTTPMessageSigner(signature_algorithm=others.algorithms.HMAC_SHA256, key_resolver=resolver)
    signer.sign(
        asked,
        key_id=SESSION.key_id,
        created=datetime.datetime.fromtimestamp(NOW, datetime.UTC),
        nonce=f"{INSTANCE}-1",
        label="em",
        use_existing_digest=True,
        covered_component_ids=REQUEST_COVERS.strip("()").replace('"', "").split(),
    )
    theirs = {name.lower(): value for name, value in asked.headers.items()}
    assert theirs == by_hand(f"{REQUEST_COVERS};{CREATED};{KEY_ID};{ALG};{NONCE}")
    with pytest.raises(Unauthenticated, match="malformed"):
        check(checker(), theirs)
