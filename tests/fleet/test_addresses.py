"""A node's address is hostile input: odd text is refused, and so is every IP that is not the public internet's."""

import ipaddress
import re
import socket
from urllib.parse import SplitResult, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from embedmesh.fleet.addresses import (
    DEFAULT_PORTS,
    DENIED,
    LOOKUP_RESULTS_MAX,
    AddressRefused,
    Endpoint,
    Policy,
    parse,
    resolve,
    system_lookup,
)
from tests.fleet.hostile_addresses import (
    ANSWERS,
    FORBIDDEN_IPS,
    FORBIDDEN_NAMES,
    HOSTILE,
    MALFORMED,
    PUBLIC_IP,
    scripted_lookup,
)

NOTHING_ALLOWED = Policy([])


def permits(policy: Policy, ip: str) -> bool:
    return policy.refusal(ip) is None


PRIVATE_IP = "10.0.0.7"


class Scripted:
    """A resolver that gives one answer after another, and remembers how often it was asked."""

    def __init__(self, *answers: list[str] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_is_not_plainly_an_address_is_refused_in_words() -> None:
    """In one of eight sentences, all met here. They are for the node's operator and repeat nothing."""
    said = set()
    for address, why in MALFORMED:
        with pytest.raises(ValueError, match=r"^(The|What) [a-zA-Z0-9 :/.,;()-]{20,140}\.$") as refused:
            pytest.fail(f"{address[:300]!r} ({why}) became {parse(address)}")
        said.add(str(refused.value))
    assert len(said) == 8


async def test_every_hostile_address_is_refused() -> None:
    """As a caller would use it: parsed, then resolved. The list is long and has no address twice."""
    accepted = []
    for address, why in HOSTILE:
        try:
            accepted.append((address, why, await resolve(parse(address), NOTHING_ALLOWED, scripted_lookup)))
        except ValueError as refusal:
            assert not isinstance(refusal, UnicodeError), address
            assert refusal.__class__ is (ValueError if (address, why) in MALFORMED else AddressRefused), address
    assert accepted == []
    assert len({address for address, _ in HOSTILE}) == len(HOSTILE) > 300


async def test_a_refusal_never_says_what_a_name_resolves_to() -> None:
    """Or nodes could read the names of our network through us."""
    found = {ip for answer in ANSWERS.values() for ip in answer if ip}
    for address, _ in FORBIDDEN_NAMES:
        with pytest.raises(AddressRefused) as refused:
            await resolve(parse(address), NOTHING_ALLOWED, scripted_lookup)
        assert not [ip for ip in found if ip in str(refused.value)]


SAYS = [
    # address, the refusal
    ("https://127.0.0.1", "The host is a loopback address."),
    ("https://localhost", "The host resolves to a loopback address."),
    ("https://mixed.hostile.example", "The host resolves to a private address."),
    ("https://metadata.google.internal", "The host resolves to a link-local address."),
    ("https://[::ffff:8.8.8.8]", "The host is an IPv4 address in the form of IPv6."),
    ("https://[64:ff9b::7f00:1]", "The host is a NAT64 address."),
    ("https://[5f00::1]", "The host is an address outside the public internet."),
    ("https://[::]", "The host is an address of this network."),
    ("https://[::1]", "The host is a loopback address."),
    ("https://[::127.0.0.1]", "The host is an IPv4 address in the form of IPv6."),
    ("https://[64:ff9b:1::1]", "The host is a NAT64 address."),
    ("https://[fd00:ec2::254]", "The host is a private address."),
    ("https://[fe80::1]", "The host is a link-local address."),
    ("https://[fec0::1]", "The host is a private address."),
    ("https://[ff02::1]", "The host is a multicast address."),
    ("https://junk.hostile.example", "The host resolves to no IP address."),
    ("https://empty.hostile.example", "The host resolves to no address."),
    ("https://unknown.hostile.example", "The host could not be looked up."),
    ("http://plain.hostile.example", "Plain http is not permitted there: use https."),
    (f"http://{PUBLIC_IP}", "Plain http is not permitted there: use https."),
]


@pytest.mark.parametrize(("address", "says"), SAYS)
async def test_a_refusal_says_why(address: str, says: str) -> None:
    with pytest.raises(AddressRefused) as refused:
        await resolve(parse(address), NOTHING_ALLOWED, scripted_lookup)
    assert str(refused.value) == says


# -- accepted ---------------------------------------------------------------------------------------------------------

LABEL_63 = "a" * 63
NAME_253 = ".".join([LABEL_63] * 3 + ["a" * 61])

GOOD = [
    # text, tls, host, port
    ("https://node.example", True, "node.example", 443),
    ("http://node.example", False, "node.example", 80),
    ("https://node.example/", True, "node.example", 443),
    ("https://node.example:8443", True, "node.example", 8443),
    ("http://node.example:8000/", False, "node.example", 8000),
    ("https://node.example:1", True, "node.example", 1),
    ("https://node.example:65535", True, "node.example", 65535),
    ("http://node.example:443", False, "node.example", 443),
    ("https://Node.EXAMPLE", True, "node.example", 443),
    ("https://node.example.", True, "node.example", 443),
    ("https://node.example.:8443/", True, "node.example", 8443),
    ("https://node", True, "node", 443),
    ("https://localhost", True, "localhost", 443),
    ("https://a", True, "a", 443),
    ("https://1.a", True, "1.a", 443),
    ("https://127.0.0.1.example", True, "127.0.0.1.example", 443),
    ("https://0x7f.example", True, "0x7f.example", 443),
    ("https://3com.example", True, "3com.example", 443),
    ("https://node.0xg", True, "node.0xg", 443),
    ("https://node.1a", True, "node.1a", 443),
    ("https://a--b.example", True, "a--b.example", 443),
    ("https://xn--bcher-kva.example", True, "xn--bcher-kva.example", 443),
    ("https://node.xn--p1ai", True, "node.xn--p1ai", 443),
    (f"https://{LABEL_63}.example", True, f"{LABEL_63}.example", 443),
    (f"https://{NAME_253}.:65535/", True, NAME_253, 65535),
    ("https://8.8.8.8", True, "8.8.8.8", 443),
    ("https://8.8.8.8:8443/", True, "8.8.8.8", 8443),
    ("https://0.0.0.0", True, "0.0.0.0", 443),
    ("https://255.255.255.255", True, "255.255.255.255", 443),
    ("https://[2606:4700::1111]", True, "2606:4700::1111", 443),
    ("https://[2606:4700::1111]:8443/", True, "2606:4700::1111", 8443),
    ("https://[2606:4700:0:0:0:0:0:1111]", True, "2606:4700::1111", 443),
    ("https://[2606:4700:0000::0ABC]", True, "2606:4700::abc", 443),
    ("https://[2606:4700::1.2.3.4]", True, "2606:4700::102:304", 443),
    ("https://[::1]", True, "::1", 443),
]


def all_agree(text: str, endpoint: Endpoint) -> None:
    """Two URL libraries find the same parts, C takes no name for a number, and the parts written out come back."""
    for found in (urlsplit(text), urlsplit(str(endpoint)), URL(text), URL(str(endpoint))):
        host = found.hostname if isinstance(found, SplitResult) else found.raw_host
        assert host is not None
        if ":" in endpoint.host:
            assert str(ipaddress.IPv6Address(host)) == endpoint.host
        else:
            assert host.removesuffix(".") == endpoint.host
        assert found.scheme == ("https" if endpoint.tls else "http")
        assert (found.port or DEFAULT_PORTS[found.scheme]) == endpoint.port
        assert (found.path.strip("/"), found.fragment) == ("", "")
        assert not found.query
        assert (found.username if isinstance(found, SplitResult) else found.user) is None
    if not re.fullmatch(r"[0-9.]+|.*:.*", endpoint.host):
        with pytest.raises(OSError, match="illegal IP address"):
            socket.inet_aton(endpoint.host)
    assert parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(("text", "tls", "host", "port"), GOOD)
def test_a_good_address_is_understood(text: str, tls: bool, host: str, port: int) -> None:
    endpoint = parse(text)
    assert endpoint == Endpoint(tls=tls, host=host, port=port)
    all_agree(text, endpoint)


def test_an_endpoint_is_written_in_full() -> None:
    assert str(parse("https://Node.example.")) == "https://node.example:443"
    assert str(parse("http://[2606:4700::0:1111]/")) == "http://[2606:4700::1111]:80"


# Texts near the border, on both sides of it.
labels = st.sampled_from(
    ["node", "Example", "0x7f", "0XG", "0x", "017", "127", "0", "1a", "a-b", "-", "256", "1e3", ""]
)
hosts = st.one_of(
    st.lists(labels, min_size=1, max_size=5).map(".".join),
    st.lists(labels, max_size=4).map(lambda found: ".".join([*found, "example"])),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip.exploded.upper() if int(ip) % 2 else ip}]"),
)
ends = st.sampled_from(["", "/", ":1", ":443/", ".", ".:65535/", ":65536", ":080", "//"])
near = st.builds("{}{}{}".format, st.sampled_from(["https://", "http://"]), hosts, ends)
mutated = st.builds(
    lambda text, at, piece: text[:at] + piece + text[at:],
    near,
    st.integers(0, 40),
    st.sampled_from([*" .:/@[]-%\\#?\t\r\n\x00\xad\u3002\uff11", "::", "//", "127.1", "https://"]),
)
TEXTS = st.one_of(near, mutated, st.text())


