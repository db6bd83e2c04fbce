"""`embedmesh nodes invite`, `invites`, `key` and `add`: how nodes come to a gateway."""

import base64
import sys
from pathlib import Path
from urllib.parse import urlsplit

import click

from embedmesh.commands.admin import find_admin, gateway_options
from embedmesh.commands.books import when
from embedmesh.commands.endpoint import read_key
from embedmesh.commands.options import WholeNumber
from embedmesh.commands.telling import print_json, print_table

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command()
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


@click.command()
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


@click.command()
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
        failed = f"{found['last_check']}: {found['last_failure']}" if found["last_failure"] else "no answer yet"
        click.echo(f"Node {found['node_id']} is {found['state']}: it gets no work until it embeds rightly.", err=True)
        click.echo(f"What it failed: {failed}", err=True)
        sys.exit(1)


def _upstream_model(text: str, prefix: str) -> dict[str, str]:
    model, _, theirs = text.partition("=")
    return {"id": model, "name": theirs, "prefix": prefix}
