"""What a man in the middle may do: each attack is a function that changes what passes at one place.

`ATTACKS` has them all: the place, and what they do there with what passes, with what they know (`Known`). An attack
that has not changed anything that anybody reads is none: see `meaning.py`.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from random import Random
from typing import Any, Literal, NamedTuple

import msgspec

from bench.middle.parties import NOW_MS, SealedNode
from embedmesh.client.steps import HttpAnswer
from embedmesh.confidential import hpke_scheme
from embedmesh.confidential.documents import read_keys, sign_keys
from embedmesh.confidential.node_keys import FIELD, DhKey
from embedmesh.confidential.statements import sign_answer
from embedmesh.rules.confidential import HPKE_SCHEME, KEY_DOCUMENT, SDK_SCHEME, Scheme, SealedAnswer, SealedCall
from embedmesh.signing.identity import Identity

Place = Literal["locked", "lock", "envelope", "call", "asked", "answer", "reply"]
Body = dict[str, Any]  # of JSON


class Passed(NamedTuple):
    """An earlier call, as the man in the middle saw it pass."""

    scheme: Scheme
    lock: bytes
    envelope: bytes
    call: SealedCall
    answer: SealedAnswer
    reply: HttpAnswer


class Known(NamedTuple):
    """What a man in the middle has: dice, an identity and keys of his own, and all that has passed."""

    dice: Random
    scheme: Scheme  # of the call that he attacks
    passed: list[Passed]  # earlier calls in both schemes, answered and refused
    pinned: SealedNode  # the node that was locked
    other: SealedNode  # another one that the client trusts
    stale: SealedNode  # the node that was locked, with its keys of some days ago
    evil: SealedNode  # his own
    operator: Identity  # his own
    identity: Identity  # of his node

    def an_old(self, scheme: str | None = None, status: int | None = None) -> Passed:
        """An earlier call."""
        fit = [one for one in self.passed if scheme in (None, one.scheme) and status in (None, one.reply.status)]
        return self.dice.choice(fit)


class Attack(NamedTuple):
    """Where it is, what it does there, and whether it needs a gateway that is honest to be refused."""

    place: Place
    do: Callable[[Known, Any], Any]
    honest_gateway: bool = False


ATTACKS: dict[str, Attack] = {}


def attack(place: Place, *, honest_gateway: bool = False) -> Callable[[Callable[[Known, Any], Any]], Any]:
    """Add a function to ATTACKS."""

    def add(do: Callable[[Known, Any], Any]) -> Any:
        name = f"{place}: {do.__name__.rstrip('_').replace('_', ' ')}"
        assert name not in ATTACKS
        ATTACKS[name] = Attack(place, do, honest_gateway)
        return do

    return add


# -- bytes -------------------------------------------------------------------------------------------------------------


def flip(dice: Random, raw: bytes) -> bytes:
    """Another value of one bit."""
    if not raw:
        return b"\x01"
    at = dice.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :]


def cut(dice: Random, raw: bytes) -> bytes:
    """Some of its beginning."""
    return raw[: dice.randrange(len(raw))] if raw else b"\0"


def damage(dice: Random, raw: bytes) -> bytes:
    """Another text, by one change of any kind."""
    start = dice.randrange(len(raw) + 1)
    end = min(len(raw), start + dice.choice((1, 2, 12, 16, 32)))
    piece = raw[start:end]
    return dice.choice(
        (
            lambda: flip(dice, raw),
            lambda: cut(dice, raw),
            lambda: raw[:start] + raw[end:],
            lambda: raw[:start] + piece + raw[start:],
            lambda: raw[:start] + dice.randbytes(len(piece)) + raw[end:],
            lambda: raw[:start] + bytes(len(piece)) + raw[end:],
            lambda: raw[:start] + piece[::-1] + raw[end:],
            lambda: raw[:start] + dice.randbytes(1) + raw[start:],
            lambda: raw + dice.randbytes(dice.choice((1, 16))),
            lambda: raw[start:] + raw[:start],
        )
    )()


def damage_member(known: Known, body: Body, name: str) -> Body:
    """The bytes of a member in base64 are others."""
    raw = b64decode(body[name])
    return body | {name: b64encode(damage(known.dice, raw)).decode()}


def write_otherwise(known: Known, body: Body, names: list[str]) -> Body:
    """A member in base64 has the same bytes in another form, or about the same."""
    name = known.dice.choice([name for name in names if body.get(name)])
    text: str = body[name]
    at = known.dice.randrange(len(text))
    forms = [
        text[:at] + "\n" + text[at:],
        " " + text,
        text + "=",
        text + "\0",
        text.replace("+", "-").replace("/", "_"),
        text.rstrip("="),
    ]
    if text.endswith("="):  # the unused bits of the last letter
        last = text.rstrip("=")
        forms.append(last[:-1] + chr(ord(last[-1]) + 1) + "=" * (len(text) - len(last)))
    return body | {name: known.dice.choice([form for form in forms if form != text])}


def lose(known: Known, body: Body) -> Body:
    """A member is missing, null, or of another kind."""
    name = known.dice.choice(list(body))
    if known.dice.random() < 0.5:
        return {key: value for key, value in body.items() if key != name}
    return body | {name: known.dice.choice((None, [], {}, "", 0, -1, True, [body[name]], {name: body[name]}, 1e300))}


# -- the lock ----------------------------------------------------------------------------------------------------------


@attack("lock")
def a_key_of_his(known: Known, body: Body) -> Body:
    """And the node's document."""
    return body | {"public_key": _text(read_keys(known.evil.signed).keys[body["scheme"]])}


