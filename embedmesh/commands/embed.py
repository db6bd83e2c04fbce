"""`embedmesh embed`: a file of texts in, a file of vectors out."""

import asyncio
import hashlib
import os
import random
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from embedmesh.bulk.lines import ChunkReader, LineRecords, read_chunks
from embedmesh.bulk.sinks import job_output
from embedmesh.bulk.tables import TEXT_COLUMN, CsvRecords, ParquetReader
from embedmesh.client.access import find_access
from embedmesh.client.bulk.options import CONCURRENCY_MAX
from embedmesh.client.bulk.wire import BulkWire
from embedmesh.client.errors import WrongPins
from embedmesh.commands.bulk.checkpoint import Checkpoint, finished_before
from embedmesh.commands.bulk.client import (
    BULK_REQUEST_S,
    BulkClient,
    NothingListens,
    RequestRefused,
    Stopped,
)
from embedmesh.commands.bulk.output import FileOutput, Stdout
from embedmesh.commands.bulk.report import RunReport
from embedmesh.commands.bulk.run import run
from embedmesh.commands.bulk.table_output import OUTPUTS, open_output
from embedmesh.commands.endpoint import GatewayAccess, find_gateway
from embedmesh.commands.options import USD, WholeNumber, data_dir_option
from embedmesh.commands.output import WrongUsage
from embedmesh.rules.limits import REQUEST_INPUTS_MAX

if TYPE_CHECKING:
    from embedmesh.client.core import Trust

EMBED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # without --model
EXIT_REFUSED_LINES = 1
EXITS = {
    "finished": 0,
    "refused rows": EXIT_REFUSED_LINES,
    "refused": 2,
    "stopped": 3,
    "unreachable": 78,
    "interrupted": 130,
    "closed": 141,
}
OF_JOB = ("ids", "engine", "concurrency", "budget", "dry_run", "manifest")  # options that make it a job
FORMATS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}  # by what an input's name ends in; else lines

HELP = """Embed the texts of a file: its lines, or a column of its table.

The output has a row for every line, in order: JSON lines {"index":0,"embedding":[...]}, a float32 array (lines, width)
where the name ends in .npy, or a table in .csv, .tsv or .parquet. A line that cannot be embedded does not stop the
others: its row is {"index":6,"embedding":null,"error":{...}}, or NaN, and its number is printed.

Input in .csv, .tsv or .parquet is a table: its column "text" is embedded, or its only one, or --column. The other
columns come back in the output, but for "embedding" and "error", which are its own. Lines are then rows, without the
one of the names. Parquet needs pyarrow: pip install 'embedmesh[parquet]'.

A run that was stopped continues when the same command is run again; OUT.state beside the output records how far it
got, and that it is complete. --truncate end cuts texts that are longer than the model takes; otherwise such
lines are refused.

--confidential seals every request, so that only a node of --node-identity can read its texts, and not the gateway. That
file comes from the node's operator (node.identity.pub in its data directory), not from the gateway.

With several inputs, an output that is a folder (OUT/) or a database, or --id, --engine or --budget, it runs a job:
units of up to 2,048 texts, in any order, each with a part of its own. Stopped anywhere, the same command does the rest.
With --budget nothing is paid twice, even so. Inputs and folders may be at s3://, gs:// or hf://.

\b
Examples:
  embedmesh embed texts.txt -o vectors.jsonl
  embedmesh embed texts.txt -o vectors.npy --truncate end
  embedmesh embed articles.jsonl --field body -o articles.npy
  embedmesh embed articles.csv --column body -o vectors.parquet
  embedmesh embed rows.parquet -o rows-with-vectors.parquet
  zcat big.csv.gz | embedmesh embed - --format csv --column 2 -o v.npy
  zcat texts.gz | embedmesh embed - | head -1
  embedmesh embed q.txt -o q.jsonl --url https://host.example/v1 \\
      --api-key-file key.txt --input-type query
  embedmesh embed part-*.parquet -o vectors/ --column body --dry-run
  embedmesh embed part-*.parquet -o vectors/ --column body --budget 40
  embedmesh embed a.jsonl b.jsonl -o whole.parquet --id id
  embedmesh embed private.txt -o v.npy --confidential \\
      --node-identity node.identity.pub

\b
Exit status:
  0    every line was embedded
  1    finished; some lines were refused
  2    wrong usage: an option, the input or the output must change
  3    stopped in the middle (the line on stderr says why); run it again to continue
  78   the set-up is wrong: no endpoint, no key, nothing listens
  130  interrupted; run it again to continue
  141  the reader of standard output has gone
"""


