"""What the node can do wrong: one table, by which its code is driven. Each mode says what it does in one sentence.

A mode may act at four points of an answer's life, in this order: `instead` of embedding at all, on the `rows` and
tokens before they are signed, on the signed reply (`signed`), and on the receipt. What it has no hook for is honest.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from aiohttp import web

from bench.faultnode import acts
from bench.faultnode.acts import PHASE_S, RETRY_AFTER_S, Answer, State, Turn
from bench.faultnode.scripted import vectors
from bench.rig.http import Vectors

EXTRA_TOKENS = 1_000  # that a false receipt claims

Family = Literal["well", "dead", "wrong", "forged", "lies", "busy", "refuses", "cuts", "slow"]
"""`wrong` answers fail a check, `forged` ones are not signed as agreed, `lies` can only be found by asking others."""


@dataclass(frozen=True)
class Mode:
    """One way to be wrong, and what should become of a node that does it always."""

    says: str
    family: Family
    instead: Callable[[Turn], Awaitable[web.StreamResponse | None]] | None = None  # None: go on
    rows: Callable[[Turn, Vectors, int], Answer] = acts.same
    signed: Callable[[Turn, web.Response], None] | None = None
    slowness: Callable[[State], float] = lambda state: 1.0
    receipt_tokens: int = 0  # more than were embedded
    in_part: bool = True  # whether it makes sense for some requests only
    from_start: bool = False  # whether it is about how a node begins


MODES: dict[str, Mode] = {
    "honest": Mode("answers right", "well", in_part=False),
    "hang": Mode("takes the request and never answers", "dead", acts.hang),
    "drip": Mode("answers right, one byte every 0.2 s", "dead", acts.drip),
    "garbage": Mode("answers 2,000 random bytes", "wrong", acts.garbage),
    "html": Mode("answers a web page with status 200", "forged", acts.html),
    "wrong-dimension": Mode(
        "rows lack their last component", "wrong", rows=lambda t, r, n: (r[:, :-1], n), in_part=False
    ),
    "wrong-count": Mode("one row too few or too many", "wrong", rows=acts.wrong_count),
    "wrong-order": Mode("rows moved on by one place", "lies", rows=lambda t, r, n: (np.roll(r, 1, axis=0), n)),
    "duplicate": Mode("the first row for every input", "lies", rows=lambda t, r, n: (np.repeat(r[:1], len(r), 0), n)),
    "nan": Mode("one component is not a number", "wrong", rows=acts.spoilt(float("nan"))),
    "inf": Mode("one component is infinite", "wrong", rows=acts.spoilt(float("inf")), in_part=False),
    "zero": Mode("one row is all zeros", "wrong", rows=acts.zero, in_part=False),
    "oversize": Mode("a body of 64 MB", "wrong", acts.oversize),
    "wrong-tokens": Mode("counts one token more", "wrong", rows=lambda t, r, n: (r, n + 1)),
    "wrong-signature": Mode("one character of the signature is another", "forged", signed=acts.wrong_signature),
    "no-signature": Mode("the reply is not signed", "forged", signed=acts.no_signature),
    "replayed-signature": Mode("repeats the first reply, signature and all", "forged", signed=acts.replayed),
    "other-session": Mode(
        "signs under a key that was never agreed", "forged", signed=acts.other_session, in_part=False
    ),
    "other-model": Mode("vectors of another model", "lies", rows=acts.other_model),
    "noise": Mode("each component moved by 0.05, then back to unit length", "lies", rows=acts.noise),
    "constant": Mode(
        "the same vector for every text", "lies", rows=lambda t, r, n: (np.repeat(_still(r), len(r), 0), n)
    ),
    "lie-on-large": Mode(
        "vectors of another model where a request has more than 8 inputs", "lies", rows=acts.lie_on_large
    ),
    "busy-429": Mode("429 with Retry-After", "busy", acts.refusal(429, "overloaded", Retry_After=str(RETRY_AFTER_S))),
    "busy-503": Mode(
        "503 with Retry-After", "busy", acts.refusal(503, "overloaded", Retry_After=str(RETRY_AFTER_S)), in_part=False
    ),
    "error-500": Mode("500 at once", "refuses", acts.refusal(500, "internal_error")),
    "refuse-400": Mode("400 at once, to requests that are right", "refuses", acts.refusal(400, "invalid_value")),
    "reset": Mode("a TCP reset when the request has come", "cuts", acts.reset),
    "close-mid-body": Mode("hangs up 100 bytes before its answer's end", "cuts", acts.close_mid_body),
    "close-at-once": Mode("hangs up without a byte when the request has come", "cuts", acts.close_at_once),
    "slow": Mode("takes 10 times as long (--slow-factor)", "slow", slowness=lambda state: state.slow_factor),
    "slow-start": Mode(
        "takes 10 times as long in its first 5 s",
        "slow",
        slowness=lambda state: state.slow_factor if state.age_s < PHASE_S else 1.0,
        in_part=False,
        from_start=True,
    ),
    "flapping": Mode("5 s right, 5 s hanging, in turns", "dead", acts.flap, in_part=False),
    "bad-receipts": Mode("its receipts claim 1,000 tokens more", "forged", receipt_tokens=EXTRA_TOKENS),
    "crash": Mode("its process ends at the 20th request (--after)", "dead", acts.crash, in_part=False),
    "wedge": Mode("its process stops (SIGSTOP) at the 20th request (--after)", "dead", acts.wedge, in_part=False),
}


def _still(rows: Vectors) -> Vectors:
    return vectors([[0]], width=rows.shape[1])


def listed() -> str:
    """The table, for `--help`."""
    return "\n".join(f"  {name:19}{mode.says}" for name, mode in MODES.items())