@settings(deadline=None)
@given(TEXTS)
def test_whatever_is_accepted_means_the_same_to_everybody(text: str) -> None:
    """Any text is refused with a plain ValueError, or read the same by all."""
    try:
        endpoint = parse(text)
    except ValueError as refusal:
        assert refusal.__class__ is ValueError
    else:
        all_agree(text, endpoint)


# -- which IPs --------------------------------------------------------------------------------------------------------


def test_an_ip_that_is_not_the_public_internets_is_not_permitted() -> None:
    assert [row for row in FORBIDDEN_IPS if permits(NOTHING_ALLOWED, row[0])] == []
    assert [row for row in FORBIDDEN_IPS if NOTHING_ALLOWED.permits_plain(row[0])] == []


NEIGHBOURS = [
    # the last before a denied network and the first after it, where those are public
    "1.0.0.0",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "168.63.129.17",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "191.255.255.255",
    "192.0.1.0",
    "192.0.1.255",
    "192.0.3.0",
    "192.88.98.255",
    "192.88.100.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "198.51.99.255",
    "198.51.101.0",
    "203.0.112.255",
    "203.0.114.0",
    "223.255.255.255",
    "2000::",
    "2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2001:200::",
    "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff",
    "2001:db9::",
    "2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2003::",
    "3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "3fff:1000::",
    "3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
]


