"""`embedmesh serve`, `gateway` and `node`: the programs that keep running."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from embedmesh.commands import importing
from embedmesh.commands.options import config_of, fixed_values, settings_again, settings_options
from embedmesh.logs.setup import tell
from embedmesh.settings import GatewaySettings, NodeSettings

if TYPE_CHECKING:
    from embedmesh.supervisor import ReadyEndpoint

SERVE_HELP = """Run a working endpoint: a gateway and a node on this machine.

The first start makes an account with credit, an API key and an admin key, and writes them to bootstrap.json in the
data directory (readable by you only). Ctrl-C lets running requests end, then stops everything.

\b
Examples:
  embedmesh serve
  embedmesh serve --port 8099 --data-dir ./data
  EMBEDMESH_PORT=8099 embedmesh serve
  embedmesh serve --config embedmesh.toml      # kill -HUP, or `embedmesh config reload`: what changed in it
  embedmesh serve --json > ready.json     # one line of JSON is written there once it is ready
"""


NODE_OPTIONS = [
    "threads",
    "queue_tokens_max",
    "memory_check",
    "model",
]  # the node's settings that `serve` takes; the supervisor sets the others
SUPERVISORS = [field.name for field in msgspec.structs.fields(NodeSettings) if field.name not in NODE_OPTIONS]


@click.command("serve", help=SERVE_HELP)
@settings_options(GatewaySettings, without=["nodes"])  # it has a node of its own
@settings_options(NodeSettings, without=SUPERVISORS)
@click.option("--json", "as_json", is_flag=True, help="Print what happens as JSON lines on standard output.")
def serve(as_json: bool, **settings: Any) -> None:
    with importing():
        from embedmesh import supervisor

    ctx = click.get_current_context()
    of_node = {name: settings.pop(name) for name in NODE_OPTIONS}
    gateway = GatewaySettings(**settings)
    of_node |= {"log_format": gateway.log_format, "log_level": gateway.log_level}
    node = NodeSettings(data_dir=gateway.data_dir, **of_node)
    output = _ServeOutput(gateway.data_dir, as_json, gateway.log_format == "json")
    origin = supervisor.Origin(frozenset(fixed_values(ctx)), config_of(ctx).path, settings_again(ctx, "gateway"))
    sys.exit(supervisor.main(gateway, node, say=output.say, on_ready=output.ready, origin=origin))


@click.command("gateway")
@settings_options(GatewaySettings, without=["workers"])
def gateway(**settings: Any) -> None:
    """Run a gateway alone, in front of nodes that run already.

    \b
    Example:
      embedmesh gateway --data-dir ./data --nodes unix:/run/embedmesh/node.sock
    """
    from embedmesh.gateway import main as program

    again = settings_again(click.get_current_context(), "gateway")
    sys.exit(program.main(again(read=False), again))


@click.command("node")
@settings_options(NodeSettings)
def node(**settings: Any) -> None:
    """Run a node: it embeds for gateways, or alone for callers.

    It loads the catalogue's models and serves them to the gateway that it joins (over its own connections, or at its
    --address), on a Unix socket for a gateway on this machine, or on a port for callers without any gateway.
    What it serves can be changed while it runs (embedmesh models load).

    \b
    Examples:
      embedmesh node --gateway https://gw.example --join emj_...
      embedmesh node --gateway http://10.0.0.5:8080 --address https://10.0.0.7:8443   # joined before
      embedmesh node --uds /run/embedmesh/node.sock --threads 4
      EMBEDMESH_API_KEY=... embedmesh node --standalone --port 8081
      embedmesh node --uds ./node.sock --model all-MiniLM-L6-v2 --model all-MiniLM-L6-v2:fast
      embedmesh node --upstream http://127.0.0.1:8000 --model my-chat=their-name --gateway https://gw.example
    """
    from embedmesh.catalogue import load_catalogue
    from embedmesh.node import main as program
    from embedmesh.provision.assets import assets_dir

    again = settings_again(click.get_current_context(), "node")
    node_settings = NodeSettings(**settings)
    catalogue = load_catalogue(node_settings.catalogue, assets=assets_dir())
    sys.exit(program.main(node_settings, catalogue, lambda: load_catalogue(again().catalogue, assets=assets_dir())))


EMBED_SAMPLE = '"input": "Hello, world"'
RERANK_SAMPLE = '"query": "Where do penguins live?", "documents": ["In the far south.", "Two cups of flour."]'


@dataclass(frozen=True)
class _ServeOutput:
    """What `serve` prints: lines for a person, JSON lines on standard output, or lines of a log in JSON."""

    data_dir: Path
    as_json: bool
    logs_json: bool

    def say(self, line: str) -> None:
        if self.logs_json:
            tell(line)
        elif not self.as_json:
            tell(f"embedmesh: {line}")

    def ready(self, ready: "ReadyEndpoint") -> None:
        credentials, model, store, authority = ready
        path = self.data_dir.absolute() / "bootstrap.json"
        if self.as_json:
            event = {"event": "ready", "base_url": credentials.base_url, "bootstrap": str(path), "store": store}
            click.echo(json.dumps(event))
        if self.logs_json:
            tell(f"ready: {credentials.base_url}")
        if self.as_json or self.logs_json:
            return
        root = credentials.base_url.removesuffix("/v1")
        key = f'$(sed -n \'s/.*"api_key": *"\\([^"]*\\)".*/\\1/p\' \'{path}\')'
        first = "Add a server that runs a model: embedmesh nodes add URL --model MODEL"
        if model is not None:
            trust = "" if authority is None else f"--cacert {shlex.quote(str(authority.absolute()))} "
            route, asked = ("rerank", RERANK_SAMPLE) if model.reranks else ("embeddings", EMBED_SAMPLE)
            first = f"""curl {trust}{credentials.base_url}/{route} \\
    -H "Authorization: Bearer {key}" \\
    -H "Content-Type: application/json" \\
    -d '{{"model": "{(*model.aliases, model.id)[0]}", {asked}}}'"""
        click.echo(f"""
  Ready: {credentials.base_url}

  {first}

  Keys: {path} (readable by you only)
  Store: {store}
  Docs: {root}/docs
  Stop: Ctrl-C
""")
