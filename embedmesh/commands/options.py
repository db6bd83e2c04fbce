"""Command-line options made from the settings, options that several commands have, and the kinds of their values."""

import types
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
import msgspec

from embedmesh.rules.money import format_usd, parse_usd
from embedmesh.settings import ENV_PREFIX, IN_USD, default_data_dir, meta_of

Command = TypeVar("Command", bound=Callable[..., Any])
HIDDEN = {"listen_fd", "lifeline_fd", "metrics_file"}  # handed on by our own supervisor


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

data_dir_option: Option[Any] = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_data_dir,
    envvar=ENV_PREFIX + "DATA_DIR",
    show_default="the user data folder",
    help="Folder of the store and of bootstrap.json.",
)
reference_option: Option[Any] = click.option(
    "--reference", required=True, help="Your own id of this payment: the same reference is applied once."
)


def catalogue_option(help_: str = "TOML file. Default: the built-in catalogue.") -> Option[Any]:
    """Which catalogue is meant."""
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option("--catalogue", type=kind, envvar=ENV_PREFIX + "CATALOGUE", help=help_)


def settings_options(settings: type[msgspec.Struct], *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """A decorator that adds an option for each setting of a struct that has a description, but for those `without`."""

    def add(command: Command) -> Command:
        for option in reversed(_options(settings, without)):
            command = option(command)
        return command

    return add


def _options(settings: type[msgspec.Struct], without: Collection[str]) -> list[Callable[[Command], Command]]:
    hints = get_type_hints(settings, include_extras=True)
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
