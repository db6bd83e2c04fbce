"""The secret that key hashes are keyed with. It lives beside the store: a stolen store alone opens nothing."""

import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from embedmesh.files import sync, write_draft
from embedmesh.rules.errors import SetupError
from embedmesh.rules.holds import Claim
from embedmesh.storage.db import Db, Engine
from embedmesh.storage.sql import FACTS_SQL

SECRET_BYTES = 32


SecretOf = Callable[[Engine], bytes]
"""Finds the secret of a store."""


def load_secret(path: Path, engine: Engine) -> bytes:
    """The secret in the file. Raises SetupError.

    It is made (mode 0600) only where there is no store yet: with another secret than its own no key of a store would be
    found.
    """
    try:
        if path.exists():
            return read_secret(path)
        if not engine.is_new():
            raise SetupError(
                f"{path.name} is missing. It belongs to the store {engine.shown}: copy it from another gateway of that "
                f"store, or from where you keep it, to {path.parent}."
            )
        return _make(path)
    except OSError as error:
        raise SetupError(f"Cannot use the key secret {path}: {error.strerror}.") from None


def check_secret(db: Db, secret: bytes) -> None:
    """Refuse a secret other than the one that the store's hashes were made with; a new store takes this one.

    Call it inside a transaction: two processes may make a store at the same moment.
    """
    fingerprint = hashlib.blake2b(b"key secret", key=secret, digest_size=16, person=b"fingerprint").hexdigest()
    name = "key_secret_fingerprint"
    known = db.execute(FACTS_SQL["find_fact"], {"name": name}).fetchone()
    if known is None:
        db.execute(FACTS_SQL["insert_fact"], {"name": name, "value": fingerprint})
    elif known != (fingerprint,):
        raise SetupError("The key secret is not the one this store was made with: restore the file that belongs to it.")


def hash_user(secret: bytes, user: str) -> str:
    """What is kept of a request's field `user`: a keyed hash, 32 hex digits."""
    text = user.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, key=secret, digest_size=16, person=b"user").hexdigest()


def claim_of(secret: bytes, key: str, body: bytes) -> Claim:
    """What is kept of an `Idempotency-Key` and the body that it came with: keyed hashes."""
    text = key.encode("utf-8", "surrogatepass")
    return Claim(
        hashlib.blake2b(text, key=secret, digest_size=32, person=b"idempotency key").digest(),
        hashlib.blake2b(body, key=secret, digest_size=32, person=b"body").digest(),
    )


def read_secret(path: Path) -> bytes:
    """The secret in a file that is there. Raises SetupError."""
    if path.stat().st_mode & 0o077:
        raise SetupError(f"Others can read the key secret {path}: run `chmod 600` on it.")
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise SetupError(f"The key secret {path} must have {SECRET_BYTES} bytes: restore it from a backup.")
    return secret


def _make(path: Path) -> bytes:
    """Written whole under another name first, so that nobody reads half of it, then linked: the first one wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = write_draft(path, secrets.token_bytes(SECRET_BYTES))
    try:
        with suppress(FileExistsError):  # another process was faster: take its secret
            path.hardlink_to(draft)
    finally:
        draft.unlink()
    sync(path.parent)
    return read_secret(path)