@attack("lock")
def a_fresh_key(known: Known, body: Body) -> Body:
    return body | {"public_key": _text(DhKey.new().public)}


@attack("lock")
def a_node_of_his(known: Known, body: Body) -> Body:
    """Everything is in order, but the identity is another."""
    return _with_keys(body, known.evil)


@attack("lock")
def a_node_of_his_with_the_nodes_evidence(known: Known, body: Body) -> Body:
    return _with_keys(body, known.evil) | {
        "keys": _plain(known.evil.signed) | {"evidence": _plain(known.pinned.signed)["evidence"]}
    }


@attack("lock")
def a_node_of_his_with_evidence_of_his(known: Known, body: Body) -> Body:
    """One piece of evidence of each, in either order."""
    both = [*_plain(known.evil.signed)["evidence"], *_plain(known.pinned.signed)["evidence"]]
    known.dice.shuffle(both)
    return _with_keys(body, known.evil) | {"keys": _plain(known.evil.signed) | {"evidence": both}}


@attack("lock")
def the_nodes_document_signed_by_him(known: Known, body: Body) -> Body:
    document = known.pinned.signed.document
    return body | {"keys": body["keys"] | {"signature": _text(known.identity.sign(KEY_DOCUMENT, document))}}


@attack("lock")
def the_nodes_document_with_his_key(known: Known, body: Body) -> Body:
    """With the node's own signature, or one of his."""
    document = read_keys(known.pinned.signed)
    his = read_keys(known.evil.signed)
    forged = msgspec.json.encode(msgspec.structs.replace(document, keys=his.keys))
    signature = known.dice.choice((known.pinned.signed.signature, known.identity.sign(KEY_DOCUMENT, forged)))
    return body | {
        "public_key": _text(his.keys[body["scheme"]]),
        "keys": body["keys"] | {"document": _text(forged), "signature": _text(signature)},
    }


@attack("lock")
def his_document_in_the_nodes_name(known: Known, body: Body) -> Body:
    """His key, the node's id."""
    his = msgspec.structs.replace(read_keys(known.evil.signed), node_id=known.pinned.node_id)
    document = msgspec.json.encode(his)
    keys = {"document": _text(document), "signature": _text(known.identity.sign(KEY_DOCUMENT, document))}
    return _with_keys(body, known.evil) | {"keys": body["keys"] | keys}


@attack("lock")
def keys_of_days_ago(known: Known, body: Body) -> Body:
    """Which he may have learned since."""
    return _with_keys(body, known.stale)


@attack("lock")
def an_old_key_beside_the_document(known: Known, body: Body) -> Body:
    return body | {"public_key": _text(read_keys(known.stale.signed).keys[body["scheme"]])}


@attack("lock")
def keys_of_another_trusted_node_in_part(known: Known, body: Body) -> Body:
    """A trusted node's document, signature or key beside those of another one."""
    other = _with_keys(body, known.other)
    which = known.dice.choice(("key", "document", "signature"))
    if which == "key":
        return body | {"public_key": other["public_key"]}
    return body | {"keys": body["keys"] | {which: other["keys"][which]}}


