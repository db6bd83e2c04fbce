"""What new keys get where nobody says otherwise: kept in the store, so that commands and all gateways do the same."""

import msgspec

from embedmesh.storage.books.keys import LIMIT_MAX, Limits
from embedmesh.storage.books.session import Session
from embedmesh.storage.sql import load

FACTS = load("facts.sql")
FACT = "new_keys"
NAMES = ("requests-a-minute", "tokens-a-minute", "concurrency")
EXAMPLE = "requests-a-minute=60,tokens-a-minute=1000000,concurrency=8"


class NewKeys(msgspec.Struct, frozen=True):
    """`limits` of new keys, as the gateway that started last was told; and whether it listens beyond its machine."""

    limits: Limits = Limits()
    open_to_others: bool = False


def parse_limits(text: str) -> Limits:
    """Limits as in EXAMPLE, any of them; no text is none. Raises ValueError, in words."""
    found: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in NAMES or name.replace("-", "_") in found:
            raise ValueError(f"{part.strip()!r} is none of {', '.join(NAMES)}, each once: write {EXAMPLE}.")
        if not (value.isascii() and value.isdigit() and 1 <= int(value[:20]) <= LIMIT_MAX):
            raise ValueError(f"{name} is a whole number from 1 to {LIMIT_MAX}, not {value!r}.")
        found[name.replace("-", "_")] = int(value)
    return msgspec.convert(found, Limits)


class NewKeyBooks:
    """Of one store. Every method raises StoreUnavailable."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def read(self) -> NewKeys:
        """What was said last; no limits where nothing was."""
        row = self._session.row(FACTS["find_fact"], {"name": FACT})
        return NewKeys() if row is None else msgspec.json.decode(row[0], type=NewKeys)

    def write(self, new_keys: NewKeys) -> None:
        """Say it from now on. Keys that are there stay as they are."""
        if self.read() != new_keys:
            row = {"name": FACT, "value": msgspec.json.encode(new_keys).decode()}
            with self._session.transaction():
                self._session.run(FACTS["set_fact"], row)
