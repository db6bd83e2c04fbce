"""Every setting: typed, documented, shown by --help, and listed in docs/reference/settings.md.

A setting is given on the command line (`--port 8099`), in the environment (`EMBEDMESH_PORT=8099`) or in a file
(`port = 8099`, see `embedmesh.settings_file`); the first of these wins.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs
from msgspec import Meta

from embedmesh.rules.limits import (
    BATCH_INPUTS_MAX,
    BATCH_LINES_LIMIT,
    BATCH_LINES_MAX,
    NODE_PRICE_MAX,
    REQUEST_BODY_BYTES_MAX,
)

ENV_PREFIX = "EMBEDMESH_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"  # names the file of settings
IN_USD = {"given_in": "usd"}  # marks a setting that is nano-USD here and USD where people write it
SECRET = {"secret": "all"}  # marks a setting that is never shown
SECRET_DSN = {"secret": "password"}  # marks a database whose password is never shown
MIB = 1024 * 1024

CataloguePath = Annotated[
    Path | None, Meta(description="Models to serve, as TOML (see `embedmesh models`). Default: the built-in one.")
]
LogForm = Annotated[
    Literal["text", "json"], Meta(description="Form of the log on standard error: lines of text, or JSON objects.")
]
LogFrom = Annotated[
    Literal["debug", "info", "warning", "error"], Meta(description="Log lines of this level, and of those above it.")
]
LogAccess = Annotated[
    Literal["off", "on", "addresses"],
    Meta(description="Log each request that has ended; `addresses`: with the client's address."),
]


TracesUrl = Annotated[
    str,
    Meta(
        description="Collector that traces are sent to, as http://HOST:4318 (OTLP over HTTP), or env: where "
        "OpenTelemetry's own variables say. Default: nothing is traced."
    ),
]
TracesASecond = Annotated[
    int, Meta(description="Requests that a process traces in a second; four fifths for one account.", ge=1, le=10_000)
]


def default_data_dir() -> Path:
    """The folder of accounts, keys and the ledger by default: the platform's user data folder."""
    return Path(os.environ.get(ENV_PREFIX + "DATA_DIR") or platformdirs.user_data_path("embedmesh"))


def store_path(data_dir: Path) -> Path:
    """The embedded store's file."""
    return data_dir / "embedmesh.db"


def files_place(settings: "GatewaySettings") -> Path | str:
    """Where files and results of batches are kept: a folder, or the address of object storage."""
    if "://" in settings.files_dir:
        return settings.files_dir
    return Path(settings.files_dir) if settings.files_dir else settings.data_dir / "files"


def store_dsn(settings: "GatewaySettings") -> str | Path:
    """The store's DSN, or its file: as set, or the file in the data directory."""
    return settings.store or store_path(settings.data_dir)