@attack("lock")
def evidence_of_others(known: Known, body: Body) -> Body:
    """Or none, or more, or of another kind."""
    own, dice = body["keys"]["evidence"], known.dice
    theirs = _plain(dice.choice((known.other, known.stale, known.evil)).signed)["evidence"]
    renamed = [one | {"kind": dice.choice(("", "enclave", "operator-statement "))} for one in own]
    return body | {"keys": body["keys"] | {"evidence": dice.choice((theirs, [], own + theirs, theirs + own, renamed))}}


@attack("lock")
def evidence_that_was_damaged(known: Known, body: Body) -> Body:
    name = known.dice.choice(("statement", "signature"))
    return body | {"keys": body["keys"] | {"evidence": [damage_member(known, body["keys"]["evidence"][0], name)]}}


@attack("lock")
def the_other_scheme(known: Known, body: Body) -> Body:
    """By name, by key, or in full: a downgrade."""
    scheme: Scheme = SDK_SCHEME if body["scheme"] == HPKE_SCHEME else HPKE_SCHEME
    key = _text(read_keys(known.pinned.signed).keys[scheme])
    change: Body = known.dice.choice(({"scheme": scheme}, {"public_key": key}, {"scheme": scheme, "public_key": key}))
    return body | change


@attack("lock")
def a_key_of_low_order(known: Known, body: Body) -> Body:
    number = known.dice.choice((0, 1, FIELD - 1, FIELD, FIELD + 1))
    return body | {"public_key": _text(number.to_bytes(32, "little"))}


@attack("lock")
def a_key_of_low_order_in_a_document(known: Known, body: Body) -> Body:
    """Signed by him."""
    keys: dict[Scheme, bytes] = {HPKE_SCHEME: bytes(32), SDK_SCHEME: bytes(32)}
    signed = sign_keys(known.identity, {"m": "m-digest"}, keys, NOW_MS - 1, NOW_MS + 10**8)
    return body | {"public_key": _text(bytes(32)), "keys": _plain(signed)}


@attack("lock")
def a_bit_of_the_key(known: Known, body: Body) -> Body:
    return body | {"public_key": _text(flip(known.dice, b64decode(body["public_key"])))}


@attack("lock")
def a_damaged_document(known: Known, body: Body) -> Body:
    return body | {"keys": damage_member(known, body["keys"], known.dice.choice(("document", "signature")))}


@attack("lock")
def an_edited_document(known: Known, body: Body) -> Body:
    """Its validity, models and version are others."""
    document = known.pinned.signed.document
    old, new = known.dice.choice(
        (
            (b'"version":1', b'"version":2'),
            (b'"m":"m-digest"', b'"m":"n-digest"'),
            (b'"models":{', b'"models":{"x":"y",'),
            (b'"not_after_ms":', b'"not_after_ms":9'),
            (b'"not_before_ms":1', b'"not_before_ms":0'),
            (b'{"version"', b'{"keys":{},"version"'),
        )
    )
    assert old in document
    return body | {"keys": body["keys"] | {"document": _text(document.replace(old, new))}}


@attack("lock")
def a_lock_that_passed_before(known: Known, body: Body) -> Body:
    """Of the node of days ago, or of another call: in whole, but for the number."""
    old: Body = json.loads(known.an_old(body["scheme"]).lock)
    return _with_keys(old, known.dice.choice((known.stale, known.evil))) | {"stack_small_id": body["stack_small_id"]}


@attack("lock")
def another_form_of_the_key(known: Known, body: Body) -> Body:
    return write_otherwise(known, body, ["public_key"])


@attack("lock", honest_gateway=True)
def another_lock(known: Known, body: Body) -> Body:
    """The number of another call's lock, or of none."""
    number = known.dice.choice([json.loads(one.lock)["stack_small_id"] for one in known.passed] + [10**9])
    return body | {"stack_small_id": number}


@attack("lock", honest_gateway=True)
def another_expiry(known: Known, body: Body) -> Body:
    by_ms = known.dice.choice((-(10**6), -1, 1, 1_000, 30_000, 10**9))
    return body | {"expires_ms": body["expires_ms"] + by_ms}


@attack("lock", honest_gateway=True)
def another_model_locked(known: Known, body: Body) -> Body:
    return body | {"model": known.dice.choice(("n", "x", "", "m:exact"))}


@attack("lock", honest_gateway=True)
def a_member_missing_in_the_lock(known: Known, body: Body) -> Body:
    if known.dice.random() < 0.3:
        return body | {"keys": lose(known, body["keys"])}
    return lose(known, body)


# -- the sealed request ------------------------------------------------------------------------------------------------

