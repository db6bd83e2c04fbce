"""Rows about nodes that fail, beside one that is well; and about what a caller pays for, where there is money."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

from bench.conformance.bed import RIGHT, Bed, fresh
from bench.conformance.caller import Broken, NotClaimed, check_envelope, check_refused
from bench.conformance.row import Row
from bench.conformance.rows_answers import judged, wrong_answer
from bench.rig.http import MODEL, Wire, http_request
from bench.rig.processes import HOST

MANY = 100  # inputs, where a node takes 32
LEFT_S = 0.5  # after which a caller goes away: the node still computes
TWIN_S = 0.5  # until it asks again, as SDKs do


def down(bed: Bed) -> str:
    """It refuses connections."""
    bed.first.down()
    try:
        return judged(bed.several(), all_served=True)
    finally:
        bed.first.up()


def both_busy(bed: Bed) -> str:
    """Load is passed on as load, with a time to wait."""
    with bed.both("busy"):
        answer = bed.target.embed(fresh())
    check_refused(answer, 429, 503)
    if "retry-after" not in answer.headers:
        raise Broken(f"{answer.status}, without Retry-After")
    check_envelope(answer)
    return ""


def both_down(bed: Bed) -> str:
    """In words that a client understands."""
    bed.check_embeds([fresh()])
    for node in bed.nodes:
        node.down()
    try:
        answer = bed.target.embed(fresh())
    finally:
        for node in bed.nodes:
            node.up()
    check_refused(answer, 500, 502, 503, 504)
    check_envelope(answer)
    return ""


def split(bed: Bed) -> str:
    """The default of TEI. The vectors come in order."""
    with bed.both("few-inputs"):
        bed.check_embeds([fresh() for _ in range(MANY)])
    return ""


def redirected(bed: Bed) -> str:
    """Its address is not one that the operator has named."""
    bed.first.elsewhere = f"http://{HOST}:{bed.third.port}"
    with bed.first.being("redirect"), bed.third.being("honest"):
        found = bed.several_until_met()
        if bed.third.seen:
            raise Broken("the third server got the texts")
    if passed := [words for words in found if words.startswith("3")]:
        raise Broken(f"{passed[0]}, passed on to the caller")
    return judged(found)


# -- money -------------------------------------------------------------------------------------------------------------


@contextmanager
def charging(bed: Bed, requests: Callable[[], int], tokens: Callable[[], int | None]) -> Iterator[None]:
    """What the block is charged. Raises Broken where it is anything else."""
    money = bed.need_money()
    before = money()
    yield
    found = tuple(now - was for now, was in zip(money(), before, strict=True))
    if found[0] != requests():
        raise Broken(f"{found[0]} charges instead of {requests()}")
    if tokens() is not None and found[1] != tokens():
        raise Broken(f"{found[1]} tokens charged instead of {tokens()}")


def charged_once(bed: Bed) -> str:
    """The node has computed, and the second one computes again."""
    served = 0
    with charging(bed, lambda: served, lambda: None), bed.first.being("close-mid-body"):
        found = bed.several_until_met()
        served = found[RIGHT]
    return judged(found)


def charged_tokens(bed: Bed) -> str:
    """Nodes that claim a billion tokens change nothing."""
    texts = [fresh(), fresh()]
    tokens = bed.truth.tokens(bed.truth.ids(texts))
    with charging(bed, lambda: 1, lambda: tokens), bed.both("absurd-usage"):
        bed.check_embeds(texts)
    return ""


def refused_is_free(bed: Bed) -> str:
    """Of the caller's making, and of the nodes'."""
    with charging(bed, lambda: 0, lambda: 0):
        for given in ("", [], ["a", ""]):
            check_refused(bed.target.embed(given), 400)
        with bed.both("nan"):
            check_refused(bed.target.embed(fresh()), 502, 503)
    return ""


def idempotent(bed: Bed) -> str:
    """The same reply, computed and charged once."""
    if not bed.repeats:
        raise NotClaimed
    text, headers = fresh(), {"Idempotency-Key": uuid4().hex}
    with charging(bed, lambda: 1, lambda: None), bed.both("honest"):
        answers = [bed.check_embeds([text], headers=headers) for _ in range(3)]
        computed = sum(seen.texts.count(text) for node in bed.nodes for seen in node.seen)
    if len({answer.body for answer in answers}) > 1:
        raise Broken("another reply")
    if computed != 1:
        raise Broken(f"computed {computed} times")
    return ""


def idempotent_conflict(bed: Bed) -> str:
    """A program's mistake, told at once."""
    if not bed.repeats:
        raise NotClaimed
    headers = {"Idempotency-Key": uuid4().hex}
    bed.check_embeds([fresh()], headers=headers)
    answer = bed.target.embed([fresh()], headers=headers)
    check_refused(answer, 409)
    check_envelope(answer)
    return ""


def retried(bed: Bed) -> str:
    """As an SDK does that waits no longer: it has no Idempotency-Key."""
    texts = [fresh()]
    body = json.dumps({"model": MODEL, "input": texts, "encoding_format": "base64"}).encode()
    with charging(bed, lambda: 1, lambda: None), bed.both("late"):
        with suppress(OSError), Wire((HOST, bed.target.port)) as wire:
            wire.send(http_request("POST", "/v1/embeddings", body, key=bed.target.key))
            time.sleep(LEFT_S)
        time.sleep(TWIN_S)
        bed.check_embeds(texts, headers={"x-stainless-retry-count": "1"})
    return ""


FAILS = "Nodes that fail; the other one is well"
MONEY = "What is paid"

ROWS = (
    Row(FAILS, "It is down: all are served", down),
    Row(FAILS, "500 at once: all are served", wrong_answer("error-500", all_served=True)),
    Row(FAILS, "It never answers: all are served within 20 s", wrong_answer("hang", all_served=True)),
    Row(FAILS, "A byte every 0.2 s: all are served within 20 s", wrong_answer("drip", all_served=True)),
    Row(FAILS, "A reset: all are served", wrong_answer("reset", all_served=True)),
    Row(
        FAILS,
        "It hangs up before the end of its answer: all are served",
        wrong_answer("close-mid-body", all_served=True),
    ),
    Row(FAILS, "429 with `Retry-After`: all are served", wrong_answer("busy", all_served=True)),
    Row(FAILS, "Both say 429: 429 or 503, with `Retry-After`", both_busy),
    Row(FAILS, "Both are down: 5xx in OpenAI's envelope, within 20 s", both_down),
    Row(FAILS, "100 inputs, nodes that take 32: all vectors, in order", split),
    Row(FAILS, "It redirects to a third server: that gets nothing", redirected),
    Row(MONEY, "It computes and hangs up, the other one computes again: charged once", charged_once),
    Row(MONEY, "The nodes say a billion tokens: charged for those that were embedded", charged_tokens),
    Row(MONEY, "What was refused, or not answered rightly, is free", refused_is_free),
    Row(MONEY, "An `Idempotency-Key` three times: one reply, computed and charged once", idempotent),
    Row(MONEY, "An `Idempotency-Key` with another body: 409", idempotent_conflict),
    Row(MONEY, "The caller gives up while a node computes, and tries again: charged once", retried),
)
