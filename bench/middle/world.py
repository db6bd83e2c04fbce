"""One attack on one call: what was attacked, how the call ended, and whether that is right."""

import json
from random import Random
from typing import Any, NamedTuple, TypeVar

import msgspec

from bench.middle.attacks import ATTACKS, TEXTS, Attack, Known, Passed, Place
from bench.middle.meaning import meaning
from bench.middle.parties import NOW_MS, Ended, Gateway, Middle, SealedNode, begin, run, vector_of, with_lock
from embedmesh.client.answer import CreateEmbeddingResponse
from embedmesh.client.core import Trust
from embedmesh.client.errors import EmbedmeshError, NodeNotTrusted, ReplyNotTrusted
from embedmesh.client.pins import Pins
from embedmesh.client.steps import HttpAnswer, Steps, ToSend
from embedmesh.client.wanted import Wanted, want
from embedmesh.confidential import hpke_scheme, sdk_scheme
from embedmesh.confidential.attestation import SignedStatement
from embedmesh.confidential.failures import SealBroken
from embedmesh.dialects import confidential as dialect
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME, Scheme, SealedAnswer, SealedCall
from embedmesh.signing.identity import Identity

T = TypeVar("T", bytes, SealedCall, SealedNode, SealedAnswer, HttpAnswer)

DAY_MS = 86_400_000
SCHEMES: tuple[Scheme, ...] = (HPKE_SCHEME, SDK_SCHEME)
SECRET_WORDS = "an otter sleeps at noon"  # they must be nowhere
REORDERED = "calls: replies exchanged"
KINDS = (*ATTACKS, REORDERED)
OF_EVIDENCE = ("lock: evidence of others", "lock: evidence that was damaged")
OF_HPKE = ("lock: another expiry",)
TRIES_MAX = 200  # to find a change that has a meaning


class Verdict(NamedTuple):
    """What became of an attack, and what is wrong about that.

    `where` it was noticed: "before" the client sealed, "refused" by node or gateway, on the "reply"; "" if nowhere.
    """

    kind: str
    where: str
    wrong: list[str]


class World:
    """Nodes, keys and operators that last for many attacks, and calls that have passed."""

    def __init__(self) -> None:
        self.operator = Identity(b"operator" * 4)
        self.his_operator = Identity(b"evil-ope" * 4)
        self.his_identity = Identity(b"evil-idn" * 4)
        self.pinned = SealedNode(Identity(b"pinned--" * 4), self.operator)
        self.other = SealedNode(Identity(b"another-" * 4), self.operator)
        self.stale = SealedNode(Identity(b"pinned--" * 4), self.operator, NOW_MS - 3 * DAY_MS)
        self.evil = SealedNode(self.his_identity, self.his_operator)
        identities = [node.identity.public_key for node in (self.pinned, self.other)]
        self.pins = {
            "identity": Pins(identities),
            "operator": Pins(verifiers=[SignedStatement(self.operator.public_key)]),
        }
        self.gateway = Gateway()
        self.passed = [self._pass(Random(seed)) for seed in range(24)]

    def close(self) -> None:
        """End the nodes' loops."""
        for node in (self.pinned, self.other, self.stale, self.evil):
            node.close()

    def known(self, dice: Random, scheme: Scheme) -> Known:
        """What the man in the middle knows."""
        return Known(
            dice,
            scheme,
            self.passed,
            self.pinned,
            self.other,
            self.stale,
            self.evil,
            self.his_operator,
            self.his_identity,
        )

    def _pass(self, dice: Random) -> Passed:
        """A call that nobody attacks: every third is refused, half of those without a reason."""
        scheme = dice.choice(SCHEMES)
        refused = dice.choice(("", "", "", "", "opened", "unopened"))
        wanted = _wanted(dice, lock_tokens=1 if refused == "opened" else None)
        noting = Noting(spoil=refused == "unopened")
        ended = attacked(self, wanted, Trust(self.pins["identity"], scheme), noting)
        assert (ended.error is None) == (refused == ""), ended.error
        return noting.passed(scheme)


