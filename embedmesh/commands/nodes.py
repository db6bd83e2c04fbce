"""`embedmesh nodes`: which nodes a gateway has, how they are, and what its operator says of them."""

import base64
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from embedmesh.commands.admin import Admin, find_admin
from embedmesh.commands.books import data_dir_option, json_option, when
from embedmesh.commands.endpoint import read_key
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.telling import print_json, print_table

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def gateway_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which gateway is asked, and with which key."""
    for option in (
        json_option,
        data_dir_option,
        click.option(
            "--admin-key-file",
            type=click.Path(path_type=Path),
            help="File with a key that has the scope `admin`. Default: EMBEDMESH_ADMIN_KEY, else bootstrap.json's.",
        ),
        click.option("--url", help="The gateway, as http://HOST:PORT/v1. Default: bootstrap.json's."),
    ):
        command = option(command)
    return command


@click.group()
def nodes() -> None:
    """Invite nodes, look after them, and see how they are."""


@nodes.command("list")
@gateway_options
def list_(url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """List all nodes with their live state.

    \b
    Examples:
      embedmesh nodes list
      embedmesh nodes list --url https://gw.example/v1 --admin-key-file admin.key --json
    """
    found = find_admin(url, admin_key_file, data_dir).ask("GET", "/admin/nodes")["data"]
    if as_json:
        print_json(found)
        return
    head = ("node", "no", "kind", "state", "models", "outstanding", "tokens/s", "answers", "failed", "canaries", "seen")
    print_table(head, [_row(node) for node in found], right=("no", "outstanding", "tokens/s", "answers", "failed"))


@nodes.command()
@click.argument("node")
@gateway_options
def show(node: str, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Show all that the gateway knows of one node. NODE is its id, or its number in the list.

    \b
    Example:
      embedmesh nodes show 3
    """
    found = find_admin(url, admin_key_file, data_dir).ask("GET", f"/admin/nodes/{node}")
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        click.echo(f"{name:22}{_shown(name, value)}".rstrip())


@nodes.command()
@click.option("--note", default="", help="What the invite is for.")
@click.option("--minutes", type=WholeNumber(1, 43_200), default=60, show_default=True, help="How long it is good for.")
@gateway_options
def invite(
    note: str, minutes: int, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool
) -> None:
    """Make a join token for one node. It is shown once, and good once.

    \b
    Examples:
      embedmesh nodes invite
      embedmesh nodes invite --note "office workstation" --minutes 10
    """
    admin = find_admin(url, admin_key_file, data_dir)
    made = admin.ask("POST", "/admin/invites", {"expires_in_s": minutes * 60, "note": note})
    if as_json:
        print_json(made)
        return
    click.echo(made["token"])
    root = admin.base_url.removesuffix("/v1")
    click.echo(
        f"""
On the machine that is to be a node (embedmesh is installed and set up there: docs/how-to/nodes.md):

  embedmesh node --gateway {root} --join {made["token"]}

The token is good for one node, until {when(made["expires_ms"])} UTC; later starts need no token.""",
        err=True,
    )
    if urlsplit(root).hostname in LOOPBACK:
        click.echo(
            "Another machine cannot reach this address: name the gateway's own, and serve with --host.", err=True
        )