def test_a_public_ip_is_permitted_with_tls_only() -> None:
    public = [*NEIGHBOURS, PUBLIC_IP, "2606:4700::1111", "2606:4700:0::1111", "8.8.8.8"]
    assert [ip for ip in public if not permits(NOTHING_ALLOWED, ip)] == []
    assert [ip for ip in public if NOTHING_ALLOWED.permits_plain(ip)] == []


def test_both_edges_of_every_denied_network_are_in_the_tables() -> None:
    """A row that nobody tests is a row that somebody breaks. Edges between two denied networks have no neighbour."""
    tested = {ipaddress.ip_address(ip) for ip, _ in FORBIDDEN_IPS} | {ipaddress.ip_address(ip) for ip in NEIGHBOURS}
    for network, what in DENIED:
        if what == "an address outside the public internet":
            continue
        for edge in (network[0], network[-1]):
            assert edge in tested, edge
        for beside in (int(network[0]) - 1, int(network[-1]) + 1):
            if 0 <= beside < 2**network.max_prefixlen:
                neighbour = network[0].__class__(beside)
                assert neighbour in tested or not permits(NOTHING_ALLOWED, str(neighbour)), neighbour


def not_public_v4(a: int, b: int, c: int, d: int) -> bool:
    """The same table in other words."""
    return (
        a in (0, 10, 127)
        or a >= 224
        or (a == 100 and b & 0xC0 == 64)
        or (a == 172 and b & 0xF0 == 16)
        or (a == 198 and b & 0xFE == 18)
        or (a, b) in {(169, 254), (192, 168)}
        or (a, b, c) in {(192, 0, 0), (192, 0, 2), (192, 88, 99), (198, 51, 100), (203, 0, 113)}
        or (a, b, c, d) == (168, 63, 129, 16)
    )