SEALED = ["ciphertext", "client_dh_public_key", "node_dh_public_key", "nonce", "plaintext_body_hash", "salt"]


@attack("envelope")
def damage_of_what_is_sealed(known: Known, body: Body) -> Body:
    return damage_member(known, body, known.dice.choice([name for name in SEALED if name in body]))


@attack("envelope")
def a_bit_of_what_is_sealed(known: Known, body: Body) -> Body:
    name = known.dice.choice([name for name in SEALED if name in body])
    return body | {name: _text(flip(known.dice, b64decode(body[name])))}


@attack("envelope")
def another_form_of_what_is_sealed(known: Known, body: Body) -> Body:
    return write_otherwise(known, body, SEALED)


@attack("envelope")
def an_earlier_request(known: Known, body: Body) -> Body:
    """Under the lock of now, or its own."""
    old: Body = json.loads(known.an_old(known.scheme).envelope)
    return known.dice.choice((old, old | {"stack_small_id": body["stack_small_id"]}))


@attack("envelope")
def a_member_of_an_earlier_request(known: Known, body: Body) -> Body:
    old = json.loads(known.an_old(known.scheme).envelope)
    name = known.dice.choice([name for name in body if old.get(name) != body[name]])
    return body | {name: old[name]}


@attack("envelope")
def an_earlier_reply_as_the_request(known: Known, body: Body) -> Body:
    """Reflection, to the node."""
    sealed = known.an_old(known.scheme, 200).answer
    change = {"ciphertext": _text(sealed.sealed)}
    if known.scheme == SDK_SCHEME:
        change |= {"nonce": _text(sealed.nonce), "plaintext_body_hash": _text(sealed.response_hash)}
    return body | change


@attack("envelope")
def other_words_around_the_seal(known: Known, body: Body) -> Body:
    """Model, lock, request id, expiry, key or scheme."""
    dice = known.dice
    change: Body = dice.choice(
        (
            {"model_name": dice.choice(("n", "m ", "M", "m:exact"))},
            {"stack_small_id": body["stack_small_id"] % 2 + 1},
            {"request_id": dice.choice(("", "0" * 32, body.get("request_id", "") + "0"))},
            {"expires_ms": (body.get("expires_ms") or 0) + dice.choice((-1, 1, 10**7))},
            {"node_dh_public_key": _text(read_keys(dice.choice((known.other, known.evil)).signed).keys[known.scheme])},
            {"scheme": SDK_SCHEME if known.scheme == HPKE_SCHEME else HPKE_SCHEME},
        )
    )
    return body | change


@attack("envelope")
def a_member_missing_in_the_request(known: Known, body: Body) -> Body:
    return lose(known, body)


@attack("call")
def a_member_of_the_call(known: Known, call: SealedCall) -> SealedCall:
    """Between gateway and node: what the envelope cannot even say."""
    dice = known.dice
    names = ["ciphertext", "client_key", "salt", "nonce", "body_hash", "node_key"]
    bound: dict[str, object] = {
        "model": dice.choice(("n", "x")),
        "model_name": dice.choice(("n", "")),
        "lock": call.lock + 1,
        "units": dice.randrange(4),
        **{name: damage(dice, getattr(call, name))[: {"salt": 16, "nonce": 12}.get(name, 32)] for name in names},
        "ciphertext": damage(dice, call.ciphertext),
    }
    if known.scheme == HPKE_SCHEME:
        bound |= {"request_id": "0", "expires_ms": call.expires_ms + 1}
    name = dice.choice(list(bound))
    return msgspec.structs.replace(call, **{name: bound[name]})


@attack("call")
def an_earlier_call(known: Known, call: SealedCall) -> SealedCall:
    old = known.an_old(known.scheme).call
    return known.dice.choice((old, msgspec.structs.replace(old, lock=call.lock)))


@attack("asked")
def another_node(known: Known, node: SealedNode) -> SealedNode:
    """Which the client trusts, or his, or the same with other keys."""
    return known.dice.choice((known.other, known.evil, known.stale))


# -- the answer --------------------------------------------------------------------------------------------------------


@attack("answer")
def an_earlier_answer(known: Known, answer: SealedAnswer) -> SealedAnswer:
    return known.an_old().answer


@attack("answer")
def a_member_of_an_earlier_answer(known: Known, answer: SealedAnswer) -> SealedAnswer:
    """Its seal, its statement, its signature, some of them."""
    old, dice = known.an_old(known.scheme).answer, known.dice
    names = ["statement", "signature", "sealed"]
    if known.scheme == SDK_SCHEME:
        names += ["nonce", "response_hash", "response_signature"]
    some = dice.sample(names, dice.randrange(1, len(names)))
    return msgspec.structs.replace(answer, **{name: getattr(old, name) for name in some})


