"""`embedmesh nodes invite`, `invites`, `key` and `add`: how nodes come to a gateway."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from embedmesh.commands.endpoint import read_key
from embedmesh.commands.operator import Operator, gateway_command
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.output import CommandResult, table, utc
from embedmesh.rules.limits import UPSTREAM_GENERATING, UPSTREAM_IN_FLIGHT, UPSTREAM_IN_FLIGHT_MAX

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    hint = f"""
On the machine that is to be a node (embedmesh is installed and set up there: docs/how-to/nodes.md):

  embedmesh node --gateway {operator.root} --join {made["token"]}

The token is valid for one node, until {utc(made["expires_ms"])} UTC; later starts need no token."""
    if urlsplit(operator.root).hostname in LOOPBACK:
        hint += "\nAnother machine cannot reach this address: name the gateway's own, and serve with --host."
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
    hint = f"At the node: embedmesh node --gateway {operator.root} --gateway-key {found}"
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
    f"Default: {UPSTREAM_GENERATING} if it generates, {UPSTREAM_IN_FLIGHT} if it only embeds.",
)
@click.option("--prefix", default="", help="Words that it wants before every text.")
@click.option("--trusted", is_flag=True, help="Its vectors decide when two others disagree.")
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

    TEI, vLLM, SGLang, Infinity, Ollama, llama.cpp, or any OpenAI-compatible URL. What a model does (embeddings, chat,
    completions, images) is in the catalogue. Requests go over plain HTTP or HTTPS, without signatures. The same
    command with other options changes them.

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
