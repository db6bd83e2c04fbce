"""`/v1/admin/prices`: what tokens, images and searches cost, for all accounts or for one."""

import functools
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.key_bodies import Id, UnixMs, model_of
from embedmesh.gateway.api.queries import PAGE_ROWS, Limit, NonEmpty
from embedmesh.gateway.api.replies import EndedPrice, PriceReply, ReplyPage, doc, page_of, reply_of
from embedmesh.gateway.api.routes import ADMIN_KEY, READ_KEY, Api, ApiCall, Route
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import InvalidValue, ModelNotFound, NotFound
from embedmesh.rules.holds import Meter
from embedmesh.rules.meters import price_meters, unit_of
from embedmesh.rules.ports import Catalogue

ModelName = Annotated[NonEmpty, doc("A model, by id or alias.")]
INPUT = Meter.INPUT.value
PricedMeter = Annotated[
    NonEmpty, doc("`input`, `cached`, `output`, `searches`, or images of a size: `images:1024x1024`.")
]


class PriceQuery(msgspec.Struct, frozen=True):
    model: ModelName | None = None
    limit: Limit = PAGE_ROWS
    after: Annotated[int, Meta(ge=0, description="The `price_id` of the last price of the page before.")] = 0


class EndPriceQuery(msgspec.Struct, frozen=True):
    model: ModelName
    account: Annotated[str | None, doc("Whose price; by default the price for all accounts.")] = None
    meter: PricedMeter = INPUT


class PriceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price in nano-USD: of a million tokens, an image or a search; for one account or all, from now on or later."""

    model: str
    price: int
    account: Id | None = None
    from_ms: UnixMs | None = None
    meter: PricedMeter = INPUT


_reply = functools.partial(reply_of, PriceReply)


class PricesApi(Api):
    TAG = "Administration"

    def __init__(self, books: BooksThread, bodies: BodyBudget, catalogue: Catalogue) -> None:
        self._books = books
        self.bodies = bodies
        self._catalogue = catalogue

    async def list_prices(self, call: ApiCall[None, PriceQuery]) -> ReplyPage[PriceReply]:
        """List prices that were set. Past prices included, the latest first; of one model or of all."""
        name, limit, after = call.query.model, call.query.limit, call.query.after
        model = None if name is None else self._model_id(name)
        found = await self._books.ask(
            lambda books: books.prices.list(model, after=after, rows_max=limit + 1), viewer=call.viewer
        )
        return page_of(found, limit, _reply)

    async def set_price(self, call: ApiCall[PriceRequest, None]) -> PriceReply:
        """Set a price.

        For one account or for all. It replaces the price before; what was bought already keeps its price.
        """
        new = call.body
        model = model_of(new.model, self._catalogue, param="model")
        if new.meter not in (known := price_meters(model)):
            raise InvalidValue(f"{model.id} has no price for that: use one of {', '.join(known)}.", param="meter")
        terms: dict[str, Any] = {"account_id": new.account, "from_ms": new.from_ms, "meter": new.meter}
        return _reply(await self._books.ask(lambda books: books.prices.set(model.id, new.price, **terms), by=call.by))

    async def end_price(self, call: ApiCall[None, EndPriceQuery]) -> EndedPrice:
        """End a price. Then the price for all accounts applies, or the catalogue's."""
        model, account, meter = self._model_id(call.query.model), call.query.account, call.query.meter
        ending = self._books.ask(lambda books: books.prices.end(model, account_id=account, meter=meter), by=call.by)
        if not await ending:
            what = "" if meter == INPUT else f" for {unit_of(meter)}"
            raise NotFound(f"No price of {model[:200]}{what} is set for {account or 'all accounts'}.")
        return EndedPrice(model, account, meter, True)

    def _model_id(self, name: str) -> str:
        """The id of a catalogue model; a model that left the catalogue is named by its id."""
        model = self._catalogue.find(name)
        return name if model is None else model.id

    ROUTES = (
        Route("GET", "/v1/admin/prices", READ_KEY, list_prices),
        Route("POST", "/v1/admin/prices", ADMIN_KEY, set_price, failures=(ModelNotFound, NotFound)),
        Route("DELETE", "/v1/admin/prices", ADMIN_KEY, end_price, failures=(NotFound,)),
    )
