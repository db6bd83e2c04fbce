"""Settings in a file, `embedmesh.toml`: found, read, and checked against the same types that make the options.

A key stands for every program that has a setting of that name; one in the table `[gateway]` or `[node]` for that
program alone, and before the other. Every mistake is named with its line, what is allowed, and the nearest name.
"""

import difflib
import os
import re
import stat
import tomllib
import types
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from embedmesh.files import path_in
from embedmesh.rules.errors import SetupError
from embedmesh.rules.money import format_usd, parse_usd
from embedmesh.settings import IN_USD, SECRET, SECRET_DSN, GatewaySettings, NodeSettings, meta_of

CONFIG_NAME = "embedmesh.toml"
CONFIG_BYTES_MAX = 256 * 1024  # all settings with long lists have a tenth of that
MASK = "****"
USD_EXPONENT_MAX = 30  # of an amount as a number: 1e999999999 would be written with a gigabyte of digits
Role = Literal["gateway", "node"]
ROLES: Mapping[Role, type[msgspec.Struct]] = {"gateway": GatewaySettings, "node": NodeSettings}

KEY_LINE = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")
TABLE_LINE = re.compile(r"""\s*\[\s*["']?([A-Za-z0-9_-]+)["']?\s*\]""")
PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*(@)|(password=)[^&\s]*")


class BadSettings(SetupError):
    """The file cannot be used. `problems` are all that is wrong, a line each."""

    def __init__(self, problems: list[str]) -> None:
        more = f" ({len(problems) - 1} more: `embedmesh config check`)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = problems


class SettingsFile(msgspec.Struct, frozen=True):
    """What a file sets: by program, the names of fields and their values as the settings have them."""

    path: Path
    values: dict[Role, dict[str, Any]]
    warning: str = ""


def find_config(given: str | Path | None, data_dir: Path) -> Path | None:
    """The file that is named, or the one in the data directory; None where there is none."""
    if given:
        return Path(given)
    found = data_dir / CONFIG_NAME
    return found if os.path.exists(found) else None  # noqa: PTH110 - False in a folder that is closed to us, too


