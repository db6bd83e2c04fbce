"""The first start: an account with credit, an API key, an admin key, and the file that holds them."""

from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from embedmesh.credentials import BOOTSTRAP, Credentials, read_bootstrap
from embedmesh.files import sync, write_draft
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import InvalidValue, SetupError
from embedmesh.rules.money import NANOUSD_PER_USD
from embedmesh.settings import GatewaySettings, secret_path, store_path
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import CALLER_SCOPES, Limits
from embedmesh.storage.books.new_keys import parse_limits
from embedmesh.storage.secrets.secret import load_secret

BOOTSTRAP_ACCOUNT = "local"
BOOTSTRAP_CREDIT_NANOUSD = 100 * NANOUSD_PER_USD  # ten billion tokens of the default model
ADMIN_SCOPES = (*CALLER_SCOPES, "metrics", "keys", "admin")


def bootstrap(data_dir: Path, base_url: str, store: str | Path | None = None) -> Credentials:
    """The contents of `bootstrap.json`, made on the first start; a later one only updates the address.

    Raises SetupError when the file cannot be read, or the folder cannot be used.
    """
    path = data_dir / BOOTSTRAP
    try:
        written = read_bootstrap(data_dir)
        credentials = written or _make_keys(data_dir, base_url, store or store_path(data_dir))
        credentials = msgspec.structs.replace(credentials, base_url=base_url)
        if credentials != written:
            content = msgspec.json.format(msgspec.json.encode(credentials), indent=2) + b"\n"
            write_draft(path, content).replace(path)
            sync(data_dir)
    except OSError as error:
        raise SetupError(f"Cannot use {path}: {error.strerror}. Choose another --data-dir.") from None
    return credentials


def _make_keys(data_dir: Path, base_url: str, store: str | Path) -> Credentials:
    ours = "://" not in str(store)  # a server's store may be in use by gateways of an older version
    with open_books(data_dir, store, migrating=ours) as books:
        with suppress(InvalidValue):  # it exists: the first start stopped half-way, or another gateway made it
            books.accounts.create(BOOTSTRAP_ACCOUNT)
        books.accounts.credit(BOOTSTRAP_ACCOUNT, BOOTSTRAP_CREDIT_NANOUSD, "bootstrap")
        _, api_key = books.keys.create(BOOTSTRAP_ACCOUNT, CALLER_SCOPES, name="bootstrap")
        _, admin_key = books.keys.create(BOOTSTRAP_ACCOUNT, ADMIN_SCOPES, name="bootstrap admin")
    return Credentials(base_url=base_url, api_key=api_key, admin_key=admin_key, account=BOOTSTRAP_ACCOUNT)


def open_books(data_dir: Path, store: str | Path, *, migrating: bool = False, for_others: bool = False) -> Books:
    """The books of a store whose key secret is in a data directory; created if missing. Raises SetupError.

    Set `migrating` only just before a gateway starts, `for_others` where others than this user act: see Books.open.
    """
    secret = partial(load_secret, secret_path(data_dir))
    return Books.open(store, clock=SystemClock(), secret=secret, migrating=migrating, for_others=for_others)


def key_defaults(settings: GatewaySettings) -> Limits:
    """The limits of new keys that are created without any. Raises SetupError."""
    try:
        return parse_limits(settings.key_defaults)
    except ValueError as error:
        raise SetupError(f"{error} Correct --key-defaults.") from None
