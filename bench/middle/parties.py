"""Client, gateway and node in one process, the real ones but for their sockets, store and engine.

The client runs its own steps, the node its own SealedCalls over a model that is a hash. The gateway is as small as one
can be: locks in a dict, the envelope as the real one reads and writes it. It checks what only an honest gateway checks,
unless it is the man in the middle itself.
"""

import asyncio
import hashlib
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, cast

import msgspec

from embedmesh.catalogue import Catalogue
from embedmesh.client import steps as client_steps
from embedmesh.client.answer import CreateEmbeddingResponse
from embedmesh.client.core import LockStep, Trust
from embedmesh.client.reserves import Reserves
from embedmesh.client.steps import HttpAnswer, Patience, Steps, ToSend
from embedmesh.client.wanted import Wanted
from embedmesh.confidential.attestation import KeyAttester
from embedmesh.confidential.documents import read_keys
from embedmesh.confidential.failures import Untrusted
from embedmesh.confidential.statements import read_answer, request_digest
from embedmesh.dialects import confidential as dialect
from embedmesh.dialects.openai.parse import parse
from embedmesh.flow.operation import CanPayFor
from embedmesh.http.receive import BodyBudget
from embedmesh.node.app import NodeApp
from embedmesh.node.confidential import LateOpener, SealedCalls
from embedmesh.node.key_sets import KeySets
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.opener import Opener
from embedmesh.rules.confidential import HPKE_SCHEME, Scheme, SealedAnswer, SealedCall, SignedKeys
from embedmesh.rules.embeddings import Call, Counted
from embedmesh.rules.errors import CallerFailure
from embedmesh.rules.lock_failures import ConfidentialRefused, KeyMismatch, LockNotFound, LockUsed
from embedmesh.rules.models import Model
from embedmesh.signing.identity import Identity, node_id

NOW_MS = 1_800_000_000_000
WIDTH = 4
MODELS = {name: Model(id=name, width=WIDTH, max_tokens=512, price=1, digest=f"{name}-digest") for name in ("m", "n")}


class StillClock:
    """Implements the port `Clock`: nothing takes time here."""

    def __init__(self, now_ms: int = NOW_MS) -> None:
        self._now_ms = now_ms

    def monotonic(self) -> float:
        return self._now_ms / 1000

    def unix_ms(self) -> int:
        return self._now_ms


class HashModel:
    """In place of an engine's model: a vector is made of a hash of its input."""

    def __init__(self, model: Model) -> None:
        self.model = model

    async def embed(self, ids: list[list[int]], *, alone: bool = False) -> bytes:
        """The rows, one after another."""
        return b"".join(struct.pack(f"<{WIDTH}f", *vector_of(self.model.id, each)) for each in ids)


class HashApp:
    """In place of a NodeApp: reads requests as that does, and counts a token for each byte."""

    async def read(self, body: bytes, *, can_pay_for: CanPayFor) -> tuple[Call, HashModel, Counted]:
        """Raises a CallerFailure."""
        call, model = parse(body, Catalogue(tuple(MODELS.values())))
        ids = [list(text.encode()) for text in call.texts] or call.ids
        can_pay = await can_pay_for(model)
        assert can_pay is not None
        can_pay(sum(map(len, ids)))
        return call, HashModel(model), Counted(lengths=[len(each) for each in ids], ids=ids)


def vector_of(model: str, ids: Sequence[int]) -> list[float]:
    """What the model makes of an input."""
    digest = hashlib.sha256(f"{model} {list(ids)}".encode()).digest()
    return [1.0 + number / 256 for number in digest[:WIDTH]]


class SealedNode:
    """A node: an identity, keys of now, and what it answers."""

    def __init__(self, identity: Identity, operator: Identity, now_ms: int = NOW_MS) -> None:
        clock = StillClock(now_ms)
        self.identity = identity
        self.node_id = node_id(identity.public_key)
        sets = KeySets(identity, clock, KeyAttester(operator))
        opener = Opener(identity, sets, clock)
        late = LateOpener(lambda: opener)
        self._runner = asyncio.Runner()
        self._runner.run(late.make())
        app = cast(NodeApp, HashApp())
        self._calls = SealedCalls(app, late, NodeMetrics(), BodyBudget(2**30), clock, sleep=_no_time)
        self.signed: SignedKeys = opener.signed_keys({model.id: model.digest for model in MODELS.values()})
        found = [sets.find(scheme, public) for scheme, public in read_keys(self.signed).keys.items()]
        self.keys = [held.key for held in found if held is not None]

    def answer(self, call: SealedCall) -> SealedAnswer:
        """What it says to a call, refusals included."""
        reply, _ = self._runner.run(self._calls.answer(msgspec.msgpack.encode(call)))
        return msgspec.msgpack.decode(reply, type=SealedAnswer)

    def close(self) -> None:
        """End its event loop."""
        self._runner.close()


async def _no_time(seconds: float) -> None:
    pass


class Lock(NamedTuple):
    """What the gateway remembers of a lock."""

    node: SealedNode
    scheme: Scheme
    node_key: bytes
    model: str
    units: int
    expires_ms: int


