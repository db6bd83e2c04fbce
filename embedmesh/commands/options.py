"""Command-line options made from the settings, options that several commands have, and the kinds of their values."""

import os
import stat
import types
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
import msgspec
from click.core import ParameterSource

from embedmesh.rules.errors import SetupError
from embedmesh.rules.money import format_usd, parse_usd
from embedmesh.settings import CONFIG_VARIABLE, ENV_PREFIX, IN_USD, default_data_dir, meta_of
from embedmesh.settings_file import CONFIG_NAME, ROLES, Role, SettingsFile, find_config, read_config

Command = TypeVar("Command", bound=Callable[..., Any])
HIDDEN = {"listen_fd", "lifeline_fd", "metrics_file"}  # handed on by our own supervisor
CONFIG_META = "embedmesh.config"  # of click's context: the file that a command has read
FIXED = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)  # what a file cannot change


class WholeNumber(click.IntRange):
    """A whole number within bounds, both included. Refuses others by naming the bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(super().convert(value, param, ctx))
        except click.BadParameter:
            bounds = f"from {self.min} to {self.max}" if self.max is not None else f"of at least {self.min}"
            self.fail(f"must be a whole number {bounds}, not {value!r}.", param, ctx)


class Usd(click.ParamType[int]):
    """An amount of US dollars, as 12.50; becomes nano-USD. Below 0 only where it is `signed`; at most `most`."""

    name = "usd"

    def __init__(self, *, signed: bool = False, most: int | None = None) -> None:
        self._signed = signed
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            amount = parse_usd(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        if amount < 0 and not self._signed:
            self.fail("must not be below 0.", param, ctx)
        if self._most is not None and amount > self._most:
            self.fail(f"must be at most {format_usd(self._most)}: it is in USD.", param, ctx)
        return amount


class Moment(click.ParamType[int]):
    """A day or a time, UTC if it has no zone; becomes Unix milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
            return int(moment.timestamp() * 1000)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: write 2026-12-01 or 2026-12-01T08:00:00Z.", param, ctx)


USD = Usd()
SIGNED_USD = Usd(signed=True)
MOMENT = Moment()

Option = Callable[[Command], Command]


class ConfigOfCommand:
    """The file of settings of one command: the one that is `given`, or the one in the data directory, if any."""

    def __init__(self, given: str | None, data_dir: Path) -> None:
        self._given = given
        self._data_dir = data_dir
        self._file: SettingsFile | None = None

    @property
    def path(self) -> Path | None:
        """Where it is, or None where there is none."""
        return find_config(self._given, self._data_dir)

    def read(self) -> None:
        """Read it, or read it again. Raises SetupError; then the values stay as they were."""
        path = self.path
        if self._file is not None and not _can_be_read_again(self._file.path):  # it would reset everything
            raise SetupError(f"The settings {self._file.path} are no file any more. Put them back, or restart.")
        self._file = None if path is None else read_config(path, data_dir=None if self._given else self._data_dir)

    @property
    def warning(self) -> str:
        """What its owner should mend about the file that was read; empty where there is nothing."""
        return "" if self._file is None else self._file.warning

    def values(self, role: Role) -> Mapping[str, Any]:
        """What was read for the settings of a gateway, or of a node."""
        return {} if self._file is None else self._file.values[role]


def _can_be_read_again(path: Path) -> bool:
    """Whether it is there, and no pipe, which is read once."""
    try:
        return not stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


class SettingOption(click.Option):
    """An option that may stand in the file of settings, too. The command line and the environment come before it."""

    def __init__(self, *names: Any, role: Role = "gateway", **more: Any) -> None:
        super().__init__(*names, **more)
        self.role: Role = role

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """Raises SetupError for a file that cannot be used, also where nothing of it is needed."""
        value, source = super().consume_value(ctx, opts)
        if ctx.resilient_parsing:
            return value, source
        if CONFIG_META not in ctx.meta:
            given, data_dir = opts.get("config") or os.environ.get(CONFIG_VARIABLE), opts.get("data_dir")
            ctx.meta[CONFIG_META] = ConfigOfCommand(given, Path(data_dir) if data_dir else default_data_dir())
            config_of(ctx).read()
            if warning := config_of(ctx).warning:
                click.echo(f"embedmesh: {warning}", err=True)
        found = config_of(ctx).values(self.role)
        if source is ParameterSource.DEFAULT and self.name in found:
            return found[self.name], ParameterSource.DEFAULT_MAP
        return value, source


