"""Lock a node for one confidential request: money is set aside, and the caller learns under which key to seal."""

import secrets

from embedmesh.flow.identify import may_use
from embedmesh.flow.world import World
from embedmesh.rules.confidential import (
    HPKE_SCHEME,
    Locks,
    LockTerms,
    Scheme,
    SealedCall,
    SealingFleet,
    SealingNode,
)
from embedmesh.rules.errors import InvalidValue, NoNodeAvailable, UnsupportedModality
from embedmesh.rules.holds import Hold, Meter
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import LOCK_S_MAX, LOCK_S_MIN, REQUEST_TOKENS_MAX
from embedmesh.rules.lock_failures import KeyMismatch
from embedmesh.rules.models import Model
from embedmesh.rules.money import cost_nanousd
from embedmesh.rules.ports import Caller
from embedmesh.rules.served import no_such_model

LOCK_ID_BITS = 49  # below 10^15, exact wherever JSON is read; too many to guess


async def lock_node(
    world: World,
    locks: Locks,
    nodes: SealingFleet,
    caller: Caller,
    model_name: str,
    units: int,
    span_s: int,
    scheme: Scheme,
    among: frozenset[str] | None = None,
) -> tuple[LockTerms, SealingNode]:
    """A lock on the node that would be done first, of all or `among` some, for `units` tokens and `span_s` seconds.

    Raises ModelNotFound, InsufficientScope, UnsupportedModality, InvalidValue, NoNodeAvailable, InsufficientQuota,
    RateLimited or StoreUnavailable.
    """
    model = world.catalogue.find(model_name)
    if model is None or not world.fleet.may_come(model):
        raise no_such_model(model_name, world.catalogue, world.terms.serves)
    may_use(caller, model)
    if model.reranks:
        raise UnsupportedModality("Rerankers take no confidential requests. Use POST /v1/rerank.", param="model")
    check_units(units, "max_num_tokens")
    if not LOCK_S_MIN <= span_s <= LOCK_S_MAX:
        raise InvalidValue(f"`timeout` is {LOCK_S_MIN} to {LOCK_S_MAX} seconds.", param="timeout")
    node = nodes.choose_sealing(model, scheme, among)
    if node is None:
        of_those = "" if among is None else ", of those that you would seal for"
        raise NoNodeAvailable(
            f"No node that takes confidential requests serves this model now{of_those}. Nodes of embedmesh do, servers "
            "of other makes only with a node beside them (embedmesh node --upstream). Try again shortly."
        )
    price, amount = _price_of(world, model, caller.account_id, units)
    expires_ms = world.clock.unix_ms() + span_s * 1000
    terms = LockTerms(
        lock_id=secrets.randbits(LOCK_ID_BITS),
        account_id=caller.account_id,
        key_id=caller.key_id,
        hold_id=new_id("req", world.clock),
        node_id=node.node_id,
        identity=node.document.public_key,
        node_key=node.document.keys[scheme],
        scheme=scheme,
        model=model.id,
        units=units,
        price=price,
        expires_ms=expires_ms,
    )
    await locks.open(terms, Hold(terms.hold_id, caller.account_id, amount, expires_ms, caller.key_id))
    return terms, node


def _price_of(world: World, model: Model, account_id: str, units: int) -> tuple[int, int]:
    """The dearest price of a million tokens, and what is set aside: for all units at that, or for the dearest image."""
    prices = world.prices
    price = max(prices.of(model, account_id), 0 if model.embeds else prices.meter(model, account_id, Meter.OUTPUT))
    amount = cost_nanousd(units, price)
    for size in model.image_prices:
        amount = max(amount, cost_nanousd(1, prices.image(model, account_id, size)))
    return price, amount


def check_units(units: int, param: str) -> None:
    """Raise InvalidValue where no lock is for that number of tokens."""
    if not 0 < units <= REQUEST_TOKENS_MAX:
        raise InvalidValue(f"`{param}` is 1 to {REQUEST_TOKENS_MAX:,}.", param=param)


def check_fits(call: SealedCall, model: Model, terms: LockTerms) -> None:
    """Raise KeyMismatch where a request was not sealed for what its lock says."""
    expires_ms = call.expires_ms if call.scheme == HPKE_SCHEME else terms.expires_ms  # the SDKs' has none
    said = model.id, call.scheme, call.node_key, expires_ms
    if said != (terms.model, terms.scheme, terms.node_key, terms.expires_ms):
        raise KeyMismatch(
            "The request is sealed for another node, key, scheme, model or expiry than was locked: lock again."
        )