def not_public_v6(first: int, second: int) -> bool:
    """The same table in other words: the first two sixteen bits decide."""
    return (
        not 0x2000 <= first <= 0x3FFF
        or (first == 0x2001 and (second < 0x200 or second == 0xDB8))
        or first == 0x2002
        or (first == 0x3FFF and second < 0x1000)
    )


octets = st.one_of(st.integers(0, 255), st.sampled_from([0, 2, 10, 16, 31, 63, 64, 99, 100, 113, 127, 168, 254, 255]))


@settings(deadline=None)
@given(st.one_of(st.ip_addresses(v=4).map(lambda ip: tuple(ip.packed)), st.tuples(octets, octets, octets, octets)))
def test_any_ipv4_address_is_judged_by_the_table(parts: tuple[int, int, int, int]) -> None:
    ip = ".".join(map(str, parts))
    assert permits(NOTHING_ALLOWED, ip) == (not not_public_v4(*parts))
    assert not permits(NOTHING_ALLOWED, f"::ffff:{ip}")
    assert Policy([f"{ip}/32"]).permits_plain(ip)
    assert Policy(["0.0.0.0/0"]).permits_plain(ip)


halves = st.one_of(
    st.integers(0, 0xFFFF), st.sampled_from([0, 0x1FF, 0x200, 0xDB8, 0xFFF, 0x1000, 0x2001, 0x2002, 0x3FFF])
)


@settings(deadline=None)
@given(halves, halves, st.integers(0, 2**96 - 1))
def test_any_ipv6_address_is_judged_by_the_table(first: int, second: int, rest: int) -> None:
    ip = str(ipaddress.IPv6Address(first << 112 | second << 96 | rest))
    assert permits(NOTHING_ALLOWED, ip) == (not not_public_v6(first, second))
    assert not permits(NOTHING_ALLOWED, f"{ip}%1")


JUNK_IPS = [
    "",
    "junk",
    "1.2.3",
    "1.2.3.4 ",
    "1.2.3.4\n",
    "01.2.3.4",
    "8.8.8.8/32",
    "134744072",
    "2606::1%eth0",
    "[2606::1]",
]


@pytest.mark.parametrize("ip", [*JUNK_IPS, 134744072, b"\x08\x08\x08\x08", None])
def test_what_is_no_ip_is_never_permitted(ip: str) -> None:
    for policy in (NOTHING_ALLOWED, Policy(["0.0.0.0/0", "::/0"])):
        assert not permits(policy, ip)
        assert not policy.permits_plain(ip)


# -- the operator's allow-list ----------------------------------------------------------------------------------------

