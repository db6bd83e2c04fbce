"""The settings of a gateway's network: where it listens, its own nodes, who signs in, and lists that are parsed."""

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from embedmesh.process import bind
from embedmesh.rules.errors import SetupError
from embedmesh.settings import GatewaySettings

if TYPE_CHECKING:
    from embedmesh.gateway.oidc import SignInTerms

UNIX = "unix:"
T = TypeVar("T")


def listening_socket(settings: GatewaySettings) -> socket.socket:
    """The inherited socket, or a new one. Raises SetupError when the port is taken."""
    if settings.listen_fd is not None:
        return socket.socket(fileno=settings.listen_fd)
    return bind(settings.host, settings.port)


def parsed(make: Callable[[Sequence[str]], T], values: Sequence[str], option: str) -> T:
    """What `make` makes of an option's values. Raises SetupError, which names the option, for its ValueError."""
    try:
        return make(values)
    except ValueError as error:
        raise SetupError(f"{str(error).removesuffix('.')}. Mend {option}.") from None


def node_sockets(settings: GatewaySettings) -> list[str]:
    """The paths of the sockets of --nodes. Raises SetupError."""
    for address in settings.nodes:
        if not address.startswith(UNIX):
            raise SetupError(f"{address} is no address of a node: use unix:/path/to/socket. Mend --nodes.")
    return [address.removeprefix(UNIX) for address in settings.nodes]


def sign_in(settings: GatewaySettings) -> "SignInTerms | None":
    """Whose tokens are good on the admin API; None: there are keys alone. Raises SetupError."""
    if not settings.oidc_issuer:
        if settings.oidc_audience or settings.oidc_role:
            raise SetupError("--oidc-audience and --oidc-role say nothing without --oidc-issuer.")
        return None
    try:
        from embedmesh.gateway.oidc import sign_in_terms
    except ImportError:
        raise SetupError("--oidc-issuer needs another package: pip install 'embedmesh[oidc]'.") from None
    return sign_in_terms(settings)