@click.command(help=HELP)
@click.argument("inputs", metavar="[IN]...", nargs=-1, type=click.Path(allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(allow_dash=True),
    default="-",
    help="OUT.jsonl, .npy, .csv, .tsv, .parquet. Of a job: OUT/, jsonl:OUT, npy:OUT, OUT.lance, a database.",
)
@click.option("--model", default=EMBED_MODEL, show_default=True, help="Model to embed with.")
@click.option("--field", help="The lines are JSON objects; embed this field of each.")
@click.option("--column", help="Column of a table to embed, by name or by number from 0.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["lines", "jsonl", "csv", "tsv", "parquet"]),
    help="What the input is. Default: by its name.",
)
@click.option("--dimensions", type=WholeNumber(1), help="Keep only the first components, at unit length.")
@click.option("--input-type", type=click.Choice(["query", "document"]), help="Use the model's own prompt for these.")
@click.option("--truncate", type=click.Choice(["none", "end", "start"]), help="Where to cut texts that are too long.")
@click.option(
    "--batch", type=WholeNumber(1, REQUEST_INPUTS_MAX), default=128, show_default=True, help="Lines a request."
)
@click.option("--confidential", is_flag=True, help="Seal the texts for a node of --node-identity.")
@click.option(
    "--node-identity",
    "pins",
    type=click.Path(path_type=Path),
    help="File with lines of nodes that may read the texts, or of an operator who vouches for nodes.",
)
@click.option("--id", "ids", help="Job: column of the ids. Without it rows are numbered.")
@click.option("--engine", type=click.Choice(["local", "daft", "ray"]), help="Job: who works. Default: this process.")
@click.option("--concurrency", type=WholeNumber(1, CONCURRENCY_MAX), help="Job: units of 2,048 texts at one time.")
@click.option("--budget", type=USD, help="Job: USD to set aside. It costs no more, and nothing twice.")
@click.option("--dry-run", is_flag=True, help="Job: estimate tokens, money and time from a sample. Nothing is paid.")
@click.option("--manifest", type=click.Path(path_type=Path), help="Job: where it is noted what is done.")
@click.option("--overwrite", is_flag=True, help="Start again and replace the output.")
@click.option("--url", help="Endpoint, as http://127.0.0.1:8080/v1. Also EMBEDMESH_BASE_URL.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the key. Or: EMBEDMESH_API_KEY.")
@data_dir_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print a summary as JSON: on stdout, or on stderr if vectors go there."
)
def embed(inputs: tuple[str, ...], output: str, **given: Any) -> None:
    of_job = {name: given.pop(name) for name in OF_JOB}
    asked = any(value is not None and value is not False for value in of_job.values())
    if asked or len(inputs) > 1 or job_output(output) is not None or any("://" in each for each in (*inputs, output)):
        from embedmesh.commands.embed_job import embed_as_job

        sys.exit(EXITS[embed_as_job(inputs, output, of_job | given)])
    file, target = Path(*inputs or "-"), Path(output)
    if output != "-" and target.suffix not in OUTPUTS:
        raise click.BadParameter(
            f"{target.name} must end in {', '.join(OUTPUTS)}, or be - for standard output; a job's ends in /.",
            param_hint="'-o' / '--output'",
        )
    _embed_file(file, None if output == "-" else target, **given)


def _embed_file(
    file: Path,
    target: Path | None,
    *,
    field: str | None,
    column: str | None,
    kind: str | None,
    batch: int,
    confidential: bool,
    pins: Path | None,
    overwrite: bool,
    url: str | None,
    api_key_file: Path | None,
    data_dir: Path,
    as_json: bool,
    **fields: Any,
) -> None:
    kind = kind or FORMATS.get(file.suffix, "lines")
    if kind == "jsonl":
        kind, field, column = "lines", field or column or TEXT_COLUMN, None
    if column is not None and kind == "lines":
        raise WrongUsage("Lines have no --column. Give --format csv, tsv or parquet, or --field for JSON lines.")
    if field is not None and kind != "lines":
        raise WrongUsage(f"--field is for JSON lines, and the input is {kind}: name a --column.")
    trust = _trust(confidential, pins)
    settings = {
        **fields,
        "field": field,
        "column": column,
        "format": None if kind == "lines" else kind,
        "confidential": 1 if confidential else None,  # a run that began sealed does not go on in the clear
    }
    with _opened(file) as source:
        if target is not None and not overwrite and (before := finished_before(target, settings)):
            _check_same_input(source, before, target)
            RunReport(None, target).complete_before(before.lines, before.refused, as_json)
            sys.exit(EXIT_REFUSED_LINES if before.refused else 0)
        endpoint = find_gateway(url, api_key_file, data_dir, "api")
        rows = open_output(target, settings, overwrite=overwrite)
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            job = Job(
                source.fileno(), _reader(source.fileno(), kind, field, column), rows, endpoint, given, batch, trust
            )
            with RunReport(_size(job.source), target) as report:
                ended = _run(job, report)
            report.summary(ended, as_json)
        finally:
            rows.close()
    sys.exit(EXIT_REFUSED_LINES if ended == "finished" and rows.done.refused else EXITS[ended])


