"""The first start: an account with credit, one API key, one admin key, and a file that tells where they are."""

from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from embedmesh.files import sync, write_draft
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import InvalidValue, SetupError
from embedmesh.rules.money import NANOUSD_PER_USD
from embedmesh.settings import BOOTSTRAP, Credentials, GatewaySettings, read_bootstrap, secret_path, store_path
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.books.new_keys import parse_limits
from embedmesh.storage.secrets.secret import load_secret

ACCOUNT = "local"
CREDIT_NANOUSD = 100 * NANOUSD_PER_USD  # ten billion tokens of the default model
API_SCOPES = ("embeddings",)
ADMIN_SCOPES = ("embeddings", "metrics", "keys", "admin")


def bootstrap(data_dir: Path, base_url: str, store: str | Path | None = None) -> Credentials:
    """What `bootstrap.json` says, made on the first start; on a later one only the address is brought up to date.

    Raises SetupError when the file is there and cannot be read, or the folder cannot be used.
    """
    path = data_dir / BOOTSTRAP
    try:
        return _bootstrap(path, data_dir, base_url, store or store_path(data_dir))
    except OSError as error:
        raise SetupError(f"Cannot use {path}: {error.strerror}. Choose another --data-dir.") from None


def _bootstrap(path: Path, data_dir: Path, base_url: str, store: str | Path) -> Credentials:
    credentials = read_bootstrap(data_dir)
    if credentials is not None:
        if credentials.base_url != base_url:
            credentials = msgspec.structs.replace(credentials, base_url=base_url)
            _write(path, credentials)
        return credentials
    ours = "://" not in str(store)  # a server's store may be in use by gateways of an older version
    with open_books(data_dir, store, migrating=ours) as books:
        with suppress(InvalidValue):  # it is there: stopped half-way before, or made by another gateway of the store
            books.accounts.create(ACCOUNT)
        books.accounts.credit(ACCOUNT, CREDIT_NANOUSD, "bootstrap")
        _, api_key = books.keys.create(ACCOUNT, API_SCOPES, name="bootstrap")
        _, admin_key = books.keys.create(ACCOUNT, ADMIN_SCOPES, name="bootstrap admin")
    credentials = Credentials(base_url=base_url, api_key=api_key, admin_key=admin_key, account=ACCOUNT)
    _write(path, credentials)
    return credentials


def open_books(data_dir: Path, store: str | Path, *, migrating: bool = False) -> Books:
    """The books of a store whose key secret is in a data directory; made if there are none. Raises SetupError.

    Only whoever is about to start a gateway may be `migrating`: see Books.open.
    """
    secret = partial(load_secret, secret_path(data_dir))
    return Books.open(store, clock=SystemClock(), secret=secret, migrating=migrating)


def key_defaults(settings: GatewaySettings) -> Limits:
    """What new keys get where no limits are given. Raises SetupError."""
    try:
        return parse_limits(settings.key_defaults)
    except ValueError as error:
        raise SetupError(f"{error} Mend --key-defaults.") from None


def _write(path: Path, credentials: Credentials) -> None:
    """Whole or not at all, readable by its owner only."""
    write_draft(path, msgspec.json.format(msgspec.json.encode(credentials), indent=2) + b"\n").replace(path)
    sync(path.parent)
