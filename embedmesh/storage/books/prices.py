"""What tokens, images and searches cost: a price holds from a moment on, for one account or all, until the next."""

import re
from collections.abc import Sequence

import msgspec

from embedmesh.rules.acts import Verb
from embedmesh.rules.errors import InvalidValue
from embedmesh.rules.holds import Meter
from embedmesh.rules.limits import MODEL_ID_CHARS_MAX, MODEL_PRICE_MAX, PAGE_ROWS_MAX
from embedmesh.rules.meters import unit_of
from embedmesh.storage.books.accounts import AccountBooks
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.sql import PRICES_SQL

INPUT = Meter.INPUT.value
METER = re.compile("input|cached|output|searches|images:[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")


class Price(msgspec.Struct, frozen=True):
    """A price of a model, for an account or for all (None), in nano-USD. Times are Unix milliseconds.

    `meter` is `input`, `cached` or `output`: the price is per million tokens; or `images:1024x1024`: for one image; or
    `searches`: for one search.
    """

    price_id: int
    model: str
    account_id: str | None
    price: int
    from_ms: int
    to_ms: int | None
    meter: str = INPUT


class PriceBooks:
    """Prices of one store. Every method raises StoreUnavailable, too."""

    def __init__(self, session: BooksSession, accounts: AccountBooks) -> None:
        self._session = session
        self._accounts = accounts

    def set(
        self,
        model: str,
        price: int,
        *,
        account_id: str | None = None,
        from_ms: int | None = None,
        meter: str = INPUT,
    ) -> Price:
        """A new price, from now or a later moment on. Raises NotFound (no such account), InvalidValue."""
        self._check(model, account_id, meter)
        if not 0 <= price <= MODEL_PRICE_MAX:
            raise InvalidValue(f"A price is 0 to {MODEL_PRICE_MAX:,} nano-USD for {unit_of(meter)}.", param="price")
        now_ms = self._session.clock.unix_ms()
        begins = now_ms if from_ms is None else from_ms
        if begins < now_ms:
            raise InvalidValue("A price cannot begin in the past: what was bought is paid.", param="from_ms")
        which = {"model": model, "meter": meter, "account_id": account_id}
        row = {**which, "price": price, "from_ms": begins, "now_ms": now_ms}
        with self._session.transaction():
            before = self._session.row(PRICES_SQL["price_at"], row)
            self._session.run(PRICES_SQL["end_price"], row)
            (price_id,) = self._session.made(PRICES_SQL["insert_price"], row)[0]
            prices = {"price": [None if before is None else before[0], price], "from_ms": begins}
            self._session.note(Verb.PRICE_SET, model, prices | {"meter": meter, "account": account_id})
        return Price(price_id, model, account_id, price, begins, None, meter)

    def end(self, model: str, *, account_id: str | None = None, meter: str = INPUT) -> bool:
        """End the price now, and later ones that were set: then the price for all holds, or the catalogue's.

        False where none was set.
        """
        self._check(model, account_id, meter)
        which = {"model": model, "meter": meter, "account_id": account_id}
        row = {**which, "from_ms": self._session.clock.unix_ms()}
        with self._session.transaction():
            before = self._session.row(PRICES_SQL["price_at"], row)
            ended = self._session.run(PRICES_SQL["end_price"], row) > 0
            if ended:
                prices = {"price": [None if before is None else before[0], None]}
                self._session.note(Verb.PRICE_END, model, prices | {"meter": meter, "account": account_id})
            return ended

    def list(self, model: str | None = None, *, after: int = 0, rows_max: int = PAGE_ROWS_MAX) -> Sequence[Price]:
        """Of all times, the latest first; of one model, or all. From the price with the id `after` on; 0 is from the
        first on.
        """
        rows = self._session.rows(PRICES_SQL["list_prices"], {"model": model, "after": after, "rows_max": rows_max})
        return [Price(*row) for row in rows]

    def _check(self, model: str, account_id: str | None, meter: str) -> None:
        if not 0 < len(model) <= MODEL_ID_CHARS_MAX or not model.isprintable():
            raise InvalidValue("Name the model by its id.", param="model")
        if not METER.fullmatch(meter):
            words = "A meter is input, cached, output, searches, or images: and a size as 1024x1024."
            raise InvalidValue(words, param="meter")
        if account_id is not None:
            self._accounts.customer(account_id)