@dataclass(frozen=True)
class Job:
    """What to embed: `source` is a file descriptor, `fields` those of every request beside the input."""

    source: int
    reader: ChunkReader | ParquetReader
    rows: Stdout | FileOutput
    endpoint: GatewayAccess
    fields: dict[str, str | int]
    batch: int
    trust: "Trust | None"


def _reader(fd: int, kind: str, field: str | None, column: str | None) -> ChunkReader | ParquetReader:
    if kind == "parquet":
        return ParquetReader(os.fdopen(os.dup(fd), "rb"), column)
    records = LineRecords(field) if kind == "lines" else CsvRecords("\t" if kind == "tsv" else ",", column)
    return ChunkReader(read_chunks(fd), records)


def _run(job: Job, report: RunReport) -> str:
    """Do the job, and print what stopped it; returns a key of EXITS."""
    report.begin(job.rows.done.lines, job.rows.done.refused)
    try:
        asyncio.run(_work(job, report))
    except KeyboardInterrupt:
        report.stopped_before(job.rows.done.lines, "interrupted")
        return "interrupted"
    except NothingListens as nobody:
        report.bar.say(f"embedmesh: {nobody}")
        return "unreachable"
    except Stopped as stopped:
        if isinstance(stopped, RequestRefused) and not job.rows.done.lines:
            report.bar.say(f"embedmesh: {stopped}")
            return "refused"
        report.stopped_before(job.rows.done.lines, str(stopped))
        return "stopped"
    except BrokenPipeError:  # `| head -1` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes stdout at exit
        return "closed"
    except OSError as error:
        report.stopped_before(job.rows.done.lines, f"input or output failed ({error.strerror})")
        return "stopped"
    return "finished"


async def _work(job: Job, report: RunReport) -> None:
    done = job.rows.done
    batches = job.reader.batches(inputs_max=job.batch, skip=done.lines, skip_digest=done.digest)
    wire = BulkWire(find_access(job.endpoint.base_url, job.endpoint.key, None), BULK_REQUEST_S)
    try:
        client = BulkClient(wire.post, job.fields, observer=report, dice=random.Random(), trust=job.trust)
        await run(batches, client, job.rows, report.written)
    finally:
        wire.close()
    job.rows.finish()


def _trust(confidential: bool, pins: Path | None) -> "Trust | None":
    """Whom the texts are sealed for; None for nobody. Raises WrongUsage."""
    if not confidential and pins is None:
        return None
    if not confidential or pins is None:
        raise WrongUsage("--confidential and --node-identity FILE go together: the file says which nodes may read.")
    from embedmesh.client.core import Trust  # these bring a TLS library along
    from embedmesh.client.pins import Pins

    try:
        return Trust(Pins.read(pins))
    except WrongPins as error:
        raise WrongUsage(error.message) from None


def _opened(file: Path) -> IO[bytes]:
    """The file unbuffered, since its descriptor is read; standard input for `-`. Raises WrongUsage."""
    if str(file) == "-":
        return open(0, "rb", buffering=0, closefd=False)
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise WrongUsage(f"{file} cannot be read ({error.strerror}).") from None


def _check_same_input(source: IO[bytes], before: Checkpoint, target: Path) -> None:
    """Raise WrongUsage where the input is not the one that `target` was made of."""
    if hashlib.file_digest(source, "sha256").hexdigest() != before.digest:  # type: ignore[arg-type]  # raw, not buffered
        raise WrongUsage(
            f"{target} is complete, with {before.lines:,} lines of another input."
            " Choose another --output, or --overwrite it."
        )


def _size(fd: int) -> int | None:
    """Bytes of a file, for the progress bar; None for a pipe or terminal."""
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else None
