"""`embedmesh nodes`: which nodes a gateway has, how they are, and what its operator says of them."""

import textwrap
from typing import Any

import click

from embedmesh.commands.joining import add, invite, invites, key
from embedmesh.commands.operator import Operator, gateway_command
from embedmesh.commands.output import TERMINAL_COLUMNS, CommandResult, table, utc
from embedmesh.commands.payables import pay, payables

NODES_HEAD: tuple[str, ...] = ("no", "node", "state", "tokens/s", "answers", "failed", "last right")
NODE_ID_SHOWN_CHARS = 12  # in the list; `nodes show` and --json have the whole id
MODELS_CHARS_MIN = 8

Row = dict[str, Any]


@click.group()
def nodes() -> None:
    """Invite nodes, look after them, and pay them.

    \b
    Example:
      embedmesh nodes invite --note "office workstation"
    """


for command in (add, invite, invites, key, pay, payables):
    nodes.add_command(command)


@nodes.command("list")
@gateway_command
def list_(operator: Operator) -> CommandResult:
    """List all nodes: how they are, and what they failed last.

    \b
    Examples:
      embedmesh nodes list
      embedmesh nodes list --gateway https://gw.example/v1 --admin-key-file admin.key --json
    """
    found = operator.get("nodes")["data"]
    head, rows = NODES_HEAD, [_row(node) for node in found]
    left = TERMINAL_COLUMNS - sum(max(map(len, column)) + 2 for column in zip(head, *rows, strict=True))
    if left >= MODELS_CHARS_MIN:
        head = (*head, "models")
        rows = [(*row, _short(_models(node), left)) for row, node in zip(rows, found, strict=True)]
    lines = [table(head, rows, right=("no", "tokens/s", "answers", "failed"))]
    for node in found:
        if node.get("last_failure") and node["state"] not in ("ready", "draining"):
            words = f"{node['node_id']} failed {last_failure(node)}"
            lines += ["", textwrap.fill(words, TERMINAL_COLUMNS, subsequent_indent="  ", break_long_words=False)]
    return CommandResult(found, "\n".join(lines))


@nodes.command()
@click.argument("node")
@gateway_command
def show(operator: Operator, node: str) -> CommandResult:
    """Show all that the gateway knows of one node. NODE is its id, or its number in the list.

    \b
    Example:
      embedmesh nodes show 3
    """
    found = operator.get("nodes", node)
    lines = [f"{name:22}{_in_words(name, value)}".rstrip() for name, value in found.items()]
    return CommandResult(found, "\n".join(lines))


@nodes.command()
@click.argument("node")
@click.option("--no", "not_any_more", is_flag=True, help="Trust it no longer.")
@gateway_command
def trust(operator: Operator, node: str, not_any_more: bool) -> CommandResult:
    """Trust a node: its vectors decide when two others disagree.

    \b
    Examples:
      embedmesh nodes trust 3
      embedmesh nodes trust 3 --no
    """
    action, words = ("distrust", "is not trusted any more") if not_any_more else ("trust", "is trusted")
    return _act(operator, node, action, words)


@nodes.command()
@click.argument("node")
@click.argument("share", type=float)
@gateway_command
def weight(operator: Operator, node: str, share: float) -> CommandResult:
    """Set a node's weight: its share under --policy weighted.

    \b
    Example:
      embedmesh nodes weight 3 2.5
    """
    return _act(operator, node, "weight", f"has the weight {share:g}", {"weight": share})


def _add_action(name: str, done: str, summary: str, more: str = "", example: str = "3") -> None:
    """`embedmesh nodes NAME NODE`, which has no other options."""

    @gateway_command
    def run(operator: Operator, node: str) -> CommandResult:
        return _act(operator, node, name, done)

    help_ = f"{summary}\n\n{more}\n\n\b\nExample:\n  embedmesh nodes {name} {example}"
    nodes.command(name, help=help_)(click.argument("node")(run))


_add_action(
    "approve",
    "is admitted; it joins within seconds",
    "Admit a node that asked to join without a token.",
    example="node_5d41402abc4b2a76b9719d911017c592",
)
_add_action(
    "drain", "gets no more work", "Give a node no more work, so that it can be stopped.", "`resume` takes it back."
)
_add_action("resume", "gets work again", "Give a drained node work again.")
_add_action("readmit", "is readmitted", "End a node's quarantine.", "It gets work once it answers a probe correctly.")
_add_action("remove", "is removed", "Remove a node for good: its identity cannot join again.")


def _act(operator: Operator, node: str, action: str, words: str, body: Row | None = None) -> CommandResult:
    found = operator.post("nodes", node, action, body=body)
    return CommandResult(found, f"Node {found['node_id']} {words}.")


def last_failure(node: dict[str, Any]) -> str:
    """What a node failed last: the check, in words, and when."""
    check, ago_s = node["last_check"] or "a check", node["last_failed_s_ago"]
    return f"{check}: {node['last_failure']}" + (f" ({ago_s:.0f} s ago)" if ago_s is not None else "")


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    seen = node.get("last_answer_s_ago")
    speed = node.get("tokens_per_s")
    return (
        str(node.get("small_id") or "-"),
        _short(node["node_id"], NODE_ID_SHOWN_CHARS),
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


def _in_words(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_ms") and isinstance(value, int):
        return utc(value) + " UTC"
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(item["id"] if isinstance(item, dict) else str(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
