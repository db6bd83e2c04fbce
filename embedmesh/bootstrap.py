"""The first start: an account with credit, one API key, one admin key, and a file that tells where they are."""

from pathlib import Path

import msgspec

from embedmesh.files import sync, write_draft
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError
from embedmesh.rules.money import NANOUSD_PER_USD
from embedmesh.settings import BOOTSTRAP, Credentials, read_bootstrap, secret_path, store_path
from embedmesh.storage.books import Books
from embedmesh.storage.secret import load_secret

ACCOUNT = "local"
CREDIT_NANOUSD = 100 * NANOUSD_PER_USD  # ten billion tokens of the default model
API_SCOPES = ("embeddings",)
ADMIN_SCOPES = ("embeddings", "metrics", "keys", "admin")


def bootstrap(data_dir: Path, base_url: str) -> Credentials:
    """What `bootstrap.json` says, made on the first start; on a later one only the address is brought up to date.

    Raises SetupError when the file is there and cannot be read, or the folder cannot be used.
    """
    path = data_dir / BOOTSTRAP
    try:
        return _bootstrap(path, data_dir, base_url)
    except OSError as error:
        raise SetupError(f"Cannot use {path}: {error.strerror}. Choose another --data-dir.") from None


def _bootstrap(path: Path, data_dir: Path, base_url: str) -> Credentials:
    credentials = read_bootstrap(data_dir)
    if credentials is not None:
        if credentials.base_url != base_url:
            credentials = msgspec.structs.replace(credentials, base_url=base_url)
            _write(path, credentials)
        return credentials
    with open_books(data_dir, migrating=True) as books:
        if ACCOUNT not in {account.account_id for account in books.accounts()}:  # else: stopped half-way before
            books.create_account(ACCOUNT)
        books.credit(ACCOUNT, CREDIT_NANOUSD, "bootstrap")
        _, api_key = books.create_key(ACCOUNT, API_SCOPES, name="bootstrap")
        _, admin_key = books.create_key(ACCOUNT, ADMIN_SCOPES, name="bootstrap admin")
    credentials = Credentials(base_url=base_url, api_key=api_key, admin_key=admin_key, account=ACCOUNT)
    _write(path, credentials)
    return credentials


def open_books(data_dir: Path, *, migrating: bool = False) -> Books:
    """The books of the embedded store in a data directory; made if there are none. Raises SetupError.

    Only whoever is about to start a gateway may be `migrating`: see Books.open.
    """
    store = store_path(data_dir)
    secret = load_secret(secret_path(data_dir), store=store)
    return Books.open(store, clock=SystemClock(), key_secret=secret, migrating=migrating)


def _write(path: Path, credentials: Credentials) -> None:
    """Whole or not at all, readable by its owner only."""
    write_draft(path, msgspec.json.format(msgspec.json.encode(credentials), indent=2) + b"\n").replace(path)
    sync(path.parent)
