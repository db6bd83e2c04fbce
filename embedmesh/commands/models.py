"""`embedmesh models`: what the catalogue has, and what a folder would be in it."""

import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import click

from embedmesh.catalogue import load_catalogue
from embedmesh.commands.books import json_option
from embedmesh.commands.node_socket import ask
from embedmesh.commands.quantize import quantize
from embedmesh.commands.telling import print_json
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.models import Model
from embedmesh.rules.money import format_usd
from embedmesh.settings import default_data_dir

catalogue_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--catalogue",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="EMBEDMESH_CATALOGUE",
    help="TOML file. Default: the built-in catalogue.",
)


@click.group()
def models() -> None:
    """Show, check, fetch, quantize and load models."""


@models.command("list")
@catalogue_option
@json_option
def list_(catalogue: Path | None, as_json: bool) -> None:
    """List the catalogue's models and whether their files are here.

    \b
    Example:
      embedmesh models list --catalogue ./models.toml
    """
    found = load_catalogue(catalogue, assets=assets_dir()).written
    if as_json:
        print_json([_as_json(model) for model in found])
        return
    for model in found:
        there = "present" if _present(model) else "missing: run `embedmesh setup`, or mend the catalogue's `folder`"
        if model.foreign:
            there = "foreign: run by other servers (`embedmesh nodes add`)"
        click.echo(f"{model.id}  ({', '.join(model.aliases) or 'no alias'})")
        click.echo(f"  {there}")
        click.echo(
            f"  width {model.width}, at most {model.max_tokens} tokens, {format_usd(model.price)} a million tokens"
        )
        click.echo(f"  token ids are read as {model.token_ids}; tier {model.tier}")
        if not model.foreign:
            click.echo(f"  {model.folder}")


@models.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Print the entry that a model folder would have in a catalogue.

    \b
    Examples:
      embedmesh models inspect ~/models/bge-small-en >> models.toml
      embedmesh serve --catalogue models.toml
    """
    print_entry(folder.absolute(), folder.absolute().name, as_json)


@models.command()
@click.argument("name")
@click.option(
    "--models-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="EMBEDMESH_MODELS_DIR",
    help="Where fetched models are kept. Default: `models` in the user data folder.",
)
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Take only what is here; open no connection.")
@json_option
def fetch(name: str, models_dir: Path | None, offline: bool, as_json: bool) -> None:
    """Fetch a model from a hub; print its catalogue entry.

    NAME is the organisation/model of a Hugging Face hub, with @ and a branch, tag or commit if wanted. What is here
    already is not fetched again. This is the only command that asks a hub for anything. HF_ENDPOINT and HF_TOKEN name
    another hub and who asks.

    \b
    Examples:
      embedmesh models fetch intfloat/multilingual-e5-small >> models.toml
      embedmesh serve --catalogue models.toml
    """
    from embedmesh.provision.hub import find_model

    folder = find_model(name, models_dir=models_dir or default_data_dir() / "models", offline=offline)
    print_entry(folder, name.partition("@")[0], as_json)


models.add_command(quantize)


def print_entry(folder: Path, model_id: str, as_json: bool, tier: str = "exact") -> None:
    """What a catalogue would say of a folder, as TOML or JSON."""
    from embedmesh.engine.folder import digest, read_folder

    read = read_folder(folder)
    entry: dict[str, object] = {
        "id": model_id,
        "folder": str(folder),
        "width": read.width,
        "max_tokens": read.max_tokens,
        "digest": digest(folder),
        "token_ids": "cl100k",
        "tier": tier,
    }
    prompts = {role: text for role, text in read.prompts.items() if role in ("query", "document")}
    if as_json:
        print_json({**entry, "prompts": prompts})
        return
    click.echo("[[models]]")
    for name, value in entry.items():
        click.echo(f"{name} = {_toml(value)}")
    if prompts:
        click.echo("prompts = { " + ", ".join(f"{role} = {_toml(text)}" for role, text in prompts.items()) + " }")
    click.echo("# price = 10_000_000  # nano-USD per million tokens: $0.01; else the file's [defaults]")


@models.command()
@catalogue_option
@json_option
def check(catalogue: Path | None, as_json: bool) -> None:
    """Compare every model's files with the catalogue's digests.

    The exit status is 1 if one differs or is missing.

    \b
    Example:
      embedmesh models check
    """
    from embedmesh.engine.folder import digest
    from embedmesh.rules.errors import SetupError

    results = []
    for model in load_catalogue(catalogue, assets=assets_dir()).written:
        if model.foreign:
            continue
        try:
            state = "ok" if digest(Path(model.folder)) == model.digest else "other files than the catalogue's"
        except SetupError as error:
            state = str(error)
        results.append({"id": model.id, "state": state})
    if as_json:
        print_json(results)
    else:
        for result in results:
            click.echo(f"{result['id']}: {result['state']}")
    sys.exit(0 if all(result["state"] == "ok" for result in results) else 1)


node_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--node",
    type=click.Path(path_type=Path),
    help="The node's Unix socket. Default: that of `embedmesh serve` in the default data directory.",
)


@models.command()
@click.argument("name")
@node_option
@json_option
def load(name: str, node: Path | None, as_json: bool) -> None:
    """Have a running node serve one more model of its catalogue.

    Gateways send it work within five seconds. It is not remembered: the next start serves what --model says.

    \b
    Example:
      embedmesh models load all-MiniLM-L6-v2:fast
    """
    loaded = ask(node or _default_node(), "POST", "/v1/models", {"model": name})
    if as_json:
        print_json(loaded)
    else:
        click.echo(f"{loaded['id']} is served now, in the tier {loaded['tier']}.")


@models.command()
@click.argument("name")
@node_option
@json_option
def unload(name: str, node: Path | None, as_json: bool) -> None:
    """Have a running node serve a model no more.

    It answers the calls that wait first.

    \b
    Example:
      embedmesh models unload all-MiniLM-L6-v2:fast
    """
    gone = ask(node or _default_node(), "DELETE", f"/v1/models/{quote(name, safe='')}")
    if as_json:
        print_json(gone)
    else:
        click.echo(f"{gone['id']} is no longer served.")


def _default_node() -> Path:
    return default_data_dir() / "run" / "node.sock"


def _present(model: Model) -> bool:
    return not model.foreign and (
        (Path(model.folder) / "modules.json").exists() or (Path(model.folder) / "config.json").exists()
    )


def _as_json(model: Model) -> dict[str, object]:
    return {
        "id": model.id,
        "aliases": model.aliases,
        "tier": model.tier,
        "width": model.width,
        "max_tokens": model.max_tokens,
        "price_nanousd_per_million_tokens": model.price,
        "token_ids": model.token_ids,
        "digest": model.digest,
        "folder": model.folder or None,
        "present": _present(model),
    }


def _toml(value: object) -> str:
    """A number or a string in TOML (a JSON string is a basic string)."""
    import orjson

    return orjson.dumps(value).decode()