class Middle:
    """Everything that passes by a man in the middle, who here lets it pass."""

    is_gateway = True  # then nobody checks what only an honest gateway checks

    def locked(self, reply: HttpAnswer) -> HttpAnswer:
        """The reply to a lock, to the client."""
        return reply

    def lock(self, reply: bytes) -> bytes:
        """Its body."""
        return reply

    def envelope(self, body: bytes) -> bytes:
        """The sealed request, from the client."""
        return body

    def call(self, call: SealedCall) -> SealedCall:
        """The same, to the node."""
        return call

    def asked(self, node: SealedNode) -> SealedNode:
        """The node that gets it."""
        return node

    def answer(self, answer: SealedAnswer) -> SealedAnswer:
        """The answer, from the node."""
        return answer

    def reply(self, reply: HttpAnswer) -> HttpAnswer:
        """The same, to the client."""
        return reply


class Gateway:
    """Locks, and sealed requests and replies of one account."""

    def __init__(self) -> None:
        self._locks: dict[int, Lock] = {}
        self._used: set[int] = set()

    def lock(self, node: SealedNode, body: bytes) -> bytes:
        """The reply to `POST /v1/nodes/lock`."""
        asked = msgspec.json.decode(body)
        scheme: Scheme = asked["scheme"]
        number = len(self._locks) + 1
        node_key = read_keys(node.signed).keys[scheme]
        expires_ms = NOW_MS + asked["timeout"] * 1_000 - number  # no two are alike
        self._locks[number] = Lock(node, scheme, node_key, asked["model"], asked["max_num_tokens"], expires_ms)
        return msgspec.json.encode(
            {
                "public_key": node_key,
                "node_small_id": 7,
                "stack_small_id": number,
                "stack_entry_digest": None,
                "scheme": scheme,
                "model": asked["model"],
                "max_num_tokens": asked["max_num_tokens"],
                "expires_ms": expires_ms,
                "keys": node.signed,
            }
        )

    def carry(self, body: bytes, middle: Middle) -> HttpAnswer:
        """The reply to `POST /v1/confidential/embeddings`."""
        try:
            _, call = dialect.parse(middle.envelope(body))
            lock = self._locks.get(call.lock)
            if lock is None:
                raise LockNotFound("There is no such lock.")
            if not middle.is_gateway:
                self._check(call, lock)
            self._used.add(call.lock)
            call = middle.call(msgspec.structs.replace(call, model=lock.model, units=lock.units))
            answer = middle.answer(middle.asked(lock.node).answer(call))
            return middle.reply(self._reply(call, lock, answer, checks=not middle.is_gateway))
        except CallerFailure as failure:
            return middle.reply(HttpAnswer(400, {}, dialect.refusal(failure, "invalid_request_error", "", None)))

    def _check(self, call: SealedCall, lock: Lock) -> None:
        """Raises LockUsed or KeyMismatch."""
        if call.lock in self._used:
            raise LockUsed("Another request has used the lock.")
        said = call.scheme, call.node_key, call.model_name
        expires_ms = call.expires_ms if call.scheme == HPKE_SCHEME else lock.expires_ms
        if said != (lock.scheme, lock.node_key, lock.model) or expires_ms != lock.expires_ms:
            raise KeyMismatch("It is sealed for another lock.")

    def _reply(self, call: SealedCall, lock: Lock, answer: SealedAnswer, *, checks: bool) -> HttpAnswer:
        """Raises KeyMismatch, in place of a node's failure, and ConfidentialRefused."""
        try:
            if checks:
                read_answer(answer, lock.node.identity.public_key, call.lock, request_digest(call))
            told = msgspec.json.decode(answer.statement, type=Told)
        except (Untrusted, msgspec.DecodeError, ValueError):
            if checks:
                raise KeyMismatch("The node answered wrongly.") from None
            told = Told(200, 1)
        if told.status == 200:
            return HttpAnswer(200, {}, dialect.render(call.scheme, answer, told.tokens, {}).body)
        failure = ConfidentialRefused("The node refused.")
        return HttpAnswer(400, {}, dialect.refusal(failure, "invalid_request_error", call.scheme, answer))


class Told(msgspec.Struct):
    """What a gateway reads of a statement."""

    status: int
    tokens: int


class Ended(NamedTuple):
    """How a call ended, and what left the client: paths and bodies."""

    response: CreateEmbeddingResponse | None
    error: Exception | None
    sent: list[ToSend]


def begin(wanted: Wanted, trust: Trust, reserves: Reserves | None = None) -> Steps[CreateEmbeddingResponse]:
    """A call of the client, which tries nothing twice."""
    patience = Patience(0, lambda: 60.0, Random(1))
    return client_steps.confidential(wanted, LockStep(wanted, trust), patience, lambda: NOW_MS, reserves)


def with_lock(wanted: Wanted, trust: Trust, send: Callable[[ToSend], HttpAnswer]) -> Reserves:
    """What the client keeps where the answer to its request for a lock had come with an earlier reply."""
    step, reserves = LockStep(wanted, trust), Reserves()
    reserves.begin(wanted.model, step.units, NOW_MS).end()  # one that asks for none, as it is the first
    call = reserves.begin(wanted.model, step.units, NOW_MS)
    call.keep(send(ToSend("/nodes/lock", step.body)).body, step.units, NOW_MS)
    call.end()
    return reserves


def run(steps: Steps[CreateEmbeddingResponse], send: Callable[[ToSend], HttpAnswer]) -> Ended:
    """A call from its beginning to its end."""
    sent: list[ToSend] = []
    try:
        step = next(steps)
        while True:
            if isinstance(step, ToSend):
                sent.append(step)
                step = steps.send(send(step))
            else:
                step = steps.send(None)
    except StopIteration as done:
        return Ended(done.value, None, sent)
    except Exception as error:  # noqa: BLE001 - what is no EmbedmeshError is judged as a bug
        return Ended(None, error, sent)
