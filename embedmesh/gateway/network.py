"""The settings of a gateway's network: where it listens, and the lists that are parsed when it starts."""

import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from embedmesh.process import bind
from embedmesh.rules.errors import SetupError
from embedmesh.settings import GatewaySettings

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
