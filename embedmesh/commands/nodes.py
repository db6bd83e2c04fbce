"""`embedmesh nodes`: which nodes a gateway has, how they are, and what its operator says of them."""

import textwrap
from pathlib import Path
from typing import Any

import click

from embedmesh.commands.admin import Admin, find_admin, gateway_options
from embedmesh.commands.books import when
from embedmesh.commands.joining import add, invite, invites, key
from embedmesh.commands.payables import pay, payables
from embedmesh.commands.telling import print_json, print_table

COLUMNS = 80  # of a terminal
HEAD: tuple[str, ...] = ("no", "node", "state", "tokens/s", "answers", "failed", "last right")
ID_CHARS = 12  # of a node's id in the list; `nodes show` and --json have all of it
MODELS_MIN = 8


@click.group()
def nodes() -> None:
    """Invite nodes, look after them, and pay them."""


for command in (add, invite, invites, key, pay, payables):
    nodes.add_command(command)


@nodes.command("list")
@gateway_options
def list_(url: str | None, admin_key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """List all nodes: how they are, and what they failed last.

    \b
    Examples:
      embedmesh nodes list
      embedmesh nodes list --url https://gw.example/v1 --admin-key-file admin.key --json
    """
    found = find_admin(url, admin_key_file, data_dir).ask("GET", "/admin/nodes")["data"]
    if as_json:
        print_json(found)
        return
    head, rows = HEAD, [_row(node) for node in found]
    left = COLUMNS - sum(max(map(len, column)) + 2 for column in zip(head, *rows, strict=True))
    if left >= MODELS_MIN:
        head = (*head, "models")
        rows = [(*row, _short(_models(node), left)) for row, node in zip(rows, found, strict=True)]
    print_table(head, rows, right=("no", "tokens/s", "answers", "failed"))
    for node in found:
        if node.get("last_failure") and node["state"] not in ("ready", "draining"):
            words = f"{node['node_id']} failed {last_failure(node)}"
            click.echo("\n" + textwrap.fill(words, COLUMNS, subsequent_indent="  ", break_long_words=False))


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


def last_failure(node: dict[str, Any]) -> str:
    """What a node failed last: the check, in words, and when."""
    check, ago_s = node["last_check"] or "a check", node["last_failed_s_ago"]
    return f"{check}: {node['last_failure']}" + (f" ({ago_s:.0f} s ago)" if ago_s is not None else "")


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    seen = node.get("last_answer_s_ago")
    speed = node.get("tokens_per_s")
    return (
        str(node.get("small_id") or "-"),
        _short(node["node_id"], ID_CHARS),
        _state(node),
        str(speed) if speed is not None else "-",
        str(node.get("answers", "-")),
        str(sum(node["failures"].values()) if "failures" in node else "-"),
        f"{seen:.0f} s ago" if seen is not None else "-",
    )


def _models(node: dict[str, Any]) -> str:
    """Their names without whose they are."""
    ids = node.get("models") or [offer["id"] for offer in node.get("offers") or []]
    return ", ".join(model.rpartition("/")[2] for model in ids) or "-"


def _short(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "\u2026"


def _state(node: dict[str, Any]) -> str:
    if node["standing"] != "admitted":
        return str(node["standing"])
    state = str(node["state"] or "not seen yet")
    return f"{state}, draining" if node.get("draining") and state != "draining" else state


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
