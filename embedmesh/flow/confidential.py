"""The operation "confidential embeddings": carry a sealed request to the one node that was locked, and its reply back.

The gateway reads neither. It knows the lock, the bounds on what the ciphertext can hold, and the node's signed count.
Nothing else ever sees these texts: no second node, no cache, no shared call, no canary.
"""

import asyncio
import math
from functools import partial
from typing import NamedTuple, Protocol

import msgspec

from embedmesh.deadline import within
from embedmesh.flow.bill import Bill
from embedmesh.flow.forward import caller_failure, time_allowed_s
from embedmesh.flow.lock import check_fits, lock_node
from embedmesh.flow.lock_ahead import LockAhead, Opened, WantedLock, read_wanted
from embedmesh.flow.operation import Bound, CanPayFor, PayingLock
from embedmesh.flow.world import World
from embedmesh.rules.confidential import (
    CheckedAnswer,
    FoundLock,
    Locks,
    LockTerms,
    Scheme,
    SealedAnswer,
    SealedCall,
    SealingFleet,
)
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import (
    DeadlineExceeded,
    Failure,
    InvalidValue,
    NodeFailure,
    NoNodeAvailable,
    UnsupportedModality,
)
from embedmesh.rules.exchange import NODE_HEADER, Reply, RequestHead
from embedmesh.rules.forwarding import Part, Share, Ticket
from embedmesh.rules.holds import Hold, Meter, Metered, PriorRequest
from embedmesh.rules.limits import BYTES_A_TOKEN_MAX, KEPT_REPLIES_BYTES_MAX, LOCK_S, REQUEST_INPUTS_MAX
from embedmesh.rules.lock_failures import ConfidentialRefused
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.served import no_such_model

SPECIALS_MAX = 8  # tokens that a model adds to an input, where its tokenizer is not here
TOKEN_BYTES = 4  # of a token of ordinary text
PADDED_BYTES = 256  # our scheme makes short requests as long as that: they may have a token or fifty
TOKENS_OF_BYTE_MAX = 32  # normalising makes 33 bytes of 3; six bytes of JSON may be an id of cl100k, for 128 bytes
REFUSED_BYTES_A_TOKEN = 16  # as of a body that is refused
INPUT_BYTES_MIN = 4  # of an input in JSON: two quotes, a letter, a comma
JSON_COMPONENT_BYTES = 16  # of one number in JSON with its comma: 15 at most, and a sixteenth that our scheme fills up
REPLY_INPUT_BYTES = 72  # around the numbers of one vector, and a sixteenth
REPLY_BYTES = 4_096  # around the vectors
KEPT_OF_LOCKS_BYTES_MAX = KEPT_REPLIES_BYTES_MAX // 2  # every such reply is kept: the rest is for Idempotency-Keys
SEALED_AND_BASE64 = 3  # times: as it comes from the node, as base64, as JSON
REFUSED = (
    "The node could not open the sealed request, or refused what is in it, and nothing was charged. Why is sealed for "
    "you in `sealed`, if the node could open it; else lock again, and seal anew for that lock's key."
)


class SealedNodes(SealingFleet, Protocol):
    """The nodes that take confidential requests."""

    def is_here(self, terms: LockTerms) -> bool:
        """Whether the node that was locked is one of this gateway's. Another's may have the same name: `local`."""
        ...

    async def answer(
        self, terms: LockTerms, call: SealedCall, tokens_max: int, reply_bytes_max: int, request_id: str
    ) -> CheckedAnswer:
        """The node's answer, whose statement was checked. Raises a NodeFailure."""
        ...


class EnvelopeDialect(Protocol):
    """How envelopes are written. Knows the rules only."""

    def parse(self, body: bytes) -> SealedCall:
        """What a node gets once the lock is known. Raises a CallerFailure."""
        ...

    def plaintext_bytes_max(self, call: SealedCall) -> int:
        """What the ciphertext can hold."""
        ...

    def render(
        self, scheme: str, answer: SealedAnswer, tokens: int, headers: dict[str, str], ahead: Opened | None
    ) -> Reply:
        """The reply; `ahead` is a lock for the caller's next request."""
        ...

    def refusal(self, failure: Failure) -> bytes:
        """The envelope of a failure."""
        ...


class Sealed(msgspec.Struct, frozen=True, array_like=True):
    """The result: a node's answer, and how many tokens it has counted."""

    answer: SealedAnswer
    tokens: int
    node_id: str