def read_config(path: Path, *, data_dir: Path | None = None) -> SettingsFile:
    """Read and check a file. `data_dir` is the folder that it was found in, where nobody named it. Raises BadSettings.

    Paths in it are relative to its own folder.
    """
    text, mode = _read(path)
    try:
        written = tomllib.loads(text, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:  # also of a number with thousands of digits
        reason = "a number is too large" if isinstance(error, ArithmeticError) else str(error)
        raise BadSettings([f"{path} is not TOML: {reason or 'it is nested too deep'}."]) from None
    reading = _Reading(path, _lines_of(text))
    shared = {key: value for key, value in written.items() if not (key in ROLES and isinstance(value, dict))}
    values: dict[Role, dict[str, Any]] = {}
    for role in ROLES:
        table = written.get(role)
        own = reading.take(table if isinstance(table, dict) else {}, role, ROLES[role])
        values[role] = reading.take(shared, "", ROLES[role]) | own
    reading.refuse_unknown(shared)
    if data_dir is not None and any("data_dir" in each for each in values.values()):
        reading.problem("", "data_dir", "`data_dir` cannot be set by the file in it. Name the file: --config FILE.")
    if mode & stat.S_IWOTH:
        reading.problems.append(f"{path}: everybody on this machine can write it: chmod o-w {path}")
    if reading.problems:
        raise BadSettings([*dict.fromkeys(reading.problems)])
    warning = next(_readable_secret(path, values), "") if mode & stat.S_IROTH else ""
    return SettingsFile(path, values, warning)


def shown(value: Any, hint: Any) -> Any:
    """A setting's value as people and logs may see it: secrets masked, amounts in USD, the rest as JSON has it."""
    meta = meta_of(hint)
    extra = meta.extra if meta is not None else None
    if extra == SECRET:
        return MASK if value else value
    if extra == SECRET_DSN:
        return PASSWORD.sub(lambda found: f"{found[1]}{MASK}@" if found[1] else f"{found[3]}{MASK}", str(value))
    if extra == IN_USD and value is not None:
        return format_usd(value)
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def is_secret(hint: Any) -> bool:
    """Whether a setting, or a part of it, is never shown."""
    meta = meta_of(hint)
    return meta is not None and meta.extra in (SECRET, SECRET_DSN)


def fields_of(settings: type[msgspec.Struct]) -> dict[str, Any]:
    """Name -> type of each setting that people can give. What our own supervisor hands on has no description."""
    hints = get_type_hints(settings, include_extras=True)
    return {name: hints[name] for name in settings.__struct_fields__ if meta_of(hints[name]) is not None}


class _Reading:
    """One reading of a file: what is wrong with it."""

    def __init__(self, path: Path, lines: Mapping[tuple[str, str], int]) -> None:
        self.problems: list[str] = []
        self._path = path
        self._lines = lines

    def problem(self, table: str, key: str, words: str) -> None:
        line = self._lines.get((table, key)) or self._lines.get(("", table))
        self.problems.append(f"{self._path}{f', line {line}' if line else ''}: {words}")

    def take(self, table: Mapping[str, Any], name: str, settings: type[msgspec.Struct]) -> dict[str, Any]:
        """The settings of a table, converted; in a program's own table each must be one of its settings."""
        known = fields_of(settings)
        found: dict[str, Any] = {}
        for key, value in table.items():
            field = key.replace("-", "_")
            if field not in known:
                if name:
                    self.problem(name, key, _unknown(key, f"[{name}]", known))
            elif field in found:
                self.problem(name, key, f"`{field}` is given twice.")
            else:
                try:
                    found[field] = converted(value, known[field], self._path.absolute().parent)
                except ValueError as error:
                    self.problem(name, key, f"`{key}` {error}")
        return found

    def refuse_unknown(self, table: Mapping[str, Any]) -> None:
        """Top-level keys that no program has."""
        known = {name for settings in ROLES.values() for name in fields_of(settings)}
        for key in table:
            if key.replace("-", "_") not in known:
                self.problem("", key, _unknown(key, "", {*known, *ROLES}))


def converted(value: Any, hint: Any, folder: Path) -> Any:
    """A value of a file as its setting has it. Raises ValueError, in words that follow the setting's name."""
    meta = meta_of(hint)
    try:
        if meta is not None and meta.extra == IN_USD:
            return _usd(value, meta)

        def path(_: type, text: Any) -> Path:
            if not isinstance(text, str) or not text:
                raise ValueError
            return path_in(folder, text)

        made = msgspec.convert(value, hint, dec_hook=path)
        if any("\0" in text for text in ([made] if isinstance(made, str) else made if isinstance(made, tuple) else [])):
            raise ValueError
        if meta is not None and meta.extra == SECRET_DSN and made and "://" not in made:
            return str(path_in(folder, made))
    except (msgspec.ValidationError, ValueError, TypeError):
        allowed = _allowed(hint, meta)
        wrong = "" if is_secret(hint) or isinstance(value, list | dict) else f", not {_written(value)}"
        options = [str(each) for each in get_args(_bare(hint))] if get_origin(_bare(hint)) is Literal else []
        near = difflib.get_close_matches(str(value), options, 1) if options else []
        meant = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(f"must be {allowed}{wrong}.{meant}") from None
    return made


def _usd(value: Any, meta: Meta) -> int:
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        raise TypeError
    if isinstance(value, Decimal) and abs(value.adjusted()) > USD_EXPONENT_MAX:
        raise ValueError
    amount = parse_usd(f"{value:f}" if isinstance(value, Decimal) else str(value))
    if amount < (meta.ge or 0) or (meta.le is not None and amount > meta.le):
        raise ValueError
    return amount


def _bare(hint: Any) -> Any:
    """The type without its description and without None."""
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(bare) in (Union, types.UnionType):
        bare = next(each for each in get_args(bare) if each is not type(None))
    return bare


def _allowed(hint: Any, meta: Meta | None) -> str:
    """What a setting may be, in words."""
    bare = _bare(hint)
    if meta is not None and meta.extra == IN_USD:
        most = f", at most {format_usd(int(meta.le))}" if meta.le is not None else ""
        return f"an amount in USD, such as 0.015{most}"
    if get_origin(bare) is Literal:
        return "one of " + ", ".join(f'"{each}"' for each in get_args(bare))
    if bare is int:
        least = meta.ge or 0 if meta is not None else 0
        if meta is None or meta.le is None:
            return f"a whole number of at least {least}"
        return f"a whole number from {least} to {meta.le}"
    if get_origin(bare) is tuple:
        return 'a list of texts, such as ["one", "two"]'
    return {bool: "true or false", Path: "a path, as text"}.get(bare, "text")


def _written(value: Any) -> str:
    """A value as it stands in the file, or nearly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 64:
        return "a larger one"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _unknown(key: str, table: str, known: Collection[str]) -> str:
    """That there is no setting of that name in a table, and which may be meant."""
    name = key.replace("-", "_")
    elsewhere = [role for role, settings in ROLES.items() if name in fields_of(settings)]
    near = difflib.get_close_matches(name, sorted(known), 1)
    hint = f"Did you mean `{near[0]}`?" if near else "`embedmesh config show` lists all."
    return f"{table or 'embedmesh'} has no setting `{key}`. {f'[{elsewhere[0]}] has it.' if elsewhere else hint}"


def _lines_of(text: str) -> dict[tuple[str, str], int]:
    """Table and key -> line. TOML's own reader does not tell; what stands in longer texts may be taken for a key."""
    found: dict[tuple[str, str], int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if named := TABLE_LINE.match(line):
            table = named[1]
            found.setdefault(("", table), number)
        elif key := KEY_LINE.match(line):
            found.setdefault((table, key[1]), number)
    return found


def _read(path: Path) -> tuple[str, int]:
    """The file's text, and its mode; 0 for what is no ordinary file, such as a pipe."""
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            raw = stream.read(CONFIG_BYTES_MAX + 1)
        if len(raw) > CONFIG_BYTES_MAX:
            raise BadSettings([f"{path} is larger than {CONFIG_BYTES_MAX:,} bytes, so it is no file of settings."])
        return raw.decode("utf-8"), mode if stat.S_ISREG(mode) else 0
    except OSError as error:
        raise BadSettings([f"The settings {path} cannot be read ({error.strerror}). Correct --config."]) from None
    except UnicodeDecodeError:
        raise BadSettings([f"{path} is not UTF-8 text. Save it as UTF-8."]) from None


def _readable_secret(path: Path, values: Mapping[Role, Mapping[str, Any]]) -> Iterator[str]:
    """A warning where a file that everybody may read has a secret. No refusal: Kubernetes mounts secrets so."""
    for role, settings in ROLES.items():
        hints = fields_of(settings)
        for name, value in values[role].items():
            if is_secret(hints[name]) and shown(value, hints[name]) != value:
                yield f"{path} holds a secret (`{name}`), and everybody on this machine can read it: chmod o-r {path}"
                return
