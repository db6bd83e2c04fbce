"""Where a node says it can be reached, and which IPs the gateway may connect to for it.

A node's address is hostile input: its author chooses what our machine connects to. Three steps check it:

- `parse` is a small grammar of our own. URL libraries disagree about odd text, which attacks use. We refuse odd text,
  and work with the parts, never with the text.
- `Policy` has its own table of networks that are not public. `ipaddress.is_global` does not suffice: it is true of
  `64:ff9b::a9fe:a9fe`, the cloud's metadata service seen through NAT64.
- `resolve` looks a name up once and returns one checked IP. The caller connects to that IP and never looks again: the
  second answer may differ.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from embedmesh.rules.limits import ADDRESS_CHARS_MAX

DNS_NAME_CHARS_MAX = 253
PORT_MAX = 65_535
DEFAULT_PORTS = {"https": 443, "http": 80}
LOOKUP_RESULTS_MAX = 16  # a node has one or two; more are an attack
LOOKUP_S = 2.0  # registrations are rare and may wait; a node with a slower name is no good node

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]  # host and port to IPs, in text
Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The first row that contains an address names it. The last row is all IPv6 outside 2000::/3, the only part that is
# assigned; the IPv6 networks before it only give better names.
DENIED: Sequence[tuple[Network, str]] = [
    (ipaddress.ip_network(network), what)
    for what, networks in (
        ("an address of this network", "0.0.0.0/8 ::/128"),  # 0.0.0.0 connects to this machine on Linux
        ("a loopback address", "127.0.0.0/8 ::1/128"),
        ("a private address", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16"),
        ("a private address", "fc00::/7 fec0::/10"),  # also the metadata of AWS, fd00:ec2::254
        ("a link-local address", "169.254.0.0/16 fe80::/10"),  # also most clouds' metadata, 169.254.169.254
        ("an address behind a carrier's NAT", "100.64.0.0/10"),  # also Alibaba's metadata, 100.100.100.200
        ("an address of the cloud's own services", "168.63.129.16/32"),  # Azure's, among public ones
        ("an address reserved for protocols", "192.0.0.0/24"),  # also Oracle's metadata, 192.0.0.192
        ("an address reserved for protocols", "2001::/23"),  # Teredo, which holds an IPv4 address; ORCHID
        ("an address for documentation", "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20"),
        ("an address for benchmarks", "198.18.0.0/15"),
        ("a multicast address", "224.0.0.0/4 ff00::/8"),
        ("a reserved address", "240.0.0.0/4"),  # broadcast included
        ("a 6to4 relay", "192.88.99.0/24"),
        ("a 6to4 address", "2002::/16"),  # holds an IPv4 address
        ("an IPv4 address in the form of IPv6", "::ffff:0:0/96 ::/96"),
        ("a NAT64 address", "64:ff9b::/96 64:ff9b:1::/48"),  # holds an IPv4 address
        ("an address outside the public internet", "::/3 4000::/2 8000::/1"),
    )
    for network in networks.split()
]

_CHARACTERS = re.compile(r"[A-Za-z0-9.:/\[\]-]*")
_SHAPE = re.compile(r"(\[[0-9A-Fa-f:.]*\]|[A-Za-z0-9.-]*)(?::([0-9]*))?/?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9-]+|0x[0-9a-f]*")  # as a last label, to some resolvers the whole is an IPv4 address: 0x7f.1
_CIDR = re.compile(r"[0-9A-Fa-f:.]+/(0|[1-9][0-9]{0,2})")  # no netmask, no zone


class AddressRefused(ValueError):
    """The gateway does not connect there. The message never tells which IP was found."""


class NodeAddress(msgspec.Struct, frozen=True):
    """A well-formed address in parts. `host` is a lower-case DNS name, or an IP in its one canonical form."""

    tls: bool
    host: str
    port: int

    def __str__(self) -> str:
        """The address in full, which `parse` reads back."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