@nodes.command()
@gateway_options
def key(url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Print the fingerprint of the gateway's key.

    For nodes that join without a token and are approved: they know by it that they talk to this gateway.

    \b
    Example:
      embedmesh nodes key
    """
    from embedmesh.signing.identity import fingerprint

    admin = find_admin(url, admin_key_file, data_dir)
    found = fingerprint(base64.b64decode(admin.ask("GET", "/nodes")["gateway_key"]))
    if as_json:
        print_json({"fingerprint": found})
        return
    click.echo(found)
    root = admin.base_url.removesuffix("/v1")
    click.echo(f"At the node: embedmesh node --gateway {root} --gateway-key {found}", err=True)


@nodes.command()
@gateway_options
def invites(url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """List the invites, without their tokens.

    \b
    Example:
      embedmesh nodes invites
    """
    found = find_admin(url, admin_key_file, data_dir).ask("GET", "/admin/invites")["data"]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["invite_id"],
            one["state"],
            when(one["created_ms"]),
            when(one["expires_ms"]),
            one["node_id"] or "-",
            one["note"],
        )
        for one in found
    ]
    print_table(("invite", "state", "created", "expires", "used by", "note"), rows)


@nodes.command()
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
@click.option("--parallel", type=WholeNumber(1, 64), default=16, show_default=True, help="Calls at one time.")
@click.option("--prefix", default="", help="Words that it wants before every text.")
@click.option("--trusted", is_flag=True, help="Its vectors decide when two others disagree.")
@gateway_options
def add(
    address: str,
    models: tuple[str, ...],
    name: str,
    token_file: Path | None,
    batch: int,
    parallel: int,
    prefix: str,
    trusted: bool,
    url: str | None,
    admin_key_file: Path | None,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Use a server of another make as a node.

    TEI, vLLM, Infinity, Ollama, llama.cpp, or any OpenAI-compatible URL. It is asked over plain HTTP or HTTPS, without
    signatures. Saying it again changes what was said.

    \b
    Examples:
      embedmesh nodes add http://10.0.0.7:8080 --model all-MiniLM-L6-v2=sentence-transformers/all-MiniLM-L6-v2
      embedmesh nodes add https://api.openai.com --model text-embedding-3-small --token-file openai.key --batch 2048
    """
    asked = {
        "address": address,
        "models": [_upstream_model(model, prefix) for model in models],
        "name": name,
        "token": read_key(token_file) if token_file else "",
        "inputs_max": batch,
        "in_flight_max": parallel,
        "trusted": trusted,
    }
    admin = find_admin(url, admin_key_file, data_dir)
    found = admin.ask("POST", "/admin/nodes", asked)
    if as_json:
        print_json(found)
    elif found["state"] == "ready":
        click.echo(f"Node {found['node_id']} is ready.")
    else:
        click.echo(f"Node {found['node_id']} is noted, and has not embedded yet: {found['last_failure']}.", err=True)
        sys.exit(1)


def _upstream_model(text: str, prefix: str) -> dict[str, str]:
    model, _, theirs = text.partition("=")
    return {"id": model, "name": theirs, "prefix": prefix}


@nodes.command()
@click.argument("node")
@gateway_options
def approve(node: str, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Admit a node that asked to join without a token.

    \b
    Example:
      embedmesh nodes approve node_5d41402abc4b2a76b9719d911017c592
    """
    _act(find_admin(url, admin_key_file, data_dir), node, "approve", as_json, "is admitted; it joins within seconds")


@nodes.command()
@click.argument("node")
@gateway_options
def drain(node: str, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Give a node no more work, so that it can be stopped.

    `resume` takes it back.

    \b
    Example:
      embedmesh nodes drain 3
    """
    _act(find_admin(url, admin_key_file, data_dir), node, "drain", as_json, "gets no more work")


@nodes.command()
@click.argument("node")
@gateway_options
def resume(node: str, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Give a drained node work again.

    \b
    Example:
      embedmesh nodes resume 3
    """
    _act(find_admin(url, admin_key_file, data_dir), node, "resume", as_json, "gets work again")


@nodes.command()
@click.argument("node")
@gateway_options
def readmit(node: str, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """End a node's quarantine. It has to answer a probe rightly before it gets work.

    \b
    Example:
      embedmesh nodes readmit 3
    """
    _act(find_admin(url, admin_key_file, data_dir), node, "readmit", as_json, "is readmitted")


@nodes.command()
@click.argument("node")
@gateway_options
def remove(node: str, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Remove a node for good: its identity is not taken again.

    \b
    Example:
      embedmesh nodes remove 3
    """
    _act(find_admin(url, admin_key_file, data_dir), node, "remove", as_json, "is removed")


@nodes.command()
@click.argument("node")
@click.option("--no", "not_any_more", is_flag=True, help="Trust it no longer.")
@gateway_options
def trust(
    node: str, not_any_more: bool, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool
) -> None:
    """Trust a node: its vectors decide when two others disagree.

    \b
    Examples:
      embedmesh nodes trust 3
      embedmesh nodes trust 3 --no
    """
    action, words = ("distrust", "is not trusted any more") if not_any_more else ("trust", "is trusted")
    _act(find_admin(url, admin_key_file, data_dir), node, action, as_json, words)


@nodes.command()
@click.argument("node")
@click.argument("share", type=float)
@gateway_options
def weight(
    node: str, share: float, url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool
) -> None:
    """Set a node's weight: its share under --policy weighted.

    \b
    Example:
      embedmesh nodes weight 3 2.5
    """
    admin = find_admin(url, admin_key_file, data_dir)
    _act(admin, node, "weight", as_json, f"has the weight {share:g}", {"weight": share})


def _act(admin: Admin, node: str, action: str, as_json: bool, words: str, body: dict[str, Any] | None = None) -> None:
    found = admin.ask("POST", f"/admin/nodes/{node}/{action}", body)
    if as_json:
        print_json(found)
    else:
        click.echo(f"Node {found['node_id']} {words}.")


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    canaries = node.get("canaries") or {}
    seen = node.get("last_answer_s_ago")
    return (
        node["node_id"],
        str(node.get("small_id") or "-"),
        node["kind"],
        _state(node),
        ",".join(node.get("models") or [offer["id"] for offer in node.get("offers") or []]) or "-",
        str(node.get("tokens_outstanding", "-")),
        str(node.get("tokens_per_s", "-")),
        str(node.get("answers", "-")),
        str(sum(node["failures"].values()) if "failures" in node else "-"),
        f"{canaries.get('passed', 0)}/{canaries.get('failed', 0)}" if canaries else "-",
        f"{seen:.0f} s ago" if seen is not None else "-",
    )


def _state(node: dict[str, Any]) -> str:
    if node["standing"] != "admitted":
        return str(node["standing"])
    return str(node["state"] or "not seen yet")


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_ms") and isinstance(value, int):
        return when(value) + " UTC"
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(item["id"] if isinstance(item, dict) else str(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
