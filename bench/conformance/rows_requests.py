"""Rows about what is asked: inputs that are empty, too many, too long, in other alphabets or no text at all."""

import gzip
import json
from collections.abc import Callable
from typing import Any

from bench.conformance.bed import Bed, fresh
from bench.conformance.caller import Broken, check_envelope, check_refused, check_right
from bench.conformance.node import MAX_TOKENS, NAMES
from bench.conformance.row import Row
from bench.rig.http import MODEL

INPUTS_MAX = 2_048  # of OpenAI's API
HELLO, HELLO_IDS = "Hello, world", [9906, 11, 1917]  # in cl100k_base
SECRET = "session=of-a-caller"
KEY_WRONG = "sk-" + 40 * "x"


def refused(*given: Any, **more: Any) -> Callable[[Bed], str]:
    """Each of these inputs."""

    def attempt(bed: Bed) -> str:
        for each in given:
            try:
                check_refused(bed.target.embed(each, **more), 400)
            except Broken as what:
                raise Broken(f"{_short(each)}: {what}" if len(given) > 1 else str(what)) from None
        return ""

    return attempt


def _short(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def refused_bytes(*inputs: bytes) -> Callable[[Bed], str]:
    """Bodies whose `input` is written as it stands here."""

    def attempt(bed: Bed) -> str:
        for each in inputs:
            check_refused(bed.target.ask(b'{"model":"%s","input":%s}' % (MODEL.encode(), each)), 400)
        return ""

    return attempt


def cl100k_ids(bed: Bed) -> str:
    """LangChain and others send ids of cl100k_base. The nodes, as vLLM, take them for their own vocabulary's."""
    answer = bed.target.embed(HELLO_IDS)
    if answer.status != 200:
        check_refused(answer, 400)
        return "refused"
    try:
        check_right(answer, bed.truth.vectors([HELLO]))
    except Broken:
        raise Broken("200, another text's vector") from None
    return ""


def most_inputs(bed: Bed) -> str:
    """In their order."""
    bed.check_embeds([fresh() for _ in range(INPUTS_MAX)])
    return ""


def too_many_inputs(bed: Bed) -> str:
    """One more than the API takes."""
    check_refused(bed.target.embed([fresh() for _ in range(INPUTS_MAX + 1)]), 400)
    return ""


def too_long(bed: Bed) -> str:
    """The nodes cut it and say nothing."""
    answer = bed.target.embed([f"{fresh()} " + "harbour " * 2 * MAX_TOKENS])
    if answer.status == 200 and not any("truncat" in name for name in answer.headers):
        raise Broken("200, cut without a word")
    if answer.status != 200:
        check_refused(answer, 400)
    return ""


def the_same_twice(bed: Bed) -> str:
    """A vector for each."""
    one, other = fresh(), fresh()
    bed.check_embeds([one, one, other, one])
    return ""


def unicode_unchanged(bed: Bed) -> str:
    """What the nodes get is what was sent, to the last code point."""
    marks = ("é", "e\u0301", "a\u0000b", "👨‍👩‍👧 \U0001f600", "\ufeffx", "  spaces \n", "שלום", "\u2028")
    texts = [f"{fresh()} {mark}" for mark in marks]
    with bed.both("honest"):
        bed.check_embeds(texts)
        came = {text for node in bed.nodes for seen in node.seen for text in seen.texts}
    if changed := [each for each in texts if each not in came]:
        raise Broken(f"changed: {len(changed)} of {len(texts)}")
    return ""


def unknown_member(bed: Bed) -> str:
    """A typo in `truncate` would otherwise be found in the vectors, much later."""
    answer = bed.target.embed([fresh()], trunctate="end")
    if answer.status == 200 and not any("trunctate" in value for value in answer.headers.values()):
        raise Broken("200, passed over")
    if answer.status != 200:
        check_refused(answer, 400)
    return ""


def user_is_taken(bed: Bed) -> str:
    """A member that OpenAI's clients send."""
    bed.check_embeds([fresh()], user="alice")
    return ""


def floats_by_default(bed: Bed) -> str:
    """Without `encoding_format`."""
    text = fresh()
    check_right(bed.target.ask({"model": MODEL, "input": text}), bed.truth.vectors([text]), "float")
    return ""


# -- HTTP --------------------------------------------------------------------------------------------------------------


def wrong_key(bed: Bed) -> str:
    """Another key, and none; no node is asked."""
    bed.need_keys()
    for key in (f"Bearer {KEY_WRONG}", None):
        with bed.both("honest"):
            answer = bed.target.embed([fresh()], headers={"Authorization": key})
            check_refused(answer, 401)
            check_envelope(answer)
            if any(node.seen for node in bed.nodes):
                raise Broken("401, after a node was asked")
    return ""


def envelope(bed: Bed) -> str:
    """Of an empty input, an unknown model and a body that is no JSON."""
    empty = bed.target.embed("")
    unknown = bed.target.ask({"model": "text-embedding-of-nobody", "input": fresh()})
    broken = bed.target.ask(b'{"model": ')
    for answer, statuses, code in ((empty, (400,), None), (unknown, (404,), "model_not_found"), (broken, (400,), None)):
        check_refused(answer, *statuses)
        check_envelope(answer, code)
    return ""


def request_id(bed: Bed) -> str:
    """With a success and with a refusal, and not the same."""
    answers = bed.check_embeds([fresh()]), bed.target.embed("")
    check_refused(answers[1], 400)
    ids = [answer.headers.get("x-request-id") for answer in answers]
    if not all(ids) or ids[0] == ids[1]:
        raise Broken("none" if not any(ids) else "not with all")
    return ""


def keeps_headers(bed: Bed) -> str:
    """The caller's cookies, and its key where the gateway has keys."""
    with bed.both("honest"):
        text = fresh()
        check_right(bed.target.embed([text], headers={"Cookie": SECRET}), bed.truth.vectors([text]))
        came = [value for node in bed.nodes for seen in node.seen for value in seen.headers.values()]
    leaked = [
        words
        for words, secret in (("cookie", SECRET), ("key", bed.target.key if bed.keys and bed.hides_key else None))
        if secret is not None and any(secret in value for value in came)
    ]
    if leaked:
        raise Broken(f"{' and '.join(leaked)} passed on")
    return ""


def lists_models(bed: Bed) -> str:
    """By a name that a request may use."""
    bed.need_list()
    if not _is_listed(bed):
        raise Broken("not listed")
    return ""


def _is_listed(bed: Bed) -> bool:
    answer = bed.target.ask(method="GET", path="/v1/models")
    if answer.status != 200:
        raise Broken(answer.words)
    entries = answer.json().get("data") or []
    return any({each.get("id"), *each.get("aliases", ())} & set(NAMES) for each in entries)


def lists_what_is_served(bed: Bed) -> str:
    """Both nodes go away, and come back."""
    lists_models(bed)
    for node in bed.nodes:
        node.down()
    try:
        bed.several()
        answer = bed.target.ask(method="GET", path="/v1/models")
        listed = answer.status == 200 and _is_listed(bed)
    finally:
        for node in bed.nodes:
            node.up()
    if listed:
        raise Broken("listed, and nobody serves it")
    return ""


def head(bed: Bed) -> str:
    """As GET, without a body."""
    lists_models(bed)
    answer = bed.target.ask(method="HEAD", path="/v1/models")
    if answer.status != 200 or answer.body:
        raise Broken(answer.words)
    return ""


def other_method(bed: Bed) -> str:
    """405, with the method that there is."""
    answer = bed.target.ask(method="GET")
    if answer.status != 405:
        raise Broken(answer.words)
    if "POST" not in answer.headers.get("allow", ""):
        raise Broken("405, without Allow")
    return ""


def other_path(bed: Bed) -> str:
    """A letter less, in the error envelope."""
    missed = bed.target.ask({"model": MODEL, "input": fresh()}, path="/v1/embedding")
    if missed.status != 404:
        raise Broken(missed.words)
    check_envelope(missed)
    return ""


def compressed(bed: Bed) -> str:
    """Right vectors, or a refusal."""
    text = fresh()
    body = gzip.compress(json.dumps({"model": MODEL, "input": text, "encoding_format": "base64"}).encode())
    answer = bed.target.ask(body, headers={"Content-Encoding": "gzip"})
    if answer.status != 200:
        check_refused(answer, 400, 415)
        return "refused"
    check_right(answer, bed.truth.vectors([text]))
    return ""


def in_chunks(bed: Bed) -> str:
    """A body without a length."""
    text = fresh()
    body = json.dumps({"model": MODEL, "input": text, "encoding_format": "base64"}).encode()
    answer = bed.target.ask(iter((body[:20], body[20:])))
    check_right(answer, bed.truth.vectors([text]))
    return ""


ASKED = "What is asked"
HTTP = "HTTP"

ROWS = (
    Row(ASKED, "An empty text, an empty array, an empty text in an array: refused", refused("", [], ["a harbour", ""])),
    Row(ASKED, "Mixed types, a number, an object: refused", refused(["a", 1], 5, {"a": 1}, None)),
    Row(ASKED, "Token ids of cl100k_base: the text's vector, or refused", cl100k_ids),
    Row(ASKED, "2,048 inputs: one vector each, in order", most_inputs),
    Row(ASKED, "2,049 inputs: refused", too_many_inputs),
    Row(ASKED, "A text that is too long: refused, or the reply says that it was cut", too_long),
    Row(ASKED, "The same text twice: two vectors", the_same_twice),
    Row(ASKED, "NFC, NFD, NUL, emoji, spaces, right-to-left: as they were sent", unicode_unchanged),
    Row(ASKED, "Half a surrogate pair, bytes that are no UTF-8: refused", refused_bytes(b'"\\ud800"', b'"a\xff"')),
    Row(ASKED, "A body that is cut, or has NaN in it: refused", refused_bytes(b'"a harbour', b"NaN")),
    Row(ASKED, "A member that nobody knows (a typo): refused, or named in the reply", unknown_member),
    Row(ASKED, "`encoding_format: int8`: refused", refused(["a harbour"], encoding_format="int8")),
    Row(ASKED, "`user` is taken", user_is_taken),
    Row(ASKED, "Without `encoding_format`: floats", floats_by_default),
    Row(HTTP, "A wrong key, or none: 401, and no node is asked", wrong_key),
    Row(HTTP, "Errors have OpenAI's envelope: message, type, param, code", envelope),
    Row(HTTP, "`x-request-id` with successes and refusals", request_id),
    Row(HTTP, "Cookies and the caller's key do not reach nodes", keeps_headers),
    Row(HTTP, "`/v1/models` lists the model", lists_models),
    Row(HTTP, "`/v1/models` does not list what no node serves", lists_what_is_served),
    Row(HTTP, "HEAD where GET is", head),
    Row(HTTP, "GET on a route for POST: 405 with `Allow`", other_method),
    Row(HTTP, "An unknown path: 404 in the envelope", other_path),
    Row(HTTP, "A compressed body: right vectors, or refused", compressed),
    Row(HTTP, "A body in chunks, without a length", in_chunks),
)
