"""Snippets of docs/how-to/clients.md, each with the real package: `python -m bench.site.snippets`.

Each asks a real gateway. The packages are not among those that the tests install: requirements/bench/snippets has them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from bench.rig import install
from bench.rig.install import HOME, LOCKS, NotInstalled, run_step, system_program
from bench.site.build import ROOT
from tests.examples import ExampleBlock, parts_of
from tests.story.endpoint import Endpoint

PAGE = ROOT / "docs" / "how-to" / "clients.md"
RUN_S = 120.0  # of one snippet; some import a hundred modules


def node_modules() -> Path:
    """The packages for Node, installed once by their lock. Raises NotInstalled."""
    system_program("npm")
    lock, home = LOCKS / "snippets-node" / "package-lock.json", HOME / "snippets-node"
    if not (home / "package-lock.json").exists() or (home / "package-lock.json").read_bytes() != lock.read_bytes():
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(lock.with_name("package.json"), home)
        shutil.copy(lock, home)
        run_step(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(home)])
    return home / "node_modules"


def snippets() -> list[ExampleBlock]:
    """The blocks that the tests leave to us."""
    return [part for part in parts_of(PAGE) if isinstance(part, ExampleBlock) and part.notes.get("not run") == "bench"]


def run(block: ExampleBlock, python: Path, modules: Path, variables: dict[str, str]) -> str | None:
    """What went wrong; None if it ended well and printed a width."""
    with tempfile.TemporaryDirectory() as folder:
        if block.language == "js":
            (Path(folder) / "node_modules").symlink_to(modules)
            (Path(folder) / "snippet.mjs").write_text(block.text)
            command = ["node", "snippet.mjs"]
        else:
            command = [str(python), "-c", block.text]
        given = {"cwd": folder, "env": os.environ | variables, "capture_output": True, "timeout": RUN_S}
        done = subprocess.run(command, text=True, check=False, **given)  # type: ignore[call-overload]
    if done.returncode:
        return str(done.stderr).strip().rpartition("\n")[2]
    return None if "384" in done.stdout else f"it printed {done.stdout!r}"


@click.command()
@click.option("--python", type=click.Path(path_type=Path), help="Python with the packages. Default: .bench/snippets.")
@click.option("--modules", type=click.Path(path_type=Path), help="Folder node_modules. Default: .bench/snippets-node.")
def main(python: Path | None, modules: Path | None) -> None:
    """Run each snippet; the last line is the verdict."""
    try:
        python = python or install.install("snippets")
        modules = modules or node_modules()
    except NotInstalled as why:
        raise click.ClickException(str(why)) from None
    with tempfile.TemporaryDirectory() as folder:
        endpoint = Endpoint(Path(folder) / "data").wait_ready()
        try:
            variables = {"EMBEDMESH_BASE_URL": endpoint.base_url, "EMBEDMESH_API_KEY": endpoint.api_key}
            found = {str(block): run(block, python, modules, variables) for block in snippets()}
        finally:
            endpoint.kill_all()
    for block, problem in found.items():
        click.echo(f"{block}: {problem or 'right'}")
    wrong = sum(problem is not None for problem in found.values())
    click.echo(f"{len(found) - wrong} of {len(found)} snippets run")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
