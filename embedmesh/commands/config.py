"""`embedmesh config`: the settings as a program would have them, a check of their file, and reading them again."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from embedmesh.commands.operator import Operator, gateway_command
from embedmesh.commands.options import SettingOption, config_of
from embedmesh.commands.output import CommandResult, prints_result, table
from embedmesh.process import EXIT_SETUP
from embedmesh.rules.errors import SetupError
from embedmesh.settings import CONFIG_VARIABLE, GatewaySettings, default_data_dir
from embedmesh.settings_file import CONFIG_NAME, ROLES, BadSettings, find_config, read_config, shown

PROGRAMS = ("serve", "gateway", "node")
VALUE_CHARS_MAX = 30  # of a value in the table, whose lines fit 80 columns; --json has all of it


@click.group()
def config() -> None:
    """Show and check settings, and have a gateway read them again.

    A setting is given on the command line, in the environment, or in a file of settings: embedmesh.toml in the data
    directory, or the one that --config or EMBEDMESH_CONFIG names. The first of these wins. Its keys are the options'
    names: port = 8099.

    \b
    Examples:
      embedmesh config show
      embedmesh config check /etc/embedmesh/embedmesh.toml && embedmesh config reload
    """


@config.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("program", type=click.Choice(PROGRAMS), default="serve")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def show(ctx: click.Context, program: str, options: Sequence[str], as_json: bool) -> None:
    """Show each setting, and where its value comes from.

    What a program would have that is started now: PROGRAM is serve, gateway or node, with the OPTIONS that you would
    start it with. Secrets are masked. The last column says whether a change in the file applies at `embedmesh config
    reload`, or at a restart.

    \b
    Examples:
      embedmesh config show
      embedmesh config show --json gateway
      embedmesh config show serve --config ./embedmesh.toml --port 8099
    """
    from embedmesh.commands import serve
    from embedmesh.gateway.reload import RELOADED

    if "--json" in options:  # where people write it
        options, as_json = [each for each in options if each != "--json"], True
    command: click.Command = getattr(serve, program)
    made = command.make_context(f"embedmesh {program}", list(options), parent=ctx)
    file = config_of(made).path
    rows = []
    for each in command.params:
        if isinstance(each, SettingOption) and not each.hidden and each.name is not None:
            hint = _hint(each)
            value, origin = shown(made.params[each.name], hint), _origin(made, each)
            again = each.role == "gateway" and each.name in RELOADED
            rows.append({"name": each.name, "value": value, "from": origin, "reloads": again})
    lines = [
        (
            each["name"],
            _short(each["value"]),
            each["from"].partition(" (")[0],
            "reload" if each["reloads"] else "restart",
        )
        for each in rows
    ]
    text = f"File of settings: {file or f'none; {default_data_dir() / CONFIG_NAME} would be one'}\n\n"
    text += table(("SETTING", "VALUE", "FROM", "CHANGE"), lines)
    CommandResult({"program": program, "file": str(file) if file else None, "settings": rows}, text).print(as_json)


@config.command()
@click.argument("file", type=click.Path(path_type=Path), required=False, envvar=CONFIG_VARIABLE)
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Where to look for FILE by default.")
@prints_result
def check(file: Path | None, data_dir: Path | None) -> CommandResult:
    """Check a file of settings and what it names.

    The catalogue and its models, the certificate, the networks and sign-in, too: run it where the gateway runs.
    Everything that is wrong is told, each with its line. The exit status is 78 if anything is. It opens no store, and
    asks no gateway: whether a model may change while one runs, only `embedmesh config reload` can tell.

    \b
    Examples:
      embedmesh config check
      embedmesh config check /etc/embedmesh/embedmesh.toml
    """
    folder = data_dir or default_data_dir()
    path = find_config(file, folder)
    if path is None:
        raise SetupError(f"There is no {CONFIG_NAME} in {folder}. Name a file: embedmesh config check FILE.")
    problems, warning = [], ""
    try:
        read = read_config(path, data_dir=None if file else folder)
        problems, warning = _wrong(GatewaySettings(**({"data_dir": folder} | read.values["gateway"]))), read.warning
    except BadSettings as bad:
        problems = bad.problems
    value = {"file": str(path), "ok": not problems, "problems": problems, "warnings": [warning] if warning else []}
    text = "\n".join(problems) or f"{path} is right."
    return CommandResult(value, text, note=warning, exit_code=EXIT_SETUP if problems else 0)


@config.command("reload")
@gateway_command
def reload_(operator: Operator) -> CommandResult:
    """Have the gateways of a store read their settings again.

    Their file of settings, catalogue and certificate: what can change while they run is changed, or, where anything is
    wrong, nothing. `kill -HUP` does the same for one gateway; `systemctl reload embedmesh` for a service.

    \b
    Example:
      embedmesh config reload
    """
    reply = operator.post("reload")
    models = [f"{what}: {', '.join(names)}" for what, names in reply["models"].items() if names]
    text = "\n".join([f"Changed: {', '.join(reply['changed']) or 'nothing'}.", *(f"Models {line}." for line in models)])
    stays = ", ".join(reply["needs_restart"])
    return CommandResult(reply, text, note=f"These stay until a restart: {stays}." if stays else "")


def _hint(option: SettingOption) -> Any:
    from embedmesh.settings_file import fields_of

    return fields_of(ROLES[option.role])[option.name or ""]


def _origin(made: click.Context, option: SettingOption) -> str:
    source = made.get_parameter_source(option.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return f"environment ({option.envvar})"
    named = {ParameterSource.COMMANDLINE: "command line", ParameterSource.DEFAULT_MAP: "file"}
    return named.get(source, "default") if source is not None else "default"


def _short(value: Any) -> str:
    """A value for the table."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return (text if len(text) <= VALUE_CHARS_MAX else text[: VALUE_CHARS_MAX - 1] + "…") or "-"


def _wrong(settings: GatewaySettings) -> list[str]:
    """What a gateway would refuse of settings that are well-formed."""
    from embedmesh.catalogue import load_catalogue
    from embedmesh.fleet.addresses import Policy
    from embedmesh.gateway.build import cors_of
    from embedmesh.gateway.models import load_models
    from embedmesh.gateway.network import node_sockets, parsed, sign_in
    from embedmesh.http.connections import Origins
    from embedmesh.http.tls import Certificate
    from embedmesh.provision.assets import assets_dir
    from embedmesh.provision.bootstrap import key_defaults

    problems = []
    for look in (
        # Of the built-in catalogue the models may come with the first start.
        partial(load_models, settings.catalogue)
        if settings.catalogue
        else partial(load_catalogue, None, assets=assets_dir()),
        partial(Certificate.given, settings.tls_cert, settings.tls_key, settings.tls_client_ca),
        partial(key_defaults, settings),
        partial(sign_in, settings),
        partial(node_sockets, settings),
        partial(cors_of, settings),
        partial(parsed, Origins, settings.trusted_proxies, "--trusted-proxies"),
        partial(parsed, Policy, settings.node_networks, "--node-networks"),
    ):
        try:
            look()
        except SetupError as error:
            problems.append(str(error))
    return problems
