"""The settings of a gateway's network, checked: where it listens, whom it trusts, and where its nodes may be."""

import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from embedmesh.fleet.addresses import Policy
from embedmesh.http.connections import Origins
from embedmesh.http.cors import Cors
from embedmesh.process import bind
from embedmesh.rules.errors import SetupError
from embedmesh.settings import GatewaySettings

UNIX = "unix:"

T = TypeVar("T")


def listening_socket(settings: GatewaySettings) -> socket.socket:
    """The inherited socket, or a new one. Raises SetupError when the port is taken."""
    if settings.listen_fd is not None:
        return socket.socket(fileno=settings.listen_fd)
    return bind(settings.host, settings.port)


def trusted_origins(proxies: Sequence[str]) -> Origins:
    """Which proxies may name the callers behind them. Raises SetupError."""
    return _checked(Origins, proxies, "--trusted-proxies")


def allowed_origins(origins: Sequence[str]) -> Cors | None:
    """Which web pages may call the API. Raises SetupError."""
    return _checked(Cors, origins, "--cors-origin") if origins else None


def node_policy(networks: Sequence[str]) -> Policy:
    """Which addresses nodes may have. Raises SetupError."""
    return _checked(Policy, networks, "--node-networks")


def socket_path(address: str) -> str:
    """The Unix socket of one of --nodes. Raises SetupError."""
    if not address.startswith(UNIX):
        raise SetupError(f"{address} is no address of a node: use unix:/path/to/socket. Mend --nodes.")
    return address.removeprefix(UNIX)


def _checked(make: Callable[[Sequence[str]], T], values: Sequence[str], option: str) -> T:
    try:
        return make(values)
    except ValueError as error:
        raise SetupError(f"{str(error).removesuffix('.')}. Mend {option}.") from None
