"""A man in the middle who may do anything to what passes: no text leaves for him, and nothing of his is returned.

Seeded; `make confidential` runs 10,000 changes. Each is one to a lock's reply or to a sealed reply of a right exchange,
or puts in its place what he has seen of earlier exchanges, or made himself. There is no network here: the steps of
`embedmesh.client.core` and a node that really opens and seals.
"""

import base64
import copy
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from embedmesh.client.core import LockStep, SealedStep, Trust
from embedmesh.client.errors import NodeNotTrusted, ReplyNotTrusted
from embedmesh.client.pins import Pins
from embedmesh.client.wanted import Wanted, want
from embedmesh.confidential.node_keys import DhKey
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME
from tests.client.gateway import ALIAS, Members, ScriptedGateway, ScriptedNode, b64, now_ms, vector_of

CHANGES = int(os.environ.get("EMBEDMESH_MUTATIONS", "1000"))
SEED = 16
HARMLESS = {"node_small_id", "stack_entry_digest"}  # members of a lock that nobody reads
FREE = HARMLESS | {"stack_small_id", "expires_ms"}  # and those that a gateway chooses
Dice = random.Random
Middle = Callable[[Members, Dice, "Seen"], Members]


class Seen:
    """What he has: exchanges of before, and a node of his own."""

    def __init__(self) -> None:
        self.locks: list[Members] = []
        self.replies: list[Members] = []
        self.requests: list[Members] = []
        self.own = ScriptedNode()


# -- what he may do ----------------------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values that are no objects."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for at, inner in enumerate(value) for leaf in leaves(inner, (*path, at))]
    return [path]


def put(members: Members, path: tuple[Any, ...], value: Any) -> Members:
    changed = copy.deepcopy(members)
    at: Any = changed
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return changed


def get(members: Members, path: tuple[Any, ...]) -> Any:
    at: Any = members
    for step in path:
        at = at[step]
    return at


def flip_a_bit(members: Members, dice: Dice, seen: Seen) -> Members:
    path = dice.choice([path for path in leaves(members) if isinstance(get(members, path), str)])
    raw = bytearray(get(members, path).encode())
    try:
        raw = bytearray(base64.b64decode(raw, validate=True))
    except ValueError:
        raw[dice.randrange(len(raw))] ^= 1
        return put(members, path, raw.decode("latin-1"))
    if not raw:
        return put(members, path, "AA==")
    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return put(members, path, b64(bytes(raw)))


def cut(members: Members, dice: Dice, seen: Seen) -> Members:
    path = dice.choice([path for path in leaves(members) if isinstance(get(members, path), str)])
    text = get(members, path)
    raw = base64.b64decode(text) if len(text) % 4 == 0 and " " not in text and "/" not in text[:1] else text.encode()
    return put(members, path, b64(raw[: dice.randrange(len(raw) or 1)]))


def another_number(members: Members, dice: Dice, seen: Seen) -> Members:
    numbers = [path for path in leaves(members) if isinstance(get(members, path), int)]
    path = dice.choice(numbers)
    return put(members, path, max(0, get(members, path) + dice.choice([-1, 1, -100_000_000, 100_000_000])))


def without_one(members: Members, dice: Dice, seen: Seen) -> Members:
    gone = dice.choice(sorted(members.keys() - HARMLESS))
    return {name: value for name, value in members.items() if name != gone}


def one_of_before(members: Members, dice: Dice, seen: Seen) -> Members:
    """A member, or all of them, of an earlier exchange."""
    before = dice.choice(seen.locks if "keys" in members else seen.replies)
    name = dice.choice(["", *sorted(members.keys() & before.keys())])
    return copy.deepcopy(before) if not name else {**members, name: copy.deepcopy(before[name])}


def two_swapped(members: Members, dice: Dice, seen: Seen) -> Members:
    first, second = dice.sample([path for path in leaves(members) if isinstance(get(members, path), str)], 2)
    return put(put(members, first, get(members, second)), second, get(members, first))


def his_own_keys(members: Members, dice: Dice, seen: Seen) -> Members:
    """His key, his whole document, or the node's document under his signature."""
    if "keys" not in members:
        return one_of_before(members, dice, seen)
    theirs = msgspec.json.decode(msgspec.json.encode(seen.own.keys()))
    match dice.randrange(4):
        case 0:
            return {**members, "public_key": b64(seen.own.key.public)}
        case 1:
            return {**members, "public_key": b64(seen.own.key.public), "keys": theirs}
        case 2:
            return {**members, "keys": {**members["keys"], "signature": theirs["signature"]}}
        case _:
            return {**members, "public_key": b64(DhKey.new().public), "keys": theirs}


def another_scheme(members: Members, dice: Dice, seen: Seen) -> Members:
    if "keys" not in members:
        return flip_a_bit(members, dice, seen)
    return {**members, "scheme": dice.choice([SDK_SCHEME, "hpke-0", "", "none"])}