class ConfidentialEmbeddings:
    """Implements the protocol `Operation`."""

    result = Sealed

    def __init__(self, dialect: EnvelopeDialect, locks: Locks, nodes: SealedNodes, scope: str) -> None:
        self.scope = scope
        self.envelope = dialect.refusal
        self._dialect = dialect
        self._locks = locks
        self._nodes = nodes

    def parse(self, world: World, head: RequestHead, body: bytes) -> "ConfidentialCall":
        if head.idempotency_key is not None:
            raise InvalidValue("A lock is for one request already: leave the Idempotency-Key out.")
        call = self._dialect.parse(body)
        model = world.catalogue.find(call.model_name)
        if model is None:
            raise no_such_model(call.model_name, world.catalogue, world.terms.serves)
        if not model.embeds:
            raise UnsupportedModality("This model makes no vectors. Use the confidential path of what it does.")
        wanted = read_wanted(head.next_lock, call.scheme)
        return ConfidentialCall(self._dialect, self._locks, self._nodes, call, model, wanted)

    def price_min(self, world: World, account_id: str, model: Model | None) -> int:
        return 0

    def may_be_free(self, world: World, caller: Caller) -> bool:
        return True  # a lock has the money: what the account has beside it says nothing


class TokenBounds(NamedTuple):
    """How many tokens a sealed request can be, by its length."""

    least: int
    likely: int  # what it takes from limits at first, and keeps if it is refused
    most: int