@attack("answer")
def an_earlier_statement(known: Known, answer: SealedAnswer) -> SealedAnswer:
    old = known.an_old().answer
    return msgspec.structs.replace(answer, statement=old.statement, signature=old.signature)


@attack("answer")
def damage_of_an_answer(known: Known, answer: SealedAnswer) -> SealedAnswer:
    names = ["statement", "sealed"]
    if known.scheme == SDK_SCHEME:
        names += ["nonce", "response_hash", "response_signature"]
    name = known.dice.choice([name for name in names if getattr(answer, name)])
    raw = damage(known.dice, getattr(answer, name))
    return msgspec.structs.replace(answer, **{name: raw})


@attack("answer")
def a_bit_of_an_answer(known: Known, answer: SealedAnswer) -> SealedAnswer:
    names = ["statement", "signature", "sealed", "nonce", "response_hash", "response_signature"]
    name = known.dice.choice([name for name in names if getattr(answer, name)])
    return msgspec.structs.replace(answer, **{name: flip(known.dice, getattr(answer, name))})


@attack("answer")
def bytes_moved_between_members(known: Known, answer: SealedAnswer) -> SealedAnswer:
    """So that what is hashed one after the other is the same."""
    joined = answer.nonce + answer.sealed
    end = known.dice.choice([size for size in (0, 1, 11, 12) if size != len(answer.nonce)])
    return msgspec.structs.replace(answer, nonce=joined[:end], sealed=joined[end:])


@attack("answer")
def a_statement_of_his(known: Known, answer: SealedAnswer) -> SealedAnswer:
    """Over the node's seal, in his name."""
    return _stated(known, answer, known.dice.choice((known.identity, known.operator)), None)


@attack("answer")
def a_statement_of_another_trusted_node(known: Known, answer: SealedAnswer) -> SealedAnswer:
    return _stated(known, answer, known.other.identity, None)


@attack("answer")
def another_count_in_the_statement(known: Known, answer: SealedAnswer) -> SealedAnswer:
    """Signed by him, or by nobody."""
    tokens = known.dice.choice((0, 1, 10**6))
    signed = _stated(known, answer, known.identity, tokens)
    return known.dice.choice((signed, msgspec.structs.replace(signed, signature=answer.signature)))


# -- the reply ---------------------------------------------------------------------------------------------------------

SIGNED = ["ciphertext", "statement", "statement_signature"]
SDK_SIGNED = ["nonce", "response_hash", "signature"]


@attack("reply")
def other_usage(known: Known, reply: HttpAnswer) -> HttpAnswer:
    body = json.loads(reply.body)
    usage = body["usage"]
    other = usage["total_tokens"] + known.dice.choice((-1, 1, 1_000))
    name = known.dice.choice(("prompt_tokens", "total_tokens", ""))
    change = {name: other} if name else {"prompt_tokens": other, "total_tokens": other}
    return _with_body(reply, body | {"usage": usage | change})


@attack("reply")
def an_earlier_reply(known: Known, reply: HttpAnswer) -> HttpAnswer:
    """To the same client, the same text even."""
    return known.an_old().reply


@attack("reply")
def a_member_of_an_earlier_reply(known: Known, reply: HttpAnswer) -> HttpAnswer:
    body, old = json.loads(reply.body), json.loads(known.an_old(known.scheme, 200).reply.body)
    names = [name for name in body if old[name] != body[name]]
    some = known.dice.sample(names, known.dice.randrange(1, len(names) + 1))
    return _with_body(reply, body | {name: old[name] for name in some})


@attack("reply")
def damage_of_a_reply(known: Known, reply: HttpAnswer) -> HttpAnswer:
    body = json.loads(reply.body)
    return _with_body(reply, damage_member(known, body, known.dice.choice(_read(known))))


@attack("reply")
def another_form_of_a_reply(known: Known, reply: HttpAnswer) -> HttpAnswer:
    return _with_body(reply, write_otherwise(known, json.loads(reply.body), _read(known)))


@attack("reply")
def a_member_missing_in_the_reply(known: Known, reply: HttpAnswer) -> HttpAnswer:
    return _with_body(reply, lose(known, json.loads(reply.body)))