ALLOWED = [
    # allow-list, IP, permitted (with TLS and without)
    (["10.0.0.0/8"], "10.255.255.255", True),
    (["10.0.0.0/8"], "11.0.0.0", None),
    (["10.0.0.0/8"], "192.168.0.1", False),
    (["10.0.0.0/8"], "::ffff:10.0.0.1", False),
    (["10.0.0.0/8"], "::10.0.0.1", False),
    (["10.0.0.0/8"], "64:ff9b::a00:1", False),
    (["10.0.0.0/8"], "2002:a00:1::", False),
    (["10.1.2.3/32"], "10.1.2.3", True),
    (["10.1.2.3/32"], "10.1.2.4", False),
    (["::ffff:10.0.0.0/104"], "::ffff:10.0.0.1", True),
    (["::ffff:10.0.0.0/104"], "::ffff:a00:1", True),
    (["::ffff:10.0.0.0/104"], "::ffff:11.0.0.1", False),
    (["::ffff:10.0.0.0/104"], "10.0.0.1", False),
    (["fd00::/8"], "fd12:3456::1", True),
    (["fd00::/8"], "fc00::1", False),
    (["fd00::/8", "127.0.0.0/8"], "127.0.0.1", True),
    (["fd00::/8", "127.0.0.0/8"], "::1", False),
    (["::/0"], "10.0.0.1", False),
    (["0.0.0.0/0"], "::1", False),
    ([f"{PUBLIC_IP}/32"], PUBLIC_IP, True),
]


@pytest.mark.parametrize(("allowed", "ip", "permitted"), ALLOWED)
def test_the_allow_list_permits_what_it_names_and_plain_http_there(
    allowed: list[str], ip: str, permitted: bool | None
) -> None:
    """None: public, so with TLS only."""
    policy = Policy(allowed)
    assert permits(policy, ip) == (permitted is not False)
    assert policy.permits_plain(ip) == (permitted is True)


JUNK_NETWORKS = [
    "",
    "10.0.0.1",  # what is meant? say /32
    "10.0.0.1/8",  # host bits
    "fd00::1/8",
    "10.0.0.0/33",
    "::/129",
    "10.0.0.0/08",
    "10.0.0.0/-1",
    "10.0.0.0/",
    "/8",
    "10/8",
    "10.0.0.0/255.0.0.0",
    "10.0.0.0/0.255.255.255",  # to the library a mask of hosts: one typing error, and all is allowed
    "010.0.0.0/8",
    "10.0.0.0/8 ",
    "10.0.0.0/8\n",
    "10.0.0.0/8,127.0.0.0/8",
    "fe80::%eth0/64",
    "[fd00::]/8",
    "localhost/8",
    "*",
    "10.0.0.0/\u0668",
]


@pytest.mark.parametrize("network", JUNK_NETWORKS)
def test_an_allow_list_with_junk_in_it_is_refused(network: str) -> None:
    with pytest.raises(ValueError, match="is not a network"):
        Policy(["127.0.0.0/8", network])


def test_a_text_is_no_allow_list() -> None:
    with pytest.raises(ValueError, match="is not a network"):
        Policy("10.0.0.0/8")


# -- resolving --------------------------------------------------------------------------------------------------------


async def test_a_name_is_looked_up_once_and_its_answer_pinned() -> None:
    """A resolver that says something public first and something private then is asked once."""
    rebinding = Scripted([PUBLIC_IP], [PRIVATE_IP])
    assert await resolve(parse("https://node.example:8443"), NOTHING_ALLOWED, rebinding) == PUBLIC_IP
    assert rebinding.asked == [("node.example", 8443)]
    with pytest.raises(AddressRefused):
        await resolve(parse("https://node.example:8443"), NOTHING_ALLOWED, rebinding)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111"])
async def test_an_ip_is_not_looked_up(host: str) -> None:
    silent = Scripted()
    assert await resolve(Endpoint(tls=True, host=host, port=443), NOTHING_ALLOWED, silent) == host
    assert silent.asked == []