def secret_path(data_dir: Path) -> Path:
    """The secret that key hashes are keyed with. It is not in the store, so that a stolen store opens nothing."""
    return data_dir / "key.secret"


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a gateway."""

    host: Annotated[str, Meta(description="Address to listen on. Use 0.0.0.0 behind a proxy on another machine.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(description="Port to listen on; 0 takes any free one.", ge=0, le=65535)] = 8080
    data_dir: Annotated[Path, Meta(description="Folder for the store, keys and run files; created with mode 0700.")]
    store: Annotated[
        str,
        Meta(
            description="Database of accounts, keys and the ledger: postgresql://USER@HOST/DATABASE for several "
            "gateways, or a file's path. Default: embedmesh.db in the data directory.",
            extra=SECRET_DSN,
        ),
    ] = ""
    keep_usage_days: Annotated[
        int | None, Meta(description="Days to keep usage records; totals and money stay. Default: for ever.", ge=1)
    ] = None
    key_defaults: Annotated[
        str,
        Meta(
            description="Limits of new keys that are created without limits, any of "
            "requests-a-minute=60,tokens-a-minute=1000000,concurrency=8. Recommended where strangers get keys."
        ),
    ] = ""
    catalogue: CataloguePath = None
    nodes: Annotated[
        tuple[str, ...], Meta(description="Address of a node of our own, as unix:/path/to/socket. May be repeated.")
    ] = ()
    node_networks: Annotated[
        tuple[str, ...],
        Meta(description="Private network that nodes may be in, such as 10.0.0.0/8, also by http. May be repeated."),
    ] = ()
    upstream_probe_s: Annotated[
        int, Meta(description="Seconds between probes of an idle upstream; it may charge for each.", ge=5, le=86_400)
    ] = 60
    policy: Annotated[
        Literal["fastest", "cheapest", "weighted"], Meta(description="How a node is chosen among those with room.")
    ] = "fastest"
    ask_max: Annotated[
        int | None,
        Meta(
            description="The most that a node is paid for a million tokens, in USD. Default: the price it asks.",
            ge=0,
            le=NODE_PRICE_MAX,
            extra=IN_USD,
        ),
    ] = None
    hedge: Annotated[bool, Meta(description="Ask an idle second node when the first is late with a short request.")] = (
        False
    )
    tls_cert: Annotated[
        Path | None,
        Meta(
            description="File with the port's certificate and those of its authorities (PEM): https, and nothing else. "
            "Read again within seconds when it changes."
        ),
    ] = None
    tls_key: Annotated[Path | None, Meta(description="With --tls-cert: file with its key (PEM), no passphrase.")] = None
    tls_client_ca: Annotated[
        Path | None,
        Meta(
            description="With --tls-cert: file with authorities (PEM). The admin API then wants a certificate of "
            "theirs from callers, besides the key."
        ),
    ] = None
    oidc_issuer: Annotated[
        str,
        Meta(
            description="OpenID Connect issuer, such as https://login.example.com: its tokens are good on the admin "
            "API, within their roles. Needs embedmesh[oidc]."
        ),
    ] = ""
    oidc_audience: Annotated[
        str, Meta(description="With --oidc-issuer: the audience (claim `aud`) that a token must be for.")
    ] = ""
    oidc_role_claim: Annotated[
        str,
        Meta(description="With --oidc-issuer: the claim that holds roles or groups; `realm_access.roles` is a path."),
    ] = "roles"
    oidc_role: Annotated[
        tuple[str, ...],
        Meta(
            description="With --oidc-issuer: what a value of that claim may do, as VALUE=admin, VALUE=read or "
            "VALUE=audit. May be repeated."
        ),
    ] = ()
    trusted_proxies: Annotated[
        tuple[str, ...],
        Meta(
            description="Network of reverse proxies, such as 10.0.0.0/8. Their X-Forwarded-For names the client, and "
            "their connections are not limited by address. May be repeated."
        ),
    ] = ()
    in_flight_max: Annotated[
        int,
        Meta(
            description="Requests handled at one time, four fifths of them for one account; more get a 503 at once.",
            ge=1,
            le=65_536,
        ),
    ] = 1_024
    body_bytes_total_max: Annotated[
        int,
        Meta(
            description="Bytes of request bodies in memory, four fifths of them for one account; more get a 503.",
            ge=REQUEST_BODY_BYTES_MAX * 5 // 4,  # or one account's share would be less than one body
        ),
    ] = 512 * MIB
    reply_bytes_total_max: Annotated[
        int,
        Meta(
            description="Bytes of replies in memory, four fifths of them for one account; more get a 503.", ge=16 * MIB
        ),
    ] = 512 * MIB
    cache_bytes_max: Annotated[
        int,
        Meta(description="Bytes of cached vectors in a process, for accounts with `cache` on.", ge=0, le=2**40),
    ] = 64 * MIB
    files_dir: Annotated[
        str,
        Meta(
            description="Folder for files and results of batches, encrypted, or object storage, as s3://BUCKET/PREFIX; "
            "one for all gateways of a store. Default: files in the data directory."
        ),
    ] = ""
    files_bytes_max: Annotated[
        int, Meta(description="Bytes of files that one account may keep, results of batches included.", ge=MIB)
    ] = 20 * 1024 * MIB
    batch_lines_max: Annotated[int, Meta(description="Lines of one batch.", ge=1, le=BATCH_LINES_LIMIT)] = (
        BATCH_LINES_MAX
    )
    batch_inputs_max: Annotated[
        int, Meta(description="Inputs of all lines of one batch together.", ge=1, le=BATCH_LINES_LIMIT)
    ] = BATCH_INPUTS_MAX
    batch_price_percent: Annotated[
        int, Meta(description="What a line of a batch costs, in percent of the ordinary price.", ge=0, le=100)
    ] = 50
    log_format: LogForm = "text"
    log_level: LogFrom = "info"
    access_log: LogAccess = "off"
    unknown_members: Annotated[
        Literal["refuse", "ignore"],
        Meta(
            description="Refuse unknown fields of a request, or ignore those that cannot change vectors and list them "
            "in a header."
        ),
    ] = "refuse"
    cors_origin: Annotated[
        tuple[str, ...],
        Meta(
            description="Origin whose pages may call the API from a browser, such as https://app.example.com, or *. "
            "May be repeated."
        ),
    ] = ()
    traces: TracesUrl = ""
    traces_a_second: TracesASecond = 50
    workers: Annotated[
        int, Meta(description="Gateway processes that share the port and the store, for several cores.", ge=1, le=64)
    ] = 1
    listen_fd: int | None = None  # from our supervisor: a listening socket that outlives this process
    lifeline_fd: int | None = None  # from our supervisor: a pipe that closes when it dies
    metrics_file: Path | None = None  # from our supervisor: where this worker keeps its numbers for the others


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a node."""

    gateway: Annotated[str, Meta(description="Gateway to join, as http://HOST:PORT or https://HOST.")] = ""
    join: Annotated[
        str, Meta(description="Join token from `embedmesh nodes invite` at the gateway. Needed once.", extra=SECRET)
    ] = ""
    gateway_key: Annotated[
        str, Meta(description="Instead of a token: the fingerprint from `embedmesh nodes key`; then wait for approval.")
    ] = ""
    address: Annotated[
        str, Meta(description="https://HOST:PORT where that gateway can reach this node. Default: the node dials out.")
    ] = ""
    listen: Annotated[
        str, Meta(description="With --address: HOST:PORT to listen on. Default: all addresses, and the address's port.")
    ] = ""
    country: Annotated[str, Meta(description="With --gateway: the node's country, in two letters.")] = ""
    price: Annotated[
        int,
        Meta(
            description="With --gateway: the price that this node asks for a million tokens, in USD.",
            ge=0,
            le=NODE_PRICE_MAX,
            extra=IN_USD,
        ),
    ] = 0
    data_dir: Annotated[Path, Meta(description="Folder for the node's identity; created with mode 0700.")]
    attestation_key: Annotated[
        Path | None,
        Meta(description="The operator's key (32 bytes, mode 0600) that vouches for the node's confidential keys."),
    ] = None
    uds: Annotated[Path | None, Meta(description="Unix socket to serve gateways on; created with mode 0600.")] = None
    catalogue: CataloguePath = None
    model: Annotated[
        tuple[str, ...],
        Meta(description="Model to serve, if wanted with a tier (`:fast`). May be repeated. Default: all."),
    ] = ()
    upstream: Annotated[
        str,
        Meta(
            description="Server of another make beside this node, as http://127.0.0.1:8000: it takes sealed chat, "
            "completions and images for it, and embeds nothing itself. Then --model is MODEL or MODEL=WHAT-IT-CALLS-IT."
        ),
    ] = ""
    token_file: Annotated[
        Path | None, Meta(description="With --upstream: file with the bearer token that it wants.")
    ] = None
    threads: Annotated[
        int,
        Meta(
            description="Threads of an engine; 0: one for each core that it may use, within its CPU quota.",
            ge=0,
            le=1024,
        ),
    ] = 0
    queue_tokens_max: Annotated[
        int, Meta(description="Tokens that may wait in the node; more are refused at once with 429.", ge=1024)
    ] = 600_000
    memory_check: Annotated[
        Literal["refuse", "ignore"],
        Meta(description="A model that will not fit into memory, by an estimate, is refused; or loaded all the same."),
    ] = "refuse"
    standalone: Annotated[bool, Meta(description="Serve callers directly, without a gateway, on a port.")] = False
    host: Annotated[str, Meta(description="With --standalone: address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(description="With --standalone: port to listen on.", ge=0, le=65535)] = 8081
    api_key: Annotated[
        str,
        Meta(
            description="With --standalone: the bearer key of callers. Better given in the environment.", extra=SECRET
        ),
    ] = ""
    monitor: Annotated[
        str,
        Meta(
            description="HOST:PORT to serve /health, /readyz and /metrics on, without a key: for probes, Prometheus. "
            "Default: not served."
        ),
    ] = ""
    traces: TracesUrl = ""
    traces_a_second: TracesASecond = 50
    log_format: LogForm = "text"
    log_level: LogFrom = "info"
    access_log: LogAccess = "off"
    lifeline_fd: int | None = None  # from our supervisor: a pipe that closes when it dies


def meta_of(hint: Any) -> Meta | None:
    """The description and bounds in a setting's type."""
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Meta)), None)
