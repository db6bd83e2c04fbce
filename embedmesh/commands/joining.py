"""`embedmesh nodes invite`, `invites`, `key` and `add`: how nodes come to a gateway."""

import base64
import os
import shlex
import socket
import ssl
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click

from embedmesh.commands.endpoint import read_key
from embedmesh.commands.operator import Operator, gateway_command
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.output import CommandResult, table, utc
from embedmesh.rules.limits import UPSTREAM_GENERATING, UPSTREAM_IN_FLIGHT, UPSTREAM_IN_FLIGHT_MAX
from embedmesh.rules.tls_failures import TRUST_VARIABLE, system_context

OWN_PORT_S = 2.0  # at our own port: microseconds
ELSEWHERE = "192.0.2.1"  # no host has it (RFC 5737): the system says from which address it would send there


class FromElsewhere(NamedTuple):
    """How another machine reaches a gateway: its address, what a node's command begins with, and what to know."""

    root: str
    trust: str
    remark: str


@click.command()
@click.option("--note", default="", help="What the invite is for.")
@click.option("--minutes", type=WholeNumber(1, 43_200), default=60, show_default=True, help="How long it is valid.")
@gateway_command
def invite(operator: Operator, note: str, minutes: int) -> CommandResult:
    """Make a join token for one node. It is shown once, and valid once.

    \b
    Examples:
      embedmesh nodes invite
      embedmesh nodes invite --note "office workstation" --minutes 10
    """
    made = operator.post("invites", body={"expires_in_s": minutes * 60, "note": note})
    there = from_elsewhere(operator.root)
    hint = f"""
On the machine that is to be a node (embedmesh is installed and set up there: docs/how-to/nodes.md):

  {there.trust}embedmesh node --gateway {there.root} --join {made["token"]}

The token is valid for one node, until {utc(made["expires_ms"])} UTC; later starts need no token.{there.remark}"""
    return CommandResult(made, made["token"], hint)


@click.command()
@gateway_command
def key(operator: Operator) -> CommandResult:
    """Print the fingerprint of the gateway's key.

    For nodes that join without a token and are approved: it tells them that they talk to this gateway.

    \b
    Example:
      embedmesh nodes key
    """
    from embedmesh.signing.identity import fingerprint

    found = fingerprint(base64.b64decode(operator.greeting()["gateway_key"]))
    there = from_elsewhere(operator.root)
    hint = f"At the node: {there.trust}embedmesh node --gateway {there.root} --gateway-key {found}{there.remark}"
    return CommandResult({"fingerprint": found}, found, hint)


@click.command()
@gateway_command
def invites(operator: Operator) -> CommandResult:
    """List the invites, without their tokens.

    \b
    Example:
      embedmesh nodes invites
    """
    found = operator.get("invites")["data"]
    rows = [
        (
            one["invite_id"],
            one["state"],
            utc(one["created_ms"]),
            utc(one["expires_ms"]),
            one["node_id"] or "-",
            one["note"],
        )
        for one in found
    ]
    return CommandResult(found, table(("invite", "state", "created", "expires", "used by", "note"), rows))