class Noting(Middle):
    """Notes what passes, and spoils the ciphertext if asked to."""

    def __init__(self, spoil: bool = False) -> None:
        self._spoil = spoil
        self._noted: list[Any] = []

    def lock(self, reply: bytes) -> bytes:
        self._noted.append(reply)
        return reply

    def envelope(self, body: bytes) -> bytes:
        self._noted.append(body)
        return body

    def call(self, call: SealedCall) -> SealedCall:
        if self._spoil:
            call = msgspec.structs.replace(call, ciphertext=call.ciphertext[:-1] + b"?")
        self._noted.append(call)
        return call

    def answer(self, answer: SealedAnswer) -> SealedAnswer:
        self._noted.append(answer)
        return answer

    def reply(self, reply: HttpAnswer) -> HttpAnswer:
        self._noted.append(reply)
        return reply

    def passed(self, scheme: Scheme) -> Passed:
        """All of it."""
        return Passed(scheme, *self._noted)


class Attacking(Middle):
    """Makes one attack. `done` tells whether anything that anybody reads was changed."""

    def __init__(self, attack: Attack, known: Known, *, reads_evidence: bool) -> None:
        self.is_gateway = not attack.honest_gateway
        self.done = False
        self._attack = attack
        self._known = known
        self._reads_evidence = reads_evidence

    def locked(self, reply: HttpAnswer) -> HttpAnswer:
        return self._changed("locked", reply)

    def lock(self, reply: bytes) -> bytes:
        return self._changed("lock", reply)

    def envelope(self, body: bytes) -> bytes:
        return self._changed("envelope", body)

    def call(self, call: SealedCall) -> SealedCall:
        return self._changed("call", call)

    def asked(self, node: SealedNode) -> SealedNode:
        return self._changed("asked", node)

    def answer(self, answer: SealedAnswer) -> SealedAnswer:
        return self._changed("answer", answer)

    def reply(self, reply: HttpAnswer) -> HttpAnswer:
        return self._changed("reply", reply)

    def _changed(self, place: Place, value: T) -> T:
        if place != self._attack.place:
            return value
        if place == "reply" and isinstance(value, HttpAnswer) and value.status != 200:
            return value  # there is nothing to win
        scheme = self._known.scheme
        before = meaning(place, value, scheme, self._reads_evidence)
        for _ in range(TRIES_MAX):
            changed: T = self._do(value)
            if meaning(place, changed, scheme, self._reads_evidence) != before:
                self.done = True
                return changed
        return value

    def _do(self, value: Any) -> Any:
        if isinstance(value, bytes) and self._attack.do not in TEXTS:
            return json.dumps(self._attack.do(self._known, json.loads(value))).encode()
        return self._attack.do(self._known, value)


def attacked(world: World, wanted: Wanted, trust: Trust, middle: Middle, *, ahead: bool = False) -> Ended:
    """A call with that man in the middle; with `ahead`, its lock has come with an earlier reply, also through him."""

    def send(step: ToSend) -> HttpAnswer:
        if step.path == "/nodes/lock":
            return middle.locked(HttpAnswer(200, {}, middle.lock(world.gateway.lock(world.pinned, step.body))))
        return world.gateway.carry(step.body, middle)

    return run(begin(wanted, trust, with_lock(wanted, trust, send) if ahead else None), send)


def attack(world: World, seed: int, kind: str | None = None) -> Verdict:
    """The attack of that seed."""
    dice = Random(seed)
    kind = kind or KINDS[seed % len(KINDS)]
    scheme = SCHEMES[dice.random() < 0.25]
    pinned_by = dice.choice(("identity", "operator"))
    if kind in OF_EVIDENCE:
        pinned_by = "operator"  # who pins identities does not read it
    if kind in OF_HPKE:
        scheme = HPKE_SCHEME  # the other sends no expiry
    trust, wanted = Trust(world.pins[pinned_by], scheme), _wanted(dice)
    if kind == REORDERED:
        return exchange(world, dice, trust)
    middle = Attacking(ATTACKS[kind], world.known(dice, scheme), reads_evidence=pinned_by == "operator")
    ahead = scheme == HPKE_SCHEME and dice.random() < 0.5
    ended = attacked(world, wanted, trust, middle, ahead=ahead)
    wrong = [] if middle.done else ["the attack changed nothing"]
    return judge(world, kind, ended, wrong)


def exchange(world: World, dice: Random, trust: Trust) -> Verdict:
    """Two calls at one time, of which each gets the reply of the other, or a part of it."""
    wanted = _wanted(dice)
    pair = [until_reply(world, one, trust) for one in (wanted, wanted if dice.random() < 0.3 else _wanted(dice))]
    bodies = [json.loads(waiting.reply.body) for waiting in pair]
    names = dice.choice((list(bodies[0]), ["ciphertext"], ["statement", "statement_signature"]))
    wrong: list[str] = []
    for waiting, own, others in zip(pair, bodies, reversed(bodies), strict=True):
        mixed = own | {name: others[name] for name in names}
        ended = finish(waiting, waiting.reply._replace(body=json.dumps(mixed).encode()))
        verdict = judge(world, REORDERED, ended, [])
        wrong += verdict.wrong
    return Verdict(REORDERED, verdict.where, wrong)