def what_was_sent(members: Members, dice: Dice, seen: Seen) -> Members:
    """The caller's own ciphertext, of now or of before, comes back."""
    if "keys" in members:
        return one_of_before(members, dice, seen)
    return {**members, "ciphertext": dice.choice(seen.requests)["ciphertext"]}


def his_own_word(members: Members, dice: Dice, seen: Seen) -> Members:
    """The node's statement, or one with other numbers, under his signature."""
    if "keys" in members:
        return his_own_keys(members, dice, seen)
    statement = json.loads(base64.b64decode(members["statement"]))
    statement[dice.choice(["tokens", "lock", "time_ms"])] += dice.randrange(2)
    raw = msgspec.json.encode(statement)
    signature = seen.own.identity.sign(b"confidential answer", raw)
    return {**members, "statement": b64(raw), "statement_signature": b64(signature)}


MIDDLES: list[Middle] = [
    flip_a_bit,
    cut,
    another_number,
    without_one,
    one_of_before,
    two_swapped,
    his_own_keys,
    another_scheme,
    what_was_sent,
    his_own_word,
]


# -- the exchanges -----------------------------------------------------------------------------------------------------


class Exchange:
    """One caller, one node, and what passes between them."""

    def __init__(self, dice: Dice, seen: Seen) -> None:
        self.gateway = ScriptedGateway()
        self.trust = Trust(Pins([self.gateway.node.identity.public_key]))
        self.dice = dice
        self.seen = seen

    def wanted(self) -> Wanted:
        texts = [f"text {self.dice.randrange(10**9)}" for _ in range(self.dice.randint(1, 3))]
        self.texts = texts
        return want(model=ALIAS, input=texts, fields={})

    def lock(self) -> tuple[LockStep, Members]:
        step = LockStep(self.wanted(), self.trust)
        return step, self.gateway.lock(json.loads(step.body))

    def reply(self, sealed: SealedStep) -> Members:
        status, reply = self.gateway.sealed(json.loads(sealed.body))
        assert status == 200
        return reply

    def remember(self, lock: Members, sealed: SealedStep, reply: Members) -> None:
        self.seen.locks.append(lock)
        self.seen.requests.append(json.loads(sealed.body))
        self.seen.replies.append(reply)


def encoded(members: Members) -> bytes:
    return json.dumps(members).encode()


def unlike(one: Members, other: Members, but: set[str]) -> bool:
    return {k: v for k, v in one.items() if k not in but} != {k: v for k, v in other.items() if k not in but}


@pytest.fixture
def exchange() -> Exchange:
    """With a few exchanges behind it."""
    exchange = Exchange(random.Random(SEED), Seen())
    for _ in range(5):
        step, lock = exchange.lock()
        sealed = step.read(encoded(lock), now_ms())
        exchange.remember(lock, sealed, exchange.reply(sealed))
    return exchange


def test_nothing_is_sealed_for_a_changed_lock(exchange: Exchange) -> None:
    """But for what a gateway may choose, which the seal binds, so that the node sees it."""
    accepted, reasons = [], Counter[str]()
    for number in range(CHANGES // 2):
        step, lock = exchange.lock()
        middle = exchange.dice.choice(MIDDLES)
        changed = middle(lock, exchange.dice, exchange.seen)
        if not unlike(changed, lock, FREE):
            continue
        try:
            step.read(encoded(changed), now_ms())
        except NodeNotTrusted as error:
            reasons[error.reason] += 1
        else:
            accepted.append((number, middle.__name__))
    assert accepted == []
    assert reasons.total() > CHANGES // 4
    assert reasons.keys() >= {"form", "scheme", "signature", "key", "not_pinned", "model", "units"}


def test_nothing_is_returned_of_a_changed_reply(exchange: Exchange) -> None:
    accepted, reasons = [], Counter[str]()
    for number in range(CHANGES - CHANGES // 2):
        step, lock = exchange.lock()
        sealed = step.read(encoded(lock), now_ms())
        reply = exchange.reply(sealed)
        exchange.seen.requests[0] = json.loads(sealed.body)
        middle = exchange.dice.choice(MIDDLES)
        changed = middle(reply, exchange.dice, exchange.seen)
        if changed == reply:
            continue
        try:
            sealed.read(encoded(changed))
        except ReplyNotTrusted as error:
            reasons[error.reason] += 1
        else:
            accepted.append((number, middle.__name__))
    assert accepted == []
    assert reasons.total() > CHANGES // 4
    assert reasons.keys() >= {"form", "signature", "reply", "lock", "usage"}


def test_between_right_ends_everything_is_right(exchange: Exchange) -> None:
    """The two tests above would also pass if nothing ever was."""
    for _ in range(50):
        step, lock = exchange.lock()
        sealed = step.read(encoded(lock), now_ms())
        rows = sealed.read(encoded(exchange.reply(sealed)))
        assert rows.vectors == [vector_of(text) for text in exchange.texts]
        assert json.loads(sealed.body)["scheme"] == HPKE_SCHEME