@click.command()
@click.argument("address")
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    help="Model of the catalogue that it runs, as MODEL or MODEL=WHAT-IT-CALLS-IT. Repeatable.",
)
@click.option("--name", default="", help="What to call it. Default: its host and port.")
@click.option("--token-file", type=click.Path(path_type=Path), help="File with the bearer token that it wants.")
@click.option("--batch", type=WholeNumber(1, 2048), default=32, show_default=True, help="Inputs that it takes at once.")
@click.option(
    "--parallel",
    type=WholeNumber(1, UPSTREAM_IN_FLIGHT_MAX),
    help="Requests that it works on at one time. "
    f"Default: {UPSTREAM_GENERATING} if it generates, {UPSTREAM_IN_FLIGHT} if it only embeds or reranks.",
)
@click.option("--prefix", default="", help="Words that it wants before every text.")
@click.option("--trusted", is_flag=True, help="Its vectors or scores decide when two others disagree.")
@gateway_command
def add(
    operator: Operator,
    address: str,
    models: tuple[str, ...],
    name: str,
    token_file: Path | None,
    batch: int,
    parallel: int | None,
    prefix: str,
    trusted: bool,
) -> CommandResult:
    """Use a server of another make as a node.

    TEI, vLLM, SGLang, Infinity, Ollama, llama.cpp, or any OpenAI-compatible URL. What a model does (embeddings,
    rerank, chat, completions, images) is in the catalogue. Requests go over plain HTTP or HTTPS, without signatures.
    The same command with other options changes them.

    \b
    Examples:
      embedmesh nodes add http://10.0.0.7:8080 --model all-MiniLM-L6-v2=sentence-transformers/all-MiniLM-L6-v2
      embedmesh nodes add https://api.openai.com --model text-embedding-3-small --token-file openai.key --batch 2048
      embedmesh nodes add http://10.0.0.8:8000 --model llama-3.1-8b=meta-llama/Llama-3.1-8B-Instruct --parallel 128
    """
    body: dict[str, Any] = {
        "address": address,
        "models": [_upstream_model(model, prefix) for model in models],
        "name": name,
        "token": read_key(token_file) if token_file else "",
        "inputs_max": batch,
        "in_flight_max": parallel,
        "trusted": trusted,
    }
    found = operator.post("nodes", body=body)
    if found["state"] == "ready":
        return CommandResult(found, f"Node {found['node_id']} is ready.")
    failed = f"{found['last_check']}: {found['last_failure']}" if found["last_failure"] else "no answer yet"
    note = f"Node {found['node_id']} is {found['state']}: it gets no work until it answers correctly.\n"
    return CommandResult(found, "", f"{note}What it failed: {failed}", exit_code=1)


def _upstream_model(text: str, prefix: str) -> dict[str, str]:
    model, _, theirs = text.partition("=")
    return {"id": model, "name": theirs, "prefix": prefix}


def from_elsewhere(root: str) -> FromElsewhere:
    """The same gateway for another machine. `root` is its address here, without `/v1`; it has just answered."""
    parts = urlsplit(root)
    remarks, trust = [], ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    file = os.environ.get(TRUST_VARIABLE) if parts.scheme == "https" else None
    if file and _names(parts.hostname or "", port, system_context()) is None:
        name = Path(file).name
        trust = f"{TRUST_VARIABLE}={shlex.quote(name)} "
        remarks.append(f"Copy {file} there first: it says that the gateway's certificate is to be trusted.")
    if _is_of_this_machine(parts.hostname or ""):
        own = _own_address()
        if not own or not _listens(own, port):
            remarks.append("Another machine cannot reach this address: name the gateway's own, and serve with --host.")
        elif parts.scheme == "http":
            root = f"http://{_in_url(own)}:{port}"
        elif names := _usable(_names(parts.hostname or "", port, ssl.create_default_context()) or []):
            root = f"https://{_in_url(own if own in names else names[0])}:{port}"
        else:
            remarks.append(
                "The gateway's certificate names no address that another machine can use: have one that does."
            )
    return FromElsewhere(root, trust, "".join(f"\n{each}" for each in remarks))


def _is_of_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _own_address() -> str:
    """This machine's address by which it would reach others, or nothing. No packet is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((ELSEWHERE, 9))
        own = str(sock.getsockname()[0])
        return "" if _is_of_this_machine(own) else own
    return ""


def _listens(host: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((host, port), OWN_PORT_S).close()
        return True
    return False


def _names(host: str, port: int, context: ssl.SSLContext) -> list[str] | None:
    """What the certificate of a port names; None where the context does not trust it, or nobody answers."""
    with (
        suppress(OSError),
        socket.create_connection((host, port), OWN_PORT_S) as sock,
        context.wrap_socket(sock, server_hostname=host) as tls,
    ):
        found = (tls.getpeercert() or {}).get("subjectAltName", ())
        return [str(each[1]) for each in found if each[0] in ("DNS", "IP Address")]
    return None


def _usable(names: list[str]) -> list[str]:
    """Those of them that another machine can use."""
    return [name for name in names if not _is_of_this_machine(name) and "*" not in name]


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