class Waiting(NamedTuple):
    """A call whose reply is there, and was not read."""

    steps: Steps[CreateEmbeddingResponse]
    sent: list[ToSend]
    reply: HttpAnswer


def until_reply(world: World, wanted: Wanted, trust: Trust) -> Waiting:
    """A call that nobody attacks, until its reply."""
    steps = begin(wanted, trust)
    lock = next(steps)
    assert isinstance(lock, ToSend)
    request = steps.send(HttpAnswer(200, {}, world.gateway.lock(world.pinned, lock.body)))
    assert isinstance(request, ToSend)
    return Waiting(steps, [lock, request], world.gateway.carry(request.body, Middle()))


def finish(waiting: Waiting, reply: HttpAnswer) -> Ended:
    """Read that reply."""
    try:
        waiting.steps.send(reply)
    except StopIteration as done:
        return Ended(done.value, None, waiting.sent)
    except Exception as error:  # noqa: BLE001 - what is no EmbedmeshError is judged as a bug
        return Ended(None, error, waiting.sent)
    return Ended(None, AssertionError("the call went on"), waiting.sent)


def honest(world: World, seed: int) -> list[str]:
    """What is wrong with a call that nobody attacks: else every attack would seem to be noticed."""
    dice = Random(seed)
    trust = Trust(world.pins[dice.choice(("identity", "operator"))], dice.choice(SCHEMES))
    wanted = _wanted(dice)
    ended = attacked(world, wanted, trust, Middle())
    if ended.response is None:
        return [f"an honest call was not answered: {ended.error!r}"]
    return leaks(world, ended) + wrong_vectors(ended.response, wanted)


def judge(world: World, kind: str, ended: Ended, wrong: list[str]) -> Verdict:
    """Whether an attacked call ended as it must."""
    error = ended.error
    wrong = wrong + leaks(world, ended)
    if ended.response is not None:
        return Verdict(kind, "", [*wrong, "accepted"])
    if not isinstance(error, EmbedmeshError):
        wrong.append(f"the client broke: {error!r}")
    if isinstance(error, NodeNotTrusted):
        if ended.sent and ended.sent[-1].path != "/nodes/lock":  # before: for a lock that was trusted, and refused
            wrong.append("it was sealed, and then not trusted")
        return Verdict(kind, "before", wrong)
    return Verdict(kind, "reply" if isinstance(error, ReplyNotTrusted) else "refused", wrong)


def leaks(world: World, ended: Ended) -> list[str]:
    """Where the secret words are that must be nowhere, and what he can open with his keys."""
    found = []
    if SECRET_WORDS in f"{ended.error!r} {ended.error}":
        found.append("the error has the texts")
    for step in ended.sent:
        if step.path not in ("/nodes/lock", "/confidential/embeddings") or SECRET_WORDS.encode() in step.body:
            found.append(f"{step.path} has the texts")
        if step.path == "/confidential/embeddings" and _opens(world, step.body):
            found.append("he can open the request")
    return found


def _opens(world: World, body: bytes) -> bool:
    """Whether one of his keys opens a request."""
    _, call = dialect.parse(body)
    for key in (*world.evil.keys, *world.stale.keys):
        for node in (world.evil, world.pinned):
            try:
                if call.scheme == HPKE_SCHEME:
                    hpke_scheme.open_sealed(key, call.ciphertext, hpke_scheme.Terms.of(call, node.node_id))
                else:
                    sdk_scheme.open_sealed(key, msgspec.structs.replace(call, node_key=key.public))
            except SealBroken:
                continue
            return True
    return False


def wrong_vectors(response: CreateEmbeddingResponse, wanted: Wanted) -> list[str]:
    """What differs from what the node has computed."""
    texts = json.loads(wanted.body)["input"]
    right = [vector_of(wanted.model, list(text.encode())) for text in texts]
    if [each.embedding for each in response.data] != right:
        return ["the vectors are others"]
    return []


def _wanted(dice: Random, lock_tokens: int | None = None) -> Wanted:
    """One to three texts."""
    texts = [f"{SECRET_WORDS}, {dice.randrange(10)}" for _ in range(dice.randrange(1, 4))]
    return want(model="m", input=texts, lock_tokens=lock_tokens, fields={})
