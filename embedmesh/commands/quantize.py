"""`embedmesh models quantize`: a copy of a model folder that can be served in the int8 tier, and how good it is."""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
from rich.progress import Progress

from embedmesh.catalogue import load_catalogue
from embedmesh.commands import importing
from embedmesh.commands.catalogue_entry import catalogue_entry
from embedmesh.commands.options import catalogue_option
from embedmesh.commands.output import CommandResult, prints_result
from embedmesh.commands.progress import ProgressBar
from embedmesh.engine.precision import INT8_OVERLAP_MIN, Rest
from embedmesh.provision.assets import assets_dir
from embedmesh.rules.errors import SetupError

CALIBRATION_TEXTS = 1_000
JUDGED_TEXTS = 1_000
TEXT_BYTES_MAX = 64 * 1024 * 1024  # far more than is read from it


class Int8Kind(NamedTuple):
    """What the person chose: what is not 8 bits, and how many percent of the nearest texts must be those of exact."""

    rest: Rest
    overlap_min: float


def find_folder(name: str, catalogue: Path | None) -> tuple[Path, str]:
    """The folder of a model of the catalogue and the model's id, or any folder and its name. Raises SetupError."""
    model = load_catalogue(catalogue, assets=assets_dir()).find(name)
    if model is not None and not model.foreign:
        return Path(model.folder), model.id.removesuffix(f":{model.tier}")
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        return folder, folder.name
    raise SetupError(f"{name} is neither a model of the catalogue nor a folder. `embedmesh models list` lists those.")


def quantize_folder(source: Path, target: Path, text: Path | None, kind: Int8Kind, threads: int) -> str:
    """Make `target`, whole or not at all. What it measured, in one line. Raises SetupError."""
    with importing():
        from embedmesh.engine.no_openvino import no_openvino

        try:
            from embedmesh.engine import int8
            from embedmesh.engine.quantize import quantize
        except ImportError as error:
            raise SetupError(no_openvino(error)) from None
        from embedmesh.engine.folder import read_folder
        from embedmesh.engine.sample_text import library_text, package_text, spread
        from embedmesh.engine.tokens import ModelTokenizer

    if target.exists():
        raise SetupError(f"{target} is there already. Remove it, or name another place with --output.")
    folder = read_folder(source)
    if folder.reranks:
        raise SetupError(
            f"{source.name} reranks, and int8 is made and judged for models that make vectors. Serve it in the tier"
            " 'fast' or 'exact'."
        )
    tokenizer = ModelTokenizer(source, folder.max_tokens)
    room = folder.max_tokens - tokenizer.specials

    def sequences(texts: list[str]) -> list[list[int]]:
        return [tokenizer.with_specials(ids[:room]) for ids in tokenizer.ids(texts) if ids]

    if text is None:
        calibration, judged = spread(library_text(), CALIBRATION_TEXTS), spread(package_text(), JUDGED_TEXTS)
        on = "installed packages' descriptions and licences, calibrated on the standard library's docstrings"
    else:
        lines = read_lines(text)
        half = len(lines) // 2
        calibration, judged = spread(lines[:half], CALIBRATION_TEXTS), spread(lines[half:], JUDGED_TEXTS)
        on = "the second half of the operator's text, calibrated on the first"
    with half_made(target) as staging, ProgressBar(*Progress.get_default_columns(), transient=True) as bar:
        link_files(source, staging)
        show = functools.partial(bar.show, "quantizing")
        ranges = quantize(
            folder,
            sequences(calibration),
            sequences(judged),
            on,
            threads=threads,
            rest=kind.rest,
            overlap_min=kind.overlap_min,
            on_progress=show,
        )
        int8.write(staging, ranges)
        staging.rename(target)
    found, kept = ranges.quality, sum(each is None for each in ranges.inputs)
    return (
        f"top-10 overlap {found.top10_overlap:.1f} %, cosine to exact {found.cosine_mean:.4f} in the mean and"
        f" {found.cosine_min:.4f} at worst, on {found.texts} texts ({found.on}); {len(ranges.inputs) - kept} of"
        f" {len(ranges.inputs)} inputs of layers are 8 bits, the rest is {ranges.rest}"
    )


def read_lines(text: Path) -> list[str]:
    """The texts of a file, one a line, none empty. Raises SetupError."""
    try:
        with text.open("rb") as file:
            lines = file.read(TEXT_BYTES_MAX).decode("utf-8").splitlines()
    except OSError as error:
        raise SetupError(f"{text} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise SetupError(f"{text} is not UTF-8 text: give a file with one text a line.") from None
    return [line for line in lines if line.strip()]


@contextmanager
def half_made(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what is not whole yet; gone in the end, unless it was renamed. Raises SetupError."""
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise SetupError(f"{target.parent} cannot be written ({error.strerror}). Name another --output.") from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def link_files(source: Path, target: Path) -> None:
    """The same files in another folder: as hard links, which cost no room, or as copies where that cannot be."""
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


@click.command("quantize")
@click.argument("name")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The new folder. Default: the model's, with -int8 behind."
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text like yours, one a line: half of it calibrates, half judges. Default: text that is on this machine.",
)
@click.option(
    "--rest",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="What is not 8 bits: bfloat16 is faster, float32 is served by CPUs without bfloat16, too.",
)
@click.option(
    "--overlap-min",
    type=click.FloatRange(0, 100),
    default=INT8_OVERLAP_MIN,
    show_default=True,
    help="Percent of each text's 10 nearest that must be those of exact. Below, no folder is made.",
)
@catalogue_option()
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="Threads to compute with; 0: one a core, within the quota.",
)
@prints_result
def quantize(
    name: str,
    output: Path | None,
    text: Path | None,
    rest: Rest,
    overlap_min: float,
    catalogue: Path | None,
    threads: int,
) -> CommandResult:
    """Make a folder for the int8 tier; print its catalogue entry.

    NAME is a model of the catalogue, or a folder, of any architecture that has linear layers. Most of these get 8-bit
    integers; those that move the vectors most, and all else, stay in bfloat16 or float32. How far the vectors are from
    the exact ones is measured on text that was not used for calibration, printed, and kept in the folder's int8.json.
    If they find too few of the same nearest texts, no folder is made. Needs a CPU with AVX512_VNNI or AMX. Takes a
    minute for a small model.

    \b
    Examples:
      embedmesh models quantize all-MiniLM-L6-v2 >> models.toml
      embedmesh models quantize all-MiniLM-L6-v2 --rest float32
      embedmesh models quantize ~/models/bge-small-en --text ours.txt -o ~/models/bge-small-en-int8
    """
    folder, model_id = find_folder(name, catalogue)
    target = output.expanduser().absolute() if output else folder.with_name(folder.name + "-int8")
    measured = quantize_folder(folder, target, text, Int8Kind(rest, overlap_min), threads)
    click.echo(f"embedmesh: {measured}.", err=True)
    return catalogue_entry(target, model_id, "int8")
