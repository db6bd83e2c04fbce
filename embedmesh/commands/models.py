"""`embedmesh models`: what the catalogue has, what a folder would be in it, and what a running node serves."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.progress import Progress

from embedmesh.catalogue import load_catalogue
from embedmesh.client.refusals import read_problem
from embedmesh.commands.catalogue_entry import catalogue_entry
from embedmesh.commands.http_client import HttpClient, NoReply, to_unix
from embedmesh.commands.options import catalogue_option
from embedmesh.commands.output import CommandResult, prints_result
from embedmesh.commands.progress import ProgressBar
from embedmesh.commands.quantize import quantize
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from embedmesh.rules.money import format_usd
from embedmesh.settings import default_data_dir

NODE_REPLY_S = 600.0  # a large model on a slow disk; unloading waits for its last calls
LOADING_LOOK_S = 0.2  # between two looks at how far a model is loaded
NODE_REPLY_BYTES_MAX = 64 * 1024  # one model, or an error


@click.group()
def models() -> None:
    """Show, check, fetch, quantize and load models.

    \b
    Example:
      embedmesh models list
    """


models.add_command(quantize)


@models.command("list")
@catalogue_option()
@prints_result
def list_(catalogue: Path | None) -> CommandResult:
    """List the catalogue's models and whether their files are here.

    \b
    Example:
      embedmesh models list --catalogue ./models.toml
    """
    found = load_catalogue(catalogue, assets=assets_dir()).written
    lines = []
    for model in found:
        there = "present" if _present(model) else "missing: run `embedmesh setup`, or mend the catalogue's `folder`"
        price = f"{format_usd(model.price)} a million tokens"
        if model.search_price is not None:
            price = f"{format_usd(model.search_price)} a search"
        lines += [
            f"{model.id}  ({', '.join(model.aliases) or 'no alias'})",
            f"  {'foreign: run by other servers (`embedmesh nodes add`)' if model.foreign else there}",
            f"  {_gives(model)}, at most {model.max_tokens} tokens, {price}",
            f"  token ids are read as {model.token_ids}; tier {model.tier}" if model.embeds else f"  tier {model.tier}",
        ]
        if not model.foreign:
            lines.append(f"  {model.folder}")
    return CommandResult([_as_json(model) for model in found], "\n".join(lines))


@models.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@prints_result
def inspect(folder: Path) -> CommandResult:
    """Print the entry that a model folder would have in a catalogue.

    \b
    Examples:
      embedmesh models inspect ~/models/bge-small-en >> models.toml
      embedmesh serve --catalogue models.toml
    """
    return catalogue_entry(folder.absolute(), folder.absolute().name)


@models.command()
@click.argument("name")
@click.option(
    "--models-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="EMBEDMESH_MODELS_DIR",
    help="Folder of fetched models. Default: `models` in the user data folder.",
)
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Use only what is here; open no connection.")
@prints_result
def fetch(name: str, models_dir: Path | None, offline: bool) -> CommandResult:
    """Fetch a model from a hub; print its catalogue entry.

    NAME is the organisation/model of a Hugging Face hub, with @ and a branch, tag or commit if wanted. What is here
    already is not fetched again. No other command connects to a hub. HF_ENDPOINT names another hub, HF_TOKEN is
    your token.

    \b
    Examples:
      embedmesh models fetch intfloat/multilingual-e5-small >> models.toml
      embedmesh serve --catalogue models.toml
    """
    from embedmesh.provision.hub import find_model

    folder = find_model(name, models_dir=models_dir or default_data_dir() / "models", offline=offline)
    return catalogue_entry(folder, name.partition("@")[0])


@models.command()
@catalogue_option()
@prints_result
def check(catalogue: Path | None) -> CommandResult:
    """Compare every model's files with the catalogue.

    By their digest, and by whether they rerank, and with which scores. The exit status is 1 if one differs or is
    missing.

    \b
    Example:
      embedmesh models check
    """
    from embedmesh.engine.folder import digest, read_folder
    from embedmesh.engine.reranker import check_scores

    states: dict[str, str] = {}
    for model in load_catalogue(catalogue, assets=assets_dir()).written:
        if model.foreign:
            continue
        try:
            right = digest(Path(model.folder)) == model.digest
            if right:
                check_scores(model, read_folder(Path(model.folder)).scores)
            states[model.id] = "ok" if right else "other files than the catalogue's"
        except SetupError as error:
            states[model.id] = str(error)
    value = [{"id": model_id, "state": state} for model_id, state in states.items()]
    text = "\n".join(f"{model_id}: {state}" for model_id, state in states.items())
    return CommandResult(value, text, exit_code=0 if set(states.values()) <= {"ok"} else 1)


node_option = click.option(
    "--node",
    type=click.Path(path_type=Path),
    default=lambda: default_data_dir() / "run" / "node.sock",
    help="The node's Unix socket. Default: that of `embedmesh serve` in the default data directory.",
)


@models.command()
@click.argument("name")
@node_option
@prints_result
def load(name: str, node: Path) -> CommandResult:
    """Load one more model of its catalogue into a running node.

    Gateways send it work within five seconds. The next start of the node serves what --model says again. A model that
    will not fit into memory is refused.

    \b
    Example:
      embedmesh models load all-MiniLM-L6-v2:fast
    """
    with _loading_bar(node, name):
        loaded = _ask_node(node, "POST", "/v1/models", {"model": name})
    return CommandResult(loaded, f"{loaded['id']} is served now, in the tier {loaded['tier']}.")


@models.command()
@click.argument("name")
@node_option
@prints_result
def unload(name: str, node: Path) -> CommandResult:
    """Unload a model from a running node.

    The calls that wait for it are answered first.

    \b
    Example:
      embedmesh models unload all-MiniLM-L6-v2:fast
    """
    gone = _ask_node(node, "DELETE", f"/v1/models/{quote(name, safe='')}")
    return CommandResult(gone, f"{gone['id']} is no longer served.")


def _ask_node(node: Path, method: str, path: str, body: dict[str, str] | None = None) -> Any:
    """The decoded reply. Raises ClickException (refused) and SetupError (no node)."""
    client = HttpClient(str(node), to_unix(node), reply_s=NODE_REPLY_S, reply_bytes_max=NODE_REPLY_BYTES_MAX)
    try:
        reply = client.send(method, path, body)
        if reply.status != 200:
            raise click.ClickException(read_problem(reply.status, reply.body).message)
        return reply.json()
    except (NoReply, ValueError) as error:
        raise SetupError(
            f"No node answers on {node} ({error}). Is `embedmesh serve` running? Or name its socket: --node PATH."
        ) from None


@contextmanager
def _loading_bar(node: Path, name: str) -> Iterator[None]:
    """Shows how far the node is with a model that another request has it load."""
    over = threading.Event()
    with ProgressBar(*Progress.get_default_columns(), transient=True) as bar:

        def look() -> None:
            while not over.wait(LOADING_LOOK_S):
                with suppress(click.ClickException, SetupError):  # the other request says what is wrong
                    loading = _ask_node(node, "GET", f"/v1/models/{quote(name, safe='')}").get("loading")
                    if loading is not None:
                        bar.show(f"the engine {loading['step']}", loading["percent"], 100)

        if bar.shown:
            threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def _gives(model: Model) -> str:
    if model.embeds:
        return f"width {model.width}"
    return f"reranks, scores {model.scores}" if model.reranks else ", ".join(model.modalities)


def _present(model: Model) -> bool:
    files = (Path(model.folder) / name for name in ("modules.json", "config.json"))
    return not model.foreign and any(file.exists() for file in files)


def _as_json(model: Model) -> dict[str, object]:
    names = ("id", "aliases", "tier", "modalities", "max_tokens", "token_ids", "digest")
    reranks = {"scores": model.scores, "search_price_nanousd": model.search_price} if model.reranks else {}
    return {
        **{name: getattr(model, name) for name in names},
        "width": model.width if model.embeds else 0,  # as `/v1/models` has it
        **reranks,
        "price_nanousd_per_million_tokens": model.price,
        "folder": model.folder or None,
        "present": _present(model),
    }
