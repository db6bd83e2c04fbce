"""Default limits of new keys: kept in the store, so that commands and all gateways use the same."""

from typing import Any

import msgspec

from embedmesh.rules.acts import Verb, changed
from embedmesh.rules.limits import KEY_LIMIT_MAX
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.books.session import BooksSession
from embedmesh.storage.sql import FACTS_SQL

NEW_KEYS_FACT = "new_keys"
LIMIT_NAMES = ("requests-a-minute", "tokens-a-minute", "concurrency")
LIMITS_EXAMPLE = "requests-a-minute=60,tokens-a-minute=1000000,concurrency=8"


class NewKeys(msgspec.Struct, frozen=True):
    """`limits` of new keys, as the last gateway that started has them, and whether it listens beyond its machine."""

    limits: Limits = Limits()
    open_to_others: bool = False


def parse_limits(text: str) -> Limits:
    """Limits as in LIMITS_EXAMPLE, any of them; an empty text is no limits. Raises ValueError, in words."""
    found: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in LIMIT_NAMES or name.replace("-", "_") in found:
            raise ValueError(
                f"{part.strip()!r} is none of {', '.join(LIMIT_NAMES)}, each once: write {LIMITS_EXAMPLE}."
            )
        if not (value.isascii() and value.isdigit() and 1 <= int(value[:20]) <= KEY_LIMIT_MAX):
            raise ValueError(f"{name} is a whole number from 1 to {KEY_LIMIT_MAX}, not {value!r}.")
        found[name.replace("-", "_")] = int(value)
    return msgspec.convert(found, Limits)


class NewKeyBooks:
    """Of one store. Every method raises StoreUnavailable."""

    def __init__(self, session: BooksSession) -> None:
        self._session = session

    def read(self) -> NewKeys:
        """What was written last, or no limits."""
        row = self._session.row(FACTS_SQL["find_fact"], {"name": NEW_KEYS_FACT})
        return NewKeys() if row is None else msgspec.json.decode(row[0], type=NewKeys)

    def write(self, new_keys: NewKeys) -> None:
        """Use them from now on. Existing keys stay as they are."""
        before = self.read()
        if before != new_keys:
            row = {"name": NEW_KEYS_FACT, "value": msgspec.json.encode(new_keys).decode()}
            with self._session.transaction():
                self._session.run(FACTS_SQL["set_fact"], row)
                said = changed(_shown(before), _shown(new_keys))
                self._session.note(Verb.KEY_DEFAULTS_CHANGE, NEW_KEYS_FACT, said)


def _shown(new_keys: NewKeys) -> dict[str, Any]:
    return msgspec.structs.asdict(new_keys.limits) | {"open_to_others": new_keys.open_to_others}
