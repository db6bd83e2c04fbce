"""Copy what a virtual environment needs of the system that it was made on: `closure.py VENV OUT`.

Python and its library, the shared libraries that anything in VENV is linked to, a shell with a few programs,
certificates, licences, and the list of packages, which scanners read. A distribution's package manager, Perl and the
like stay behind: they were two thirds of the base, and nothing here starts them.
"""

import compileall
import py_compile
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# sh, cat and sleep are called by compose files and charts, the others by whoever looks into a container.
PROGRAMS = ("sh", "cat", "sleep", "ls", "env", "id", "date", "cp", "install", "mkdir", "rm", "df", "head", "tail")
FILES = (
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/host.conf",  # a name in /etc/hosts may have several addresses
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/localtime",
    "/etc/os-release",
    "/etc/debian_version",
    "/etc/ld.so.cache",
    "/etc/ssl",
    "/usr/lib/ssl",
    "/usr/share/ca-certificates",
    "/usr/lib/locale/C.utf8",
    "/usr/share/common-licenses",
    "/var/lib/dpkg/status",
)
LOADED_LATE = ("libgcc_s.so.1", "libnss_dns.so.2", "libnss_files.so.2")  # by the C library itself
# Of Python's own library: its tests, its editor, what makes environments, and what only its build needs.
NEEDLESS = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "pydoc_data",
    "venv",
}
NEEDLESS |= {"site-packages", "dist-packages", "__pycache__", "distutils"}
# Modules of it that only tests and an editor import, and two that bring databases and Kerberos along.
UNLINKED = ("_tkinter", "_test", "_ctypes_test", "_xx", "xx", "nis.", "_dbm.", "_gdbm.", "ossaudiodev")
MERGED = ("bin", "sbin", "lib", "lib64")  # links into /usr, where the system has them so
MOUNTED = ("dev", "proc", "run", "sys")  # by whoever runs a container
OPEN = ("data", "shared", "tmp")  # that any user may write to, where a file system is mounted there


class Closure:
    """Files of this system under `out`, with every symbolic link on the way to them."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def take(self, path: Path) -> None:
        """A file or a folder, what it links to included."""
        parent = self._parent(path)
        here = self.out / parent.relative_to("/") / path.name
        if path.is_symlink():
            if not here.is_symlink():
                here.symlink_to(path.readlink())
            target = path.parent / path.readlink()
            if target.exists():
                self.take(target)
        elif path.is_dir():
            here.mkdir(exist_ok=True)
            for each in sorted(path.iterdir()):
                self.take(each)
        elif not here.exists():
            shutil.copy2(path, here)

    def _parent(self, path: Path) -> Path:
        """The real folder of a path, made in `out`; links on the way, such as /lib, are made, too."""
        for above in reversed(path.parents):
            if above.is_symlink():
                link = self.out / above.parent.resolve().relative_to("/") / above.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(above.readlink())
        real = path.parent.resolve()
        (self.out / real.relative_to("/")).mkdir(parents=True, exist_ok=True)
        return real

    def library(self, stdlib: Path) -> None:
        """Python's own modules, compiled and by hash: a read-only image could not do it later."""
        for each in sorted(stdlib.iterdir()):
            if each.name not in NEEDLESS and not each.name.startswith("config-"):
                self.take(each)
        copied = self.out / stdlib.resolve().relative_to("/")
        for folder in [*copied.rglob("test"), *copied.rglob("tests"), *copied.rglob("__pycache__")]:
            shutil.rmtree(folder)
        for module in copied.rglob("*.so"):
            if module.name.startswith(UNLINKED):
                module.unlink()
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(
            copied, stripdir=str(self.out), prependdir="/", quiet=2, legacy=True, invalidation_mode=unchecked
        )
        for source in copied.rglob("*.py"):
            if source.with_suffix(".pyc").exists():
                source.unlink()


def libraries(venv: Path, programs: list[Path]) -> list[Path]:
    """Shared libraries outside of `venv` that programs and modules are linked to. Exits where one is missing."""
    ours = Path(sysconfig.get_path("platstdlib")).glob("lib-dynload/*.so")
    modules = [
        *venv.rglob("*.so"),
        *venv.rglob("*.so.*"),
        *(each for each in ours if not each.name.startswith(UNLINKED)),
    ]
    ldd = shutil.which("ldd") or sys.exit("closure: ldd is missing")
    inside = {path.name for path in venv.rglob("*.so*")}
    found = set()
    for file in [*programs, *modules]:
        said = subprocess.run([ldd, str(file)], capture_output=True, text=True, check=False).stdout
        for line in said.splitlines():
            name, _, rest = line.strip().partition(" => ")
            place = (rest or name).split(" (")[0]
            if place == "not found" and name not in inside:
                sys.exit(f"closure: {file} needs {name}, which is not here")
            if place.startswith("/") and not place.startswith(f"{venv}/"):
                found.add(Path(place))
    return [*sorted(found), *_beside(found)]


def _beside(found: set[Path]) -> list[Path]:
    """What the C library loads by itself."""
    folders = {path.parent for path in found if path.name.startswith("libc.so")}
    return [folder / name for folder in sorted(folders) for name in LOADED_LATE if (folder / name).exists()]


def main() -> None:
    """The command."""
    venv, out = Path(sys.argv[1]), Path(sys.argv[2])
    closure = Closure(out)
    programs = [Path(found) for name in PROGRAMS if (found := shutil.which(name))]
    python = venv / "bin" / "python3"
    for path in [*programs, Path(sys.executable), *_chain(python)]:
        closure.take(path)
    for path in libraries(venv, [*programs, python.resolve()]):
        closure.take(path)
    closure.library(Path(sysconfig.get_path("stdlib")))
    for name in FILES:
        if Path(name).exists():
            closure.take(Path(name))
    for licence in Path("/usr/share/doc").glob("*/copyright"):
        if not licence.is_symlink():
            closure.take(licence)
    for name in MERGED:
        if Path("/", name).is_symlink() and not (out / name).is_symlink():
            (out / name).symlink_to(Path("/", name).readlink())
    for name in MOUNTED:
        (out / name).mkdir(exist_ok=True)
    for name in OPEN:
        (out / name).mkdir(exist_ok=True)
        (out / name).chmod(0o1777)


def _chain(python: Path) -> list[Path]:
    """The interpreters that the environment's own is a link to."""
    found = []
    while python.is_symlink():
        python = python.parent / python.readlink()
        found.append(python)
    return found


if __name__ == "__main__":
    main()
