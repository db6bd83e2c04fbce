"""Which operations a batch can have, and what a line of one is to them."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from embedmesh.fleet.leftover import Leftover, PatientFleet
from embedmesh.flow.operation import CanPay, Invocation, Operation
from embedmesh.flow.paid import SOON_BYTES_MAX
from embedmesh.flow.world import World
from embedmesh.rules.batches import UsedTokens, batch_price
from embedmesh.rules.errors import BodyTooLarge, InvalidValue
from embedmesh.rules.exchange import RequestHead
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller, Catalogue, Prices, RateLimit
from embedmesh.rules.reranking import SEARCH_DOCUMENTS

Endpoints = Mapping[str, Operation]
"""By path."""

IMAGE_PRICE = "image:"  # and a size: the name of such a price
TOKEN_METERS = (Meter.INPUT, Meter.CACHED, Meter.OUTPUT)


class FixedPrices(msgspec.Struct, frozen=True):
    """The prices of one batch, by the names of their meters. Implements the port `Prices`."""

    prices: Mapping[str, int]

    def of(self, model: Model, account_id: str) -> int:
        return self.prices[Meter.INPUT.value]

    def meter(self, model: Model, account_id: str, meter: Meter) -> int:
        return self.prices[meter.value]

    def image(self, model: Model, account_id: str, size: str) -> int:
        return self.prices[IMAGE_PRICE + size]

    def search(self, model: Model, account_id: str) -> int:
        return self.prices[Meter.SEARCHES.value]


def prices_now(prices: Prices, model: Model, account_id: str, ratio_ppm: int) -> dict[str, int]:
    """What a batch of this model costs that begins now, by the names of the meters."""
    found = {Meter.INPUT.value: prices.of(model, account_id)}
    if not model.encodes:
        found |= {meter.value: prices.meter(model, account_id, meter) for meter in (Meter.CACHED, Meter.OUTPUT)}
        found |= {IMAGE_PRICE + size: prices.image(model, account_id, size) for size in model.image_prices}
    if model.search_price is not None:
        found[Meter.SEARCHES.value] = prices.search(model, account_id)
    return {name: batch_price(price, ratio_ppm) for name, price in found.items()}


def token_price(prices: Mapping[str, int], model: Model) -> int:
    """The least that a million tokens of a batch's input cost. Of searches: if each is as long as it can be."""
    searches = prices.get(Meter.SEARCHES.value)
    return prices[Meter.INPUT.value] if searches is None else -(-searches // (SEARCH_DOCUMENTS * model.max_tokens))


def at_prices(world: World, prices: Mapping[str, int], known: Catalogue | None = None) -> World:
    """The world in which one batch's lines are worked off, with the models that are `known` to it."""
    return msgspec.structs.replace(world, prices=FixedPrices(prices), catalogue=known or world.catalogue)


class Unlimited:
    """A batch takes nothing from what its key may do in a minute. Implements the port `RateLimits`."""

    async def take_request(self, caller: Caller) -> None: ...

    async def take_tokens(self, caller: Caller, tokens: int) -> None: ...

    def take_now(self, caller: Caller, tokens: int, *, look: bool = False) -> bool:
        return True

    def spend_tokens(self, caller: Caller, tokens: int) -> None: ...

    def left(self, caller: Caller) -> tuple[RateLimit, ...]:
        return ()


def world_of_lines(world: World, leftover: Leftover) -> World:
    """The world as lines of batches see it: patient nodes, and nothing that limits a key."""
    return msgspec.structs.replace(world, fleet=PatientFleet(leftover), rate_limits=Unlimited())


class CountedLine(msgspec.Struct):
    """A line's request, parsed and counted. `inputs` is how many texts or pairs it has, 1 for what is generated."""

    call: Invocation
    tokens: int
    inputs: int


async def counted_line(world: World, operation: Operation, caller: Caller, body: bytes) -> CountedLine:
    """Parse and count a line's request, as the spine does. Raises a Failure: the line cannot be done."""
    if len(body) > REQUEST_BODY_BYTES_MAX:
        raise BodyTooLarge(f"The body is larger than {REQUEST_BODY_BYTES_MAX:,} bytes. Split the inputs over lines.")
    if len(body) <= SOON_BYTES_MAX:
        call = operation.parse(world, RequestHead(), body)
    else:
        call = await world.turns.call(caller.account_id, operation.parse, world, RequestHead(), body)
    if call.streams:
        raise InvalidValue("The reply to a line of a batch is no stream: leave `stream` out.", param="stream")
    if call.reply_bytes_max > world.replies.alone:
        raise InvalidValue(
            f"The reply would take up to {call.reply_bytes_max:,} bytes; one of at most {world.replies.alone:,} can be "
            'made here. Split the inputs, or ask for "encoding_format": "base64".'
        )
    tokens = await call.count(world, caller, _nobody_asks)
    counted: Any = getattr(call, "counted", None)
    return CountedLine(call, tokens, 1 if counted is None else len(counted.lengths))


async def _nobody_asks(model: Model) -> CanPay | None:
    """Whether a batch can be paid is known when all its lines are counted."""
    return None


def used_tokens(metered: tuple[Metered, ...]) -> UsedTokens:
    """The tokens of some charges, by meter; cached input is input, too."""
    sums = dict.fromkeys(TOKEN_METERS, 0)
    for each in metered:
        if each.meter in sums:
            sums[each.meter] += each.quantity
    cached = sums[Meter.CACHED]
    return UsedTokens(sums[Meter.INPUT] + cached, cached, sums[Meter.OUTPUT])


def sum_of_used(used: Iterable[UsedTokens]) -> UsedTokens:
    """All of it together."""
    tokens = cached = output = 0
    for each in used:
        tokens, cached, output = tokens + each.input, cached + each.cached, output + each.output
    return UsedTokens(tokens, cached, output)