RESOLVED = [
    # allow-list, address, the resolver's answer, IP to connect to
    ([], "https://node.example", [PUBLIC_IP], PUBLIC_IP),
    ([], "https://node.example", [PUBLIC_IP, "8.8.8.8"], PUBLIC_IP),
    ([], "https://node.example", ["2606:4700::1111", PUBLIC_IP], "2606:4700::1111"),
    ([], "https://node.example", ["2606:4700:0:0::1111"], "2606:4700::1111"),
    ([], "https://node.example", [PUBLIC_IP] * 1000, PUBLIC_IP),
    (
        [],
        "https://node.example",
        ["8.8.8.8"] * LOOKUP_RESULTS_MAX + [PRIVATE_IP],
        "8.8.8.8",
    ),  # not looked at
    (["10.0.0.0/8"], "https://node.example", [PRIVATE_IP], PRIVATE_IP),
    (["10.0.0.0/8"], "http://node.example", [PRIVATE_IP], PRIVATE_IP),
    (["10.0.0.0/8"], "https://node.example", [PUBLIC_IP, PRIVATE_IP], PUBLIC_IP),
    (["10.0.0.0/8"], "http://10.0.0.7:8000", [], PRIVATE_IP),
    (["::1/128"], "http://[::1]:8000", [], "::1"),
    ([], "http://node.example", [PUBLIC_IP], None),
    (["10.0.0.0/8"], "http://node.example", [PRIVATE_IP, PUBLIC_IP], None),
    (["10.0.0.0/8"], "http://node.example", [PRIVATE_IP, "192.168.0.1"], None),
    (["10.0.0.0/8"], "https://node.example", [PRIVATE_IP, "::ffff:10.0.0.7"], None),
    ([], "https://node.example", [PUBLIC_IP, PRIVATE_IP], None),
    ([], "https://node.example", [PUBLIC_IP] * (LOOKUP_RESULTS_MAX - 1) + [PRIVATE_IP], None),
    ([], "https://node.example", [PRIVATE_IP] * 1000, None),
    ([], "https://node.example", ["junk"], None),
    ([], "https://node.example", [PUBLIC_IP, "junk"], None),
    ([], "https://node.example", [134744072], None),
    ([], "https://node.example", [b"\x08\x08\x08\x08"], None),
    ([], "https://node.example", [None], None),
    ([], "https://node.example", [], None),
    ([], "https://node.example", OSError("refused"), None),
    ([], "https://node.example", TimeoutError(), None),
    ([], "https://node.example", socket.gaierror(socket.EAI_NONAME, "Name or service not known"), None),
]


@pytest.mark.parametrize(("allowed", "address", "answer", "ip"), RESOLVED)
async def test_all_that_a_name_resolves_to_must_be_permitted(
    allowed: list[str], address: str, answer: list[str] | Exception, ip: str | None
) -> None:
    if ip is None:
        with pytest.raises(AddressRefused):
            await resolve(parse(address), Policy(allowed), Scripted(answer))
    else:
        assert await resolve(parse(address), Policy(allowed), Scripted(answer)) == ip


async def test_a_bug_in_a_look_up_is_not_taken_for_a_bad_name() -> None:
    with pytest.raises(ZeroDivisionError):
        await resolve(parse("https://node.example"), NOTHING_ALLOWED, Scripted(ZeroDivisionError()))


async def test_this_machines_own_resolver_knows_localhost_and_is_not_trusted() -> None:
    found = await system_lookup("localhost", 443)
    assert {"127.0.0.1", "::1"} & set(found)
    with pytest.raises(AddressRefused, match="resolves to a loopback address"):
        await resolve(parse("https://localhost"), NOTHING_ALLOWED, system_lookup)


async def test_a_resolver_that_is_too_slow_is_not_waited_for() -> None:
    with pytest.raises(TimeoutError):
        await system_lookup("localhost", 443, within_s=0)
