"""Whether all that is pinned has a wheel for each platform that README names: `python -m bench.platforms [--json]`.

pip is asked, by its own configuration and in dry runs, for the wheels of another platform and Python; nothing is
installed. Which pins a platform needs is decided by their markers, which pip would evaluate for the machine it runs on.
A wheel that is found must be among the lock's hashes, or it could not be installed from there.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename

from bench.rig.command import CannotRun, bench, check_names, track
from tests.data import CHECKOUT

INSTALL_LOCK = CHECKOUT / "requirements" / "install.lock"
PYTHONS = ("3.11", "3.12", "3.13")
GLIBC = 36  # 2.36 is Debian 12's, which we run on; a wheel that asks for a newer one is none
MACOS = 14
ASK_S = 600.0  # of one dry run: where an index has no metadata apart, pip downloads the wheels to read it
WORDS_MAX = 200  # of pip's last line

DRY_RUN = (
    *("--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--implementation", "cp"),
    *("--quiet", "--disable-pip-version-check", "--no-input", "--no-color"),
    "--ignore-requires-python",  # pip compares it with the Python that pip itself runs on; we do with the one asked for
)
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)\s*(?:;\s*(?P<marker>[^\\]+?))?\s*\\?$", re.M)
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
MISSING = re.compile(r"^ERROR: No matching distribution found for ([A-Za-z0-9._-]+)==", re.M)


class Pin(NamedTuple):
    """One line of a lock."""

    name: str
    version: str
    marker: str  # "" where every platform needs it
    hashes: frozenset[str]


class Platform(NamedTuple):
    """A system and a machine, as markers name them, and the tags of wheels that fit, which pip tries in this order."""

    name: str
    markers: dict[str, str]
    tags: tuple[str, ...]


def platforms(glibc: int = GLIBC, macos: int = MACOS) -> tuple[Platform, ...]:
    """Those that README names; with glibc 2.`glibc`, and with that version of macOS."""
    return (
        _linux("x86_64", "Linux x86-64", glibc, ("manylinux2014", "manylinux2010", "manylinux1")),
        _linux("aarch64", "Linux aarch64", glibc, ("manylinux2014",)),
        Platform("macOS arm64", _markers("darwin", "Darwin", "arm64"), (f"macosx_{macos}_0_arm64",)),
    )


def _linux(machine: str, name: str, glibc: int, legacy: Sequence[str]) -> Platform:
    tags = *(f"manylinux_2_{minor}" for minor in range(glibc, 4, -1)), *legacy
    return Platform(name, _markers("linux", "Linux", machine), tuple(f"{tag}_{machine}" for tag in tags))


def _markers(platform: str, system: str, machine: str) -> dict[str, str]:
    return {"sys_platform": platform, "platform_system": system, "os_name": "posix", "platform_machine": machine}


def read_lock(text: str) -> list[Pin]:
    """The pins of a lock with hashes."""
    found = list(PIN.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    return [
        Pin(
            canonicalize_name(match["name"]),
            match["version"],
            (match["marker"] or "").strip(),
            frozenset(HASH.findall(text[match.start() : end])),
        )
        for match, end in zip(found, ends, strict=True)
    ]


def needed(pins: Iterable[Pin], platform: Platform, python: str) -> list[Pin]:
    """The pins that an install needs there, by CPython."""
    environment = {
        **platform.markers,
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_version": "",
        "extra": "",
    }
    return [pin for pin in pins if not pin.marker or Marker(pin.marker).evaluate(environment)]


class _Archive(msgspec.Struct):
    hash: str = ""  # "sha256=…"


class _Download(msgspec.Struct):
    url: str
    archive_info: _Archive


class _Metadata(msgspec.Struct):
    name: str
    requires_python: str = ""


class _Item(msgspec.Struct):
    metadata: _Metadata
    download_info: _Download


class _Report(msgspec.Struct):
    """What `pip install --report` writes, as far as it matters here."""

    install: list[_Item]


class FoundWheel(NamedTuple):
    """A wheel that the index has: its file's name and SHA-256."""

    file: str
    sha256: str


