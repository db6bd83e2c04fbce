"""Which gateway a command talks to, and with which key.

A key goes only where its owner sent it: the key of bootstrap.json is used with the address of bootstrap.json alone.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from embedmesh.rules.errors import SetupError
from embedmesh.settings import BOOTSTRAP, read_bootstrap

KEY_FILE_BYTES_MAX = 4_096  # a key has about 50 characters


class Endpoint(msgspec.Struct, frozen=True):
    """`base_url` ends in `/v1` and not in a slash; `api_key` is the bearer key."""

    base_url: str
    api_key: str


def find_endpoint(url: str | None, key_file: Path | None, data_dir: Path) -> Endpoint:
    """What the command line says, else EMBEDMESH_BASE_URL and EMBEDMESH_API_KEY, else bootstrap.json in `data_dir`.

    Raises SetupError that says what to give.
    """
    local = read_bootstrap(data_dir)
    base_url = url or os.environ.get("EMBEDMESH_BASE_URL") or (local.base_url if local else None)
    if not base_url:
        raise SetupError(
            f"No endpoint is known: there is no {BOOTSTRAP} in {data_dir}."
            " Start one with `embedmesh serve`, or give --url and --api-key-file."
        )
    base_url = checked_url(base_url)
    key = read_key(key_file) if key_file else os.environ.get("EMBEDMESH_API_KEY")
    if not key and local and base_url == local.base_url.rstrip("/"):
        key = local.api_key
    if not key:
        raise SetupError(f"No API key is known for {base_url}. Give --api-key-file or set EMBEDMESH_API_KEY.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise SetupError("The API key has characters that no key has. Give the key alone, on one line.")
    return Endpoint(base_url, key)


def checked_url(base_url: str) -> str:
    """A gateway's address as it is used. Raises SetupError."""
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or "@" in parts.netloc or parts.query or parts.fragment:
        raise SetupError("The endpoint's address must look like http://127.0.0.1:8080/v1, without user or query.")
    return base_url.rstrip("/")


def read_key(file: Path) -> str:
    """The key in a file. Raises SetupError."""
    try:
        with file.open("rb") as stream:
            return stream.read(KEY_FILE_BYTES_MAX).decode("ascii").strip()
    except OSError as error:
        raise SetupError(f"The key file {file} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise SetupError(f"{file} is no key file: it holds more than ASCII.") from None