def config_of(ctx: click.Context) -> ConfigOfCommand:
    """The file of settings that the command has read."""
    config: ConfigOfCommand = ctx.meta[CONFIG_META]
    return config


def in_file(name: str) -> Any:
    """What the file of the command that runs now says of a setting of a gateway; None where it says nothing."""
    ctx = click.get_current_context(silent=True)
    return config_of(ctx).values("gateway").get(name) if ctx is not None and CONFIG_META in ctx.meta else None


def fixed_values(ctx: click.Context) -> dict[str, Any]:
    """What the command line and the environment say: no file changes it while the program runs."""
    return {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) in FIXED}


def settings_again(ctx: click.Context, role: Role) -> Callable[..., Any]:
    """What makes a program's settings anew, with its file as it is then; `read=False`: as it was read last.

    That raises SetupError.
    """
    kind, config = ROLES[role], config_of(ctx)
    fixed = {name: value for name, value in fixed_values(ctx).items() if name in kind.__struct_fields__}

    def settings(*, read: bool = True) -> Any:
        if read:
            config.read()
        return kind(**({"data_dir": default_data_dir()} | dict(config.values(role)) | fixed))

    return settings


config_option: Option[Any] = click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar=CONFIG_VARIABLE,
    expose_value=False,
    help=f"File of settings (TOML). Default: {CONFIG_NAME} in the data directory, where there is one.",
)


def data_dir_option(command: Any) -> Any:
    """Which data directory is meant, and which file of settings."""
    folder = click.option(
        "--data-dir",
        cls=SettingOption,
        type=click.Path(file_okay=False, path_type=Path),
        default=default_data_dir,
        envvar=ENV_PREFIX + "DATA_DIR",
        show_default="the user data folder",
        help="Folder of the store and of bootstrap.json.",
    )
    return folder(config_option(command))


reference_option: Option[Any] = click.option(
    "--reference", required=True, help="Your own id of this payment: the same reference is applied once."
)


def catalogue_option(help_: str = "TOML file. Default: the built-in catalogue.") -> Option[Any]:
    """Which catalogue is meant."""
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option("--catalogue", cls=SettingOption, type=kind, envvar=ENV_PREFIX + "CATALOGUE", help=help_)


def settings_options(settings: type[msgspec.Struct], *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """A decorator that adds `--config`, and an option for each setting with a description, but for those `without`."""

    def add(command: Command) -> Command:
        for option in reversed(_options(settings, without)):
            command = option(command)
        named = {each.name for each in getattr(command, "__click_params__", ())}
        return command if "config" in named else config_option(command)

    return add


def _options(settings: type[msgspec.Struct], without: Collection[str]) -> list[Callable[[Command], Command]]:
    hints = get_type_hints(settings, include_extras=True)
    role = next(role for role, kind in ROLES.items() if kind is settings)
    made = []
    for field in msgspec.structs.fields(settings):
        hint = hints[field.name]
        description = _description(hint)
        if field.name in without or (description is None and field.name not in HIDDEN):
            continue
        kind, several = _kind(hint)
        default: Any = None if field.default is msgspec.NODEFAULT else field.default
        if field.name == "data_dir":
            default = default_data_dir
        made.append(
            click.option(
                "--" + field.name.replace("_", "-"),
                field.name,
                cls=SettingOption,
                role=role,
                type=kind,
                is_flag=kind is click.BOOL,
                multiple=several,
                default=default,
                required=field.required and field.name != "data_dir",
                envvar=None if field.name in HIDDEN else ENV_PREFIX + field.name.upper(),
                hidden=field.name in HIDDEN,
                show_default="the user data folder" if field.name == "data_dir" else bool(default),
                help=description,
            )
        )
    return made


def _description(hint: Any) -> str | None:
    meta = meta_of(hint)
    return None if meta is None else meta.description


def _kind(hint: Any) -> tuple[click.ParamType[Any], bool]:
    """Click's type of a setting, and whether it may be given several times."""
    meta = meta_of(hint)
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    several = get_origin(bare) is tuple
    if several or get_origin(bare) in (Union, types.UnionType):
        bare = get_args(bare)[0]
    if get_origin(bare) is Literal:
        return click.Choice(get_args(bare)), several
    if meta and meta.extra == IN_USD:
        return Usd(most=_whole(meta.le)), several
    if bare is int:
        return (WholeNumber(_whole(meta.ge), _whole(meta.le)) if meta else click.INT), several
    if bare is bool:
        return click.BOOL, several
    if bare is Path:
        return click.Path(path_type=Path), several
    return click.STRING, several


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)