def parse(text: str) -> NodeAddress:
    """The parts of an address. Raises ValueError, whose message is for the node's operator and quotes nothing."""
    if len(text) > ADDRESS_CHARS_MAX:
        raise ValueError(f"The address is longer than {ADDRESS_CHARS_MAX} characters.")
    if not _CHARACTERS.fullmatch(text):
        raise ValueError("The address may hold only letters, digits, brackets and . : / -, nothing else.")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in DEFAULT_PORTS:
        raise ValueError("The address must begin with https:// or http:// (in lower case).")
    shape = _SHAPE.fullmatch(rest)
    if shape is None:
        raise ValueError("The address must be https://HOST:PORT and nothing more; an IPv6 address needs brackets.")
    host, port = shape.groups()
    return NodeAddress(
        tls=scheme == "https", host=_host(host), port=DEFAULT_PORTS[scheme] if port is None else _port(port)
    )


def _port(digits: str) -> int:
    if not _PORT.fullmatch(digits) or int(digits) > PORT_MAX:
        raise ValueError(f"The port must be a number from 1 to {PORT_MAX} without leading zeros.")
    return int(digits)


def _host(text: str) -> str:
    if text.startswith("["):
        ip = _ip(text[1:-1])
        if not isinstance(ip, ipaddress.IPv6Address):
            raise ValueError("The text in brackets is not an IPv6 address.")
        return str(ip)
    if _ip(text):
        return text  # four decimals, which have one form only
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > DNS_NAME_CHARS_MAX or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("The host is neither an IP address nor a DNS name.")
    if _NUMBER.fullmatch(labels[-1]):
        raise ValueError("The host ends in a number, but is not four decimals from 0 to 255 without leading zeros.")
    return name


def _ip(text: str) -> Ip | None:
    """The IP that a text is, if any. An IP with a zone is refused: the zone is a network interface of ours."""
    written = str(text)  # the library accepts integers and bytes, too, and look-ups are not to be trusted
    try:
        return None if "%" in written else ipaddress.ip_address(written)
    except ValueError:
        return None


class Policy:
    """The IPs that we may connect to: the public internet, and the networks of the operator's allow-list.

    An IPv4 address in IPv6 form counts as IPv6. It is never unwrapped, so an allowed `10.0.0.0/8` does not allow
    `::ffff:10.0.0.1`.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = [_network(text) for text in allowed]

    def become(self, other: "Policy") -> None:
        """Allow what the other one allows, for nodes that register from now on."""
        self._allowed = other._allowed

    def permits_plain(self, ip: str) -> bool:
        """Whether the gateway may connect to this IP without TLS: only inside a network of the allow-list."""
        address = _ip(ip)
        return address is not None and any(address in network for network in self._allowed)

    def refusal(self, ip: str) -> str | None:
        """Why the gateway must not connect to this IP, in words ("a private address"); None if it may."""
        address = _ip(ip)
        if address is None:
            return "no IP address"
        if self.permits_plain(ip):
            return None
        return next((what for network, what in DENIED if address in network), None)


def _network(text: str) -> Network:
    if not _CIDR.fullmatch(text):
        raise ValueError(f"{text!r} is not a network in the form 10.0.0.0/8 or fd00::/8.")
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a network: an address whose bits after the prefix are zero.") from None


async def resolve(endpoint: NodeAddress, policy: Policy, lookup: Lookup) -> str:
    """The one IP to connect to from now on. Raises AddressRefused.

    All IPs of a name must be permitted: a public one beside a private one is an attack or a mistake.
    """
    literal = _ip(endpoint.host) is not None
    found = [endpoint.host] if literal else await _look_up(endpoint, lookup)
    for ip in found:
        what = policy.refusal(ip)
        if what is not None:
            raise AddressRefused(f"The host {'is' if literal else 'resolves to'} {what}.")
        if not endpoint.tls and not policy.permits_plain(ip):
            raise AddressRefused("Plain http is not permitted there: use https.")
    return str(_ip(found[0]))  # the checked form, not the text


async def _look_up(endpoint: NodeAddress, lookup: Lookup) -> Sequence[str]:
    try:
        found = (await lookup(endpoint.host, endpoint.port))[:LOOKUP_RESULTS_MAX]
    except OSError as failure:  # TimeoutError is one
        raise AddressRefused("The host could not be looked up.") from failure
    if not found:
        raise AddressRefused("The host resolves to no address.")
    return found


async def system_lookup(host: str, port: int, *, within_s: float = LOOKUP_S) -> list[str]:
    """What this machine's resolver says. Raises OSError; TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