@attack("reply")
def another_status(known: Known, reply: HttpAnswer) -> HttpAnswer:
    """And the same body."""
    return reply._replace(status=known.dice.choice((201, 204, 302, 400, 401, 402, 404, 409, 429, 500, 502, 503)))


@attack("reply")
def success_in_place_of_a_refusal(known: Known, reply: HttpAnswer) -> HttpAnswer:
    """A refusal's seal in a reply's form, and the other way around."""
    old = known.an_old(known.scheme, 400).reply
    sealed = json.loads(old.body)["error"].get("sealed", {})
    usage = json.loads(reply.body)["usage"]
    own = json.loads(reply.body)
    refusal = {"error": {"message": "x", "type": "x", "param": None, "code": "confidential_refused", "sealed": own}}
    return known.dice.choice(
        (_with_body(reply, sealed | {"usage": usage}), HttpAnswer(400, {}, json.dumps(refusal).encode()))
    )


@attack("reply")
def a_plain_reply(known: Known, reply: HttpAnswer) -> HttpAnswer:
    """As an ordinary call gets it."""
    usage = json.loads(reply.body)["usage"]
    vector = b64encode(bytes(range(64, 80))).decode()
    data = [{"object": "embedding", "index": 0, "embedding": vector}]
    return _with_body(reply, {"object": "list", "data": data, "model": "m", "usage": usage})


@attack("reply")
def a_reply_sealed_by_him(known: Known, reply: HttpAnswer) -> HttpAnswer:
    """With a secret of his, by the rules."""
    body = json.loads(reply.body)
    terms = hpke_scheme.Terms(known.pinned.node_id, "m", "0", 1, NOW_MS)
    sealed = hpke_scheme.HpkeOpened(known.dice.randbytes(32), known.dice.randbytes(32), terms, b"").seal_reply(b"{}")
    return _with_body(reply, body | {"ciphertext": _text(sealed)})


@attack("locked")
def no_lock(known: Known, reply: HttpAnswer) -> HttpAnswer:
    """As if the gateway knew no confidential calls: the texts must not be sent in another way."""
    status = known.dice.choice((301, 308, 400, 401, 403, 404, 405, 410, 426, 429, 500, 501, 503))
    code = known.dice.choice(("not_found", "key_mismatch", "lock_expired", "unknown_url"))
    error = {"message": "Use /v1/embeddings.", "type": "invalid_request_error", "param": None, "code": code}
    return HttpAnswer(status, {"location": "/v1/embeddings"}, json.dumps({"error": error}).encode())


@attack("lock", honest_gateway=True)
def a_damaged_text_of_the_lock(known: Known, body: bytes) -> bytes:
    return damage(known.dice, body)


@attack("envelope")
def a_damaged_text_of_the_request(known: Known, body: bytes) -> bytes:
    return damage(known.dice, body)


@attack("reply")
def a_damaged_text_of_the_reply(known: Known, reply: HttpAnswer) -> HttpAnswer:
    return reply._replace(body=damage(known.dice, reply.body))


TEXTS = {a_damaged_text_of_the_lock, a_damaged_text_of_the_request}  # work on the text, the others on its members


# -- parts -------------------------------------------------------------------------------------------------------------


def _text(raw: bytes) -> str:
    return b64encode(raw).decode("ascii")


def _plain(value: object) -> Body:
    found: Body = json.loads(msgspec.json.encode(value))
    return found


def _with_keys(body: Body, node: SealedNode) -> Body:
    """The lock as it would be for that node."""
    return body | {"public_key": _text(read_keys(node.signed).keys[body["scheme"]]), "keys": _plain(node.signed)}


def _with_body(reply: HttpAnswer, body: Body) -> HttpAnswer:
    return reply._replace(body=json.dumps(body).encode())


def _read(known: Known) -> list[str]:
    """Members of a reply in base64 that this client reads."""
    return SIGNED + (SDK_SIGNED if known.scheme == SDK_SCHEME else [])


def _stated(known: Known, answer: SealedAnswer, identity: Identity, tokens: int | None) -> SealedAnswer:
    """The answer with a statement that fits it, by another identity."""
    said = json.loads(answer.statement)
    statement, signature = sign_answer(
        identity,
        said["lock"],
        b64decode(said["request_digest"]),
        answer.sealed,
        said["status"],
        said["tokens"] if tokens is None else tokens,
        NOW_MS,
        nonce=answer.nonce,
    )
    return msgspec.structs.replace(answer, statement=statement, signature=signature)