class ConfidentialCall:
    """One valid request. Implements the protocol `Invocation`."""

    streams = False
    user = None
    lock: PayingLock | None = None
    _bounds: TokenBounds
    _terms: LockTerms
    _caller: Caller
    _answer_bytes: int | None = None  # once it is there
    _ahead: LockAhead | None = None

    def __init__(
        self,
        dialect: EnvelopeDialect,
        locks: Locks,
        nodes: SealedNodes,
        call: SealedCall,
        model: Model,
        wanted: WantedLock | None,
    ) -> None:
        self.model = model
        self._dialect = dialect
        self._locks = locks
        self._nodes = nodes
        self._call = call
        self._wanted = wanted
        self._plaintext_bytes = dialect.plaintext_bytes_max(call)

    @property
    def _guess(self) -> int:
        """About how many tokens it is."""
        return max(1, min(self._bounds.most, self._plaintext_bytes // TOKEN_BYTES))

    @property
    def _answer_bytes_max(self) -> int:
        """No honest answer is longer: one that is counts as a wrong one."""
        inputs = min(REQUEST_INPUTS_MAX, 1 + self._plaintext_bytes // INPUT_BYTES_MIN)
        return REPLY_BYTES + inputs * (self.model.width * JSON_COMPONENT_BYTES + REPLY_INPUT_BYTES)

    @property
    def reply_bytes_max(self) -> int:
        return SEALED_AND_BASE64 * self._answer_bytes_max

    @property
    def kept_bytes(self) -> int:
        return self._answer_bytes_max if self._answer_bytes is None else self._answer_bytes

    def check_served(self, world: World) -> None:
        if not world.fleet.may_come(self.model):
            raise no_such_model(self._call.model_name, world.catalogue, world.terms.serves)

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        """Find the lock, and bound what the ciphertext can hold. Raises LockNotFound or KeyMismatch."""
        found, call = await self._locks.find(caller.account_id, self._call.lock), self._call
        terms = found.terms
        check_fits(call, self.model, terms)
        self._terms = terms
        self._call = msgspec.structs.replace(call, model=terms.model, units=terms.units)
        self._bounds = bounds = token_bounds(self._plaintext_bytes, terms.units, self._tokens_added(world))
        self._caller = caller
        may_be_kept = found.kept_bytes + self._answer_bytes_max <= KEPT_OF_LOCKS_BYTES_MAX
        redeem = partial(self._redeem, world, found)
        self.lock = PayingLock(terms, redeem, kept=may_be_kept, here=self._nodes.is_here(terms))
        return bounds.likely

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        within_s = time_allowed_s(self.model, self._bounds.most, world.fleet)  # slow because it is more is not stuck
        world.fleet.may_wait(self.model, self._guess, caller.account_id)
        return Bound((self._metered(self._terms.units),), within_s)

    async def work(self, world: World, bill: Bill) -> Sealed:
        try:
            return await self._worked(world, bill)
        except BaseException:
            self._drop_ahead()
            raise

    async def _worked(self, world: World, bill: Bill) -> Sealed:
        terms, bounds = self._terms, self._bounds
        checked, part = await self._asked(world, bill)
        if checked.statement.status != 200:
            refused = ConfidentialRefused(REFUSED)
            refused.answer = terms.scheme, checked.answer
            raise refused
        tokens = checked.statement.tokens
        self._answer_bytes = len(checked.answer.sealed)
        charged = max(bounds.least, tokens)
        world.rate_limits.spend_tokens(self._caller, charged - bounds.likely)  # its limits have the likely ones
        bill.owe(self._metered(charged), shares=(Share(terms.node_id, charged, part.ask),))
        return Sealed(checked.answer, tokens, terms.node_id)

    def render(self, result: Sealed, headers: dict[str, str]) -> Reply:
        headers[NODE_HEADER] = result.node_id
        ahead = None if self._ahead is None else self._ahead.told()
        return self._dialect.render(self._call.scheme, result.answer, result.tokens, headers, ahead)

    def paid(self, world: World, caller: Caller) -> None:
        """Nothing is learned of what nobody here can read."""

    async def _redeem(self, world: World, found: FoundLock, body_hash: bytes, deadline_ms: int) -> Hold | PriorRequest:
        """Use the lock; where it is free as yet, the next one is opened beside. Who finds it used gets no next one."""
        got: Hold | PriorRequest | None = None
        if self._wanted is not None and found.is_free(world.clock.unix_ms()):
            opening = partial(self._open_ahead, world, self._wanted, self._call.scheme)
            self._ahead = LockAhead(opening, self._locks.drop)
            self._ahead.begin()
        try:
            got = await self._locks.redeem(found, body_hash, deadline_ms)
        finally:
            if not isinstance(got, Hold):
                self._drop_ahead()
        return got

    async def _open_ahead(self, world: World, wanted: WantedLock, scheme: Scheme) -> Opened:
        """As `POST /v1/nodes/lock` does: it counts as a request of the key, too. Raises a Failure."""
        caller = self._caller
        await world.rate_limits.take_request(caller)
        return await lock_node(
            world, self._locks, self._nodes, caller, self.model.id, wanted.units, LOCK_S, scheme, wanted.among
        )

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.drop()

    async def _asked(self, world: World, bill: Bill) -> tuple[CheckedAnswer, Part]:
        """The answer of the node that was locked, to the one attempt. Raises a Failure."""
        counted = Counted(lengths=[self._guess], ids=[b""], exact=False)
        turn = _Turn()
        ticket = world.fleet.enter(self.model, counted, bill.hold.account_id, turn, self._terms.node_id)
        try:
            with within(max(0.0, bill.until - world.clock.monotonic())):
                part = await turn.came
                turn.part = None
                return await self._attempt(ticket, part, bill.hold.hold_id), part
        except TimeoutError:
            raise DeadlineExceeded("The node did not answer in time. Lock again, and send a smaller request.") from None
        finally:
            ticket.leave()
            if turn.part is not None:  # it came in the moment in which its caller went
                ticket.abandoned(turn.part)

    async def _attempt(self, ticket: Ticket, part: Part, request_id: str) -> CheckedAnswer:
        try:
            checked = await self._nodes.answer(
                self._terms, self._call, self._bounds.most, self._answer_bytes_max, request_id
            )
        except NodeFailure as failure:
            ticket.ended(part, failure)
            raise caller_failure(failure) from None
        except BaseException:
            ticket.abandoned(part)  # late or not: its caller has chosen how far our guess is off
            raise
        ticket.abandoned(part)  # its tokens were a guess: nothing is learned of the node's speed
        return checked

    def _metered(self, tokens: int) -> Metered:
        return Metered(Meter.INPUT, tokens, self._terms.price)

    def _tokens_added(self, world: World) -> int:
        """The most tokens that the model adds to an input: special ones and those of a prompt."""
        tokenizer = world.tokenizers.get(self.model.id)
        specials = SPECIALS_MAX if tokenizer is None else tokenizer.specials
        return specials + max((len(prompt.encode()) for prompt in self.model.prompts.values()), default=0)


def token_bounds(plaintext_bytes: int, units: int, added: int) -> TokenBounds:
    """A byte of text is a token at most, but for those that the model adds; BYTES_A_TOKEN_MAX are one at least.

    What a node counts above the most is refused, so that one is for whatever a request can be. What it counts below is
    charged as the least. Of limits a request takes, however small its lock, what its bytes take when they are refused.
    """
    added *= math.ceil(plaintext_bytes / INPUT_BYTES_MIN)
    filled = max(0, plaintext_bytes - PADDED_BYTES)
    return TokenBounds(
        least=min(filled // BYTES_A_TOKEN_MAX, units),
        likely=max(1, min(units, plaintext_bytes + added), filled // REFUSED_BYTES_A_TOKEN),
        most=max(1, min(units, plaintext_bytes * TOKENS_OF_BYTE_MAX + added)),
    )


class _Turn:
    """Waits for the one node. Implements the port `Asker`."""

    def __init__(self) -> None:
        self.came: asyncio.Future[Part] = asyncio.get_running_loop().create_future()
        self.part: Part | None = None  # until the attempt begins

    def take(self, part: Part) -> None:
        self.part = part
        if not self.came.done():
            self.came.set_result(part)

    def give_up(self, last: NodeFailure | None) -> None:
        if not self.came.done():
            self.came.set_exception(NoNodeAvailable("The node that was locked is not there now. Lock again."))
