"""Which gateway a command talks to, and with which key.

A key goes only where its owner sent it: the keys of bootstrap.json are used with the address of bootstrap.json alone.
"""

import os
from pathlib import Path
from typing import Literal

import msgspec

from embedmesh.client import access
from embedmesh.client.errors import WrongCall
from embedmesh.credentials import BOOTSTRAP, read_bootstrap
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import UPSTREAM_TOKEN_CHARS_MAX

OPTIONS_OF_SCOPE = {"api": ("--url", "--api-key-file"), "admin": ("--gateway", "--admin-key-file")}


class GatewayAccess(msgspec.Struct, frozen=True):
    """`base_url` ends in `/v1` and not in a slash; `key` is the bearer key."""

    base_url: str
    key: str

    @property
    def root(self) -> str:
        """The address without `/v1`."""
        return self.base_url.removesuffix("/v1")


def find_gateway(
    url: str | None, key_file: Path | None, data_dir: Path, kind: Literal["api", "admin"]
) -> GatewayAccess:
    """What the command line says, else EMBEDMESH_BASE_URL and EMBEDMESH_API_KEY (or EMBEDMESH_ADMIN_KEY), else
    bootstrap.json in `data_dir`.

    Raises SetupError that says what to give.
    """
    url_option, key_option = OPTIONS_OF_SCOPE[kind]
    local = read_bootstrap(data_dir)
    base_url = url or os.environ.get("EMBEDMESH_BASE_URL") or (local.base_url if local else None)
    if not base_url:
        raise SetupError(
            f"No gateway is known: there is no {BOOTSTRAP} in {data_dir}."
            f" Start `embedmesh serve` once, or give {url_option} and {key_option}."
        )
    base_url = checked_url(base_url)
    if kind == "admin" and not base_url.endswith("/v1"):
        base_url += "/v1"  # as `embedmesh node --gateway` has it
    variable = f"EMBEDMESH_{kind.upper()}_KEY"
    key = read_key(key_file) if key_file else os.environ.get(variable)
    if not key and local and base_url == local.base_url.rstrip("/"):
        key = local.api_key if kind == "api" else local.admin_key
    if not key:
        what = "API key" if kind == "api" else "admin key"
        raise SetupError(f"No {what} is known for {base_url}. Give {key_option} or set {variable}.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise SetupError("The key has characters that no key has. Give the key alone, on one line.")
    return GatewayAccess(base_url, key)


def checked_url(base_url: str) -> str:
    """A gateway's address without a slash at its end. Raises SetupError."""
    try:
        return access.checked_url(base_url)
    except WrongCall as error:
        raise SetupError(str(error)) from None


def read_key(file: Path) -> str:
    """The key in a file. Raises SetupError."""
    try:
        with file.open("rb") as stream:
            return stream.read(UPSTREAM_TOKEN_CHARS_MAX).decode("ascii").strip()
    except OSError as error:
        raise SetupError(f"The key file {file} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise SetupError(f"{file} is no key file: it holds more than ASCII.") from None
