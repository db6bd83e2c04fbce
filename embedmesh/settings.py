"""Every setting: typed, documented, shown by --help, and listed in docs/reference/settings.md.

A setting is given on the command line (`--port 8099`) or in the environment (`EMBEDMESH_PORT=8099`); the command line
wins.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs
from msgspec import Meta

from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX

ENV_PREFIX = "EMBEDMESH_"
PRICE_MAX = 10**12  # nano-USD a million tokens, $1,000: more is a number of nano-USD, given for one of USD
IN_USD = {"given_in": "usd"}  # of a setting: nano-USD here, USD where people write it


def default_data_dir() -> Path:
    """Where accounts, keys and the ledger live unless told otherwise: the platform's user data folder."""
    return Path(os.environ.get(ENV_PREFIX + "DATA_DIR") or platformdirs.user_data_path("embedmesh"))


def store_path(data_dir: Path) -> Path:
    """The embedded store's file."""
    return data_dir / "embedmesh.db"


def store_place(settings: "GatewaySettings") -> str | Path:
    """Where the store is: what the setting says, or the file in the data directory."""
    return settings.store or store_path(settings.data_dir)


def secret_path(data_dir: Path) -> Path:
    """The secret that key hashes are keyed with; apart from the store, so that a stolen store opens nothing."""
    return data_dir / "key.secret"


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway can be told."""

    host: Annotated[str, Meta(description="Address to listen on. Behind a proxy on another machine: 0.0.0.0.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(description="Port to listen on; 0 takes any free one.", ge=0, le=65535)] = 8080
    data_dir: Annotated[Path, Meta(description="Folder for the store, keys and run files; made with mode 0700.")]
    store: Annotated[
        str,
        Meta(
            description="Store of accounts, keys and the ledger: postgresql://USER@HOST/DATABASE for many gateways, or "
            "a file's path. Default: embedmesh.db in the data directory."
        ),
    ] = ""
    keep_usage_days: Annotated[
        int | None,
        Meta(description="Days that a request's usage record is kept; sums and money stay. Default: for ever.", ge=1),
    ] = None
    key_defaults: Annotated[
        str,
        Meta(
            description="Limits of new keys where none are given, any of "
            "requests-a-minute=60,tokens-a-minute=1000000,concurrency=8. Wise where strangers get keys."
        ),
    ] = ""
    catalogue: Annotated[
        Path | None, Meta(description="Models to serve, as TOML (see `embedmesh models`). Default: the built-in one.")
    ] = None
    nodes: Annotated[
        tuple[str, ...], Meta(description="Addresses of nodes of our own, as unix:/path/to/socket. May be repeated.")
    ] = ()
    node_networks: Annotated[
        tuple[str, ...],
        Meta(
            description="Private network where nodes may be, such as 10.0.0.0/8; http is taken there. May be repeated."
        ),
    ] = ()
    upstream_probe_s: Annotated[
        int,
        Meta(
            description="Seconds between two probes of an idle server of another make; each may cost money there.",
            ge=5,
            le=86_400,
        ),
    ] = 60
    policy: Annotated[
        Literal["fastest", "cheapest", "weighted"], Meta(description="Which of the nodes that could do it is asked.")
    ] = "fastest"
    ask_max: Annotated[
        int | None,
        Meta(
            description="The most that a node is paid for a million tokens, in USD. Default: what it asks.",
            ge=0,
            le=PRICE_MAX,
            extra=IN_USD,
        ),
    ] = None
    hedge: Annotated[
        bool, Meta(description="Ask an idle second node where a short request takes far longer than it should.")
    ] = False
    trusted_proxies: Annotated[
        tuple[str, ...],
        Meta(
            description="Network of reverse proxies, such as 10.0.0.0/8: who is behind them they say in "
            "X-Forwarded-For, and their connections are not bounded by address. May be repeated."
        ),
    ] = ()
    in_flight_max: Annotated[
        int,
        Meta(
            description="Requests handled at one time, by one account four fifths of them; more get a 503 at once.",
            ge=1,
            le=65_536,
        ),
    ] = 1_024
    body_bytes_total_max: Annotated[
        int,
        Meta(
            description="Bytes of request bodies held in memory at one time, by one account four fifths of them; more "
            "get a 503.",
            ge=REQUEST_BODY_BYTES_MAX * 5 // 4,  # or one account's share would be less than one body
        ),
    ] = 512 * 1024 * 1024
    reply_bytes_total_max: Annotated[
        int,
        Meta(
            description="Bytes of replies under way at one time, by one account four fifths of them; more get a 503.",
            ge=16 * 1024 * 1024,
        ),
    ] = 512 * 1024 * 1024
    cache_bytes_max: Annotated[
        int,
        Meta(
            description="Bytes of vectors that a gateway process remembers for accounts whose `cache` is on.",
            ge=0,
            le=2**40,
        ),
    ] = 64 * 1024 * 1024
    unknown_members: Annotated[
        Literal["refuse", "ignore"],
        Meta(
            description="Unknown members of a request: refused, or, where they cannot change vectors, ignored and "
            "named in a header."
        ),
    ] = "refuse"
    cors_origin: Annotated[
        tuple[str, ...],
        Meta(
            description="Origin whose pages may call the API from a browser, such as https://app.example.com, or *. "
            "May be repeated."
        ),
    ] = ()
    workers: Annotated[
        int,
        Meta(
            description="Gateway processes that share the port and the store; more than one on several cores.",
            ge=1,
            le=64,
        ),
    ] = 1
    listen_fd: int | None = None  # from our supervisor: a listening socket that outlives this process
    lifeline_fd: int | None = None  # from our supervisor: a pipe that closes when it dies
    metrics_file: Path | None = None  # from our supervisor: where this worker keeps its numbers for the others


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a node can be told."""

    gateway: Annotated[str, Meta(description="Gateway to join and embed for, as http://HOST:PORT or https://HOST.")] = (
        ""
    )
    join: Annotated[
        str,
        Meta(description="Join token that `embedmesh nodes invite` printed at the gateway. Needed once."),
    ] = ""
    gateway_key: Annotated[
        str,
        Meta(
            description="In place of a token: the fingerprint that `embedmesh nodes key` prints; then wait for approval"
        ),
    ] = ""
    address: Annotated[
        str,
        Meta(description="Where that gateway can reach this node: https://HOST:PORT. Without it the node dials out."),
    ] = ""
    listen: Annotated[
        str, Meta(description="With --address: HOST:PORT to listen on. Default: every address, and the address's port.")
    ] = ""
    country: Annotated[str, Meta(description="With --gateway: where this node is, in two letters.")] = ""
    price: Annotated[
        int,
        Meta(
            description="With --gateway: what this node asks for a million tokens, in USD.",
            ge=0,
            le=PRICE_MAX,
            extra=IN_USD,
        ),
    ] = 0
    data_dir: Annotated[Path, Meta(description="Folder for the node's identity; made with mode 0700.")]
    uds: Annotated[Path | None, Meta(description="Unix socket to serve gateways on; made with mode 0600.")] = None
    catalogue: Annotated[
        Path | None, Meta(description="Models to serve, as TOML (see `embedmesh models`). Default: the built-in one.")
    ] = None
    model: Annotated[
        tuple[str, ...],
        Meta(
            description="Model to serve, with a tier suffix such as `:fast` if wanted. May be repeated. Default: all."
        ),
    ] = ()
    threads: Annotated[int, Meta(description="Threads of the engine; 0 takes all cores.", ge=0, le=1024)] = 0
    queue_tokens_max: Annotated[
        int, Meta(description="Tokens that may wait in the node; more are refused at once with 429.", ge=1024)
    ] = 600_000
    standalone: Annotated[bool, Meta(description="Serve callers directly, without a gateway, on a port.")] = False
    host: Annotated[str, Meta(description="With --standalone: address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(description="With --standalone: port to listen on.", ge=0, le=65535)] = 8081
    api_key: Annotated[
        str, Meta(description="With --standalone: the bearer key that callers need. Better given in the environment.")
    ] = ""
    lifeline_fd: int | None = None  # from our supervisor: a pipe that closes when it dies


def meta_of(hint: Any) -> Meta | None:
    """What a setting's type says of it beside its kind."""
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Meta)), None)


BOOTSTRAP = "bootstrap.json"


class Credentials(msgspec.Struct, frozen=True):
    """`bootstrap.json`: what the first start made, for the person at this machine (mode 0600)."""

    base_url: str
    api_key: str
    admin_key: str
    account: str


def read_bootstrap(data_dir: Path) -> Credentials | None:
    """What the first start wrote in `data_dir`; None where there was none. Raises SetupError, in one line."""
    file = data_dir / BOOTSTRAP
    try:
        return msgspec.json.decode(file.read_bytes(), type=Credentials)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SetupError(f"{file} cannot be read ({error.strerror}). Run as the user who started the server.") from None
    except msgspec.DecodeError:
        raise SetupError(f"{file} is damaged. Restore it, or move it away: the next start makes new keys.") from None