def find_wheels(pins: Sequence[Pin], platform: Platform, python: str) -> dict[str, FoundWheel]:
    """The wheels by project; those that the index lacks are left out. Raises CannotRun where pip does not answer."""
    wanted = {pin.name: f"{pin.name}=={pin.version}" for pin in pins}
    while wanted:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "pins.txt").write_text("\n".join(wanted.values()))
            command = [sys.executable, "-m", "pip", "install", *DRY_RUN, "--target", str(folder / "none")]
            command += ["--python-version", python, *(word for tag in platform.tags for word in ("--platform", tag))]
            command += ["--report", str(folder / "report.json"), "-r", str(folder / "pins.txt")]
            try:
                pip = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=ASK_S)
            except subprocess.TimeoutExpired:
                raise CannotRun(f"pip did not answer within {ASK_S:.0f} s; try again") from None
            if pip.returncode == 0:
                items = msgspec.json.decode((folder / "report.json").read_bytes(), type=_Report).install
                fit = (item for item in items if SpecifierSet(item.metadata.requires_python).contains(f"{python}.0"))
                return {canonicalize_name(item.metadata.name): _wheel(item.download_info) for item in fit}
        gone = {canonicalize_name(each) for each in MISSING.findall(pip.stderr)} & wanted.keys()
        if not gone:
            raise CannotRun(f"pip failed: {_last_words(pip.stderr)}")
        for each in gone:
            del wanted[each]
    return {}


def _wheel(download: _Download) -> FoundWheel:
    return FoundWheel(download.url.rpartition("/")[2].partition("#")[0], download.archive_info.hash.rpartition("=")[2])


def _last_words(output: str) -> str:
    """pip's last line. Addresses are left out: that of an index may hold a password."""
    lines = output.strip().splitlines() or ["it did not say why"]
    return re.sub(r"\S+://\S+", "(address)", lines[-1])[:WORDS_MAX]


def built_for(file: str) -> tuple[str, int, int] | None:
    """The oldest system that a wheel runs on: ("glibc" or "macOS", major, minor); None where any will do."""
    floors = [floor for tag in parse_wheel_filename(file)[3] if (floor := _floor(tag))]
    return min(floors) if floors else None


def _floor(tag: Tag) -> tuple[str, int, int] | None:
    if found := re.match(r"(manylinux|macosx)_(\d+)_(\d+)_", tag.platform):
        return ("macOS" if found[1] == "macosx" else "glibc"), int(found[2]), int(found[3])
    old = {"manylinux1": 5, "manylinux2010": 12, "manylinux2014": 17}.get(tag.platform.partition("_")[0])
    return ("glibc", 2, old) if old else None


class PlatformRow(msgspec.Struct, frozen=True):
    """One platform and Python: how many pins it needs, how many have a wheel, the newest system that one of these is
    built for (where there are several, pip takes the newest), what has none, and what has one that the lock lacks."""

    pins: int
    wheels: int
    built_for: str
    without: list[str]
    not_in_lock: list[str]


class PlatformFigures(msgspec.Struct, frozen=True):
    """What the index had."""

    rows: dict[str, PlatformRow]

    @property
    def broken(self) -> list[str]:
        """What cannot be installed."""
        return [
            f"{name}: {words} {', '.join(projects)}"
            for name, row in self.rows.items()
            for words, projects in (("no wheel of", row.without), ("not in the lock:", row.not_in_lock))
            if projects
        ]


def check(pins: Sequence[Pin], platform: Platform, python: str) -> PlatformRow:
    """Ask for one platform and Python."""
    mine = needed(pins, platform, python)
    wheels = find_wheels(mine, platform, python)
    floor = max(filter(None, (built_for(wheel.file) for wheel in wheels.values())), default=None)
    return PlatformRow(
        pins=len(mine),
        wheels=len(wheels),
        built_for="{} {}.{}".format(*floor) if floor else "",
        without=[f"{pin.name} {pin.version}" for pin in mine if pin.name not in wheels],
        not_in_lock=[pin.name for pin in mine if pin.name in wheels and wheels[pin.name].sha256 not in pin.hashes],
    )


def measure(
    platform: tuple[str, ...] = (),
    python: tuple[str, ...] = PYTHONS,
    glibc: int = GLIBC,
    macos: int = MACOS,
    lock: Path = INSTALL_LOCK,
) -> PlatformFigures:
    """Ask for each platform with each Python."""
    all_ = platforms(glibc, macos)
    check_names(platform, [each.name for each in all_])
    try:
        pins = read_lock(lock.read_text())
    except OSError as error:
        raise CannotRun(f"cannot read {lock}: {error.strerror}") from None
    asked = [(each, version) for each in all_ for version in python if not platform or each.name in platform]
    rows = {f"{each.name}, Python {v}": check(pins, each, v) for each, v in track(asked, "asking for wheels")}
    return PlatformFigures(rows)


if __name__ == "__main__":
    bench(
        measure,
        platform="names of platforms; all where it is left out",
        python="versions of Python",
        glibc="the system's glibc is 2.GLIBC",
        macos="the version of macOS",
        lock="the lock whose pins are asked for",
    )
