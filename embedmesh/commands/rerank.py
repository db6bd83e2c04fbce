"""`embedmesh rerank`: lines of files, those that answer a query best first."""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import click
import rich.bar
import rich.console
import rich.progress
import rich.table
import rich.text

from embedmesh.bulk.lines import LINE_BYTES_MAX, Refusal, read_line, read_members
from embedmesh.client import CallNotAnswered, Client, EmbedmeshError, InputRefused, Ranked, Reranked, WrongCall
from embedmesh.client.access import find_access
from embedmesh.client.models import served_for
from embedmesh.commands.endpoint import GatewayAccess, find_gateway
from embedmesh.commands.options import WholeNumber, data_dir_option
from embedmesh.commands.output import WrongUsage, print_json
from embedmesh.commands.progress import ProgressBar
from embedmesh.rules.errors import SetupError
from embedmesh.rules.money import format_usd

DOCUMENTS_BYTES_MAX = 64 * 1024 * 1024  # of all files: they are in memory, thrice, and are some minutes of work
STEP_DOCUMENTS = 200  # of a request: the bar moves, and two whole searches cost what they cost in a larger one
RERANK_RETRIES = 8  # of a request that is refused for load: half a minute
BAR_COLUMNS = 16
ROWS_SHOWN_MAX = 200  # in a terminal: some screenfuls
SHOWN_CHARS = 240  # of a document in a terminal: three lines; --json and pipes have all of it
EXIT_REFUSED = 1

HELP = """Rank documents by how well they answer a query, best first.

A document is a line of the FILES, or of standard input (-, or no file); with --field, the lines are JSON objects and it
is this member of each. Empty lines are skipped. A score is from 0 to 1, or a logit, as the model's own definition has
it; scores of one model can be compared. More documents than one request takes are sent in several, which cost the same.

In a terminal each line has a bar. In a pipe it is score, tab, document; of several files score, file:line, document.

\b
Examples:
  embedmesh rerank "how do I return a product?" answers.txt --top-n 3
  embedmesh rerank "memory leak" notes/*.md --top-n 10
  grep -ri invoice mails/ | embedmesh rerank "was I charged twice?" -
  embedmesh rerank "warm socks" shop.jsonl --field description --json

\b
Exit status:
  0    ranked
  1    the gateway refused, or did not answer any more (the line on stderr says why)
  2    wrong usage: an option, or a file
  78   the set-up is wrong: no endpoint, no key, nothing listens, no model that reranks
  130  interrupted
"""

NO_RERANKER = (
    "No model that reranks is served. Put one into the catalogue (embedmesh models inspect FOLDER prints its entry),"
    " or add a server that has one: embedmesh nodes add URL --model MODEL."
)


class Document(NamedTuple):
    """A text, and where it stands: lines count from 1."""

    file: str
    line: int
    text: str


@click.command(help=HELP)
@click.argument("query")
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(allow_dash=True))
@click.option("--model", help="Model to rerank with. Default: the only one that does.")
@click.option("--top-n", type=WholeNumber(1), help="Print only the best.")
@click.option("--field", help="The lines are JSON objects; rank this field of each.")
@click.option("--raw-scores/--sigmoid", default=None, help="Logits, or 0 to 1. Default: the model's own definition.")
@click.option("--truncate", type=click.Choice(["none", "end"]), help="What is too long: refused, or cut. Default: cut.")
@click.option("--url", help="Endpoint, as http://127.0.0.1:8080/v1. Also EMBEDMESH_BASE_URL.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the key. Or: EMBEDMESH_API_KEY.")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all of it.")
def rerank(
    query: str,
    files: tuple[str, ...],
    model: str | None,
    url: str | None,
    api_key_file: Path | None,
    data_dir: Path,
    as_json: bool,
    field: str | None,
    **options: Any,
) -> None:
    if not query.strip():
        raise WrongUsage("There is nothing to rank by: QUERY is empty.")
    documents = list(_documents(files or ("-",), field))
    if not documents:
        raise WrongUsage("There is nothing to rank: the input has no line with a text.")
    gateway = find_gateway(url, api_key_file, data_dir, "api")
    try:
        ranked = _rank(gateway, query, documents, _model(gateway, model), options)
    except WrongCall as error:
        raise WrongUsage(error.message) from None
    except InputRefused as error:
        at = documents[error.index]
        _end(f"{at.file}, line {at.line:,}: {error.problem.message}")
    except EmbedmeshError as error:
        _end(error.message)
    _print(ranked, documents, several=len(files) > 1, as_json=as_json)


def _end(why: str) -> NoReturn:
    click.echo(f"embedmesh: {why}", err=True)
    sys.exit(EXIT_REFUSED)


def _rank(
    gateway: GatewayAccess, query: str, documents: Sequence[Document], model: str, options: dict[str, Any]
) -> Reranked:
    """Raises EmbedmeshError."""
    with (
        Client(base_url=gateway.base_url, api_key=gateway.key, max_retries=RERANK_RETRIES) as client,
        ProgressBar(*rich.progress.Progress.get_default_columns(), transient=True) as bar,
    ):

        def progress(done: int) -> None:
            if len(documents) > STEP_DOCUMENTS:
                bar.show("documents", done, len(documents))

        progress(0)
        texts = [document.text for document in documents]
        return client.rerank(query, texts, model=model, batch_size=STEP_DOCUMENTS, progress=progress, **options)


def _model(gateway: GatewayAccess, asked: str | None) -> str:
    """The model that is asked for, else the one that reranks. Asking first tells at once where nothing listens.

    Raises EmbedmeshError; SetupError where nothing listens, and where no model, or several, would do.
    """
    try:
        found = served_for(find_access(gateway.base_url, gateway.key, None), "rerank")
    except CallNotAnswered as error:
        raise SetupError(f"{error.message} Is the gateway running?") from None
    except EmbedmeshError:
        if asked is None:
            raise
        return asked
    if asked is not None:
        return asked
    if not found:
        raise SetupError(NO_RERANKER)
    if len(found) > 1:
        raise SetupError(f"Several models rerank: {', '.join(found)}. Name one with --model.")
    return found[0]


def _documents(files: Sequence[str], field: str | None) -> Iterator[Document]:
    """Lines that have a text, file after file. Raises WrongUsage."""
    left = DOCUMENTS_BYTES_MAX
    for name in files:
        try:
            with _opened(name) as stream:
                data = stream.read(left + 1)
        except OSError as error:
            raise WrongUsage(f"{name} cannot be read ({error.strerror}).") from None
        left -= len(data)
        if left < 0:
            raise WrongUsage(f"The input has more than {DOCUMENTS_BYTES_MAX:,} bytes. Rank parts of it.")
        for number, line in enumerate(data.split(b"\n"), 1):
            text = read_line(line if len(line) <= LINE_BYTES_MAX else None, number == 1)
            if not isinstance(text, Refusal) and field is not None and text:
                members = read_members(text)
                text = members if isinstance(members, Refusal) else _member(members, field)
            if isinstance(text, Refusal):
                raise WrongUsage(f"{name}, line {number:,}: {text.message}.")
            if text.strip():
                yield Document(name, number, text)


def _opened(name: str) -> IO[bytes]:
    return open(0, "rb", closefd=False) if name == "-" else Path(name).open("rb")


def _member(members: dict[str, Any], field: str) -> str | Refusal:
    text = members.get(field)
    return text if isinstance(text, str) else Refusal("missing_field", f"it has no text in the member {field!r}")


def _print(ranked: Reranked, documents: Sequence[Document], *, several: bool, as_json: bool) -> None:
    found = [(each, documents[each.index]) for each in ranked.results]
    if as_json:
        print_json(
            {
                "model": ranked.model,
                "results": [
                    {"index": each.index, "score": each.score, "file": at.file, "line": at.line, "text": at.text}
                    for each, at in found
                ],
                "tokens": ranked.tokens,
                "searches": ranked.searches,
                "cost_nanousd": ranked.cost_nanousd,
                "truncated": ranked.truncated,
            }
        )
        return
    console = rich.console.Console()
    if console.is_terminal:
        console.print(_bars(found[:ROWS_SHOWN_MAX], several=several, columns=console.width))
        if len(found) > ROWS_SHOWN_MAX:
            click.echo(f"... and {len(found) - ROWS_SHOWN_MAX:,} more: --json has all of them, and a pipe", err=True)
    else:
        for each, at in found:
            where = [f"{at.file}:{at.line}"] if several else []
            click.echo("\t".join([repr(each.score), *where, " ".join(at.text.splitlines())]))
    cost = "" if ranked.cost_nanousd is None else f", {format_usd(ranked.cost_nanousd)}"
    searches = "1 search" if ranked.searches == 1 else f"{ranked.searches:,} searches" if ranked.searches else ""
    by_list = searches or f"{ranked.tokens:,} tokens"  # the cost may be less: what is remembered may be free
    cut = f"; {ranked.truncated:,} were longer than the model takes, and were cut" if ranked.truncated else ""
    click.echo(f"{len(documents):,} documents, {by_list}{cost}{cut}", err=True)


def _bars(found: Sequence[tuple[Ranked, Document]], *, several: bool, columns: int) -> rich.table.Table:
    """Each document's score, a bar, where it stands and its beginning. Logits are drawn by their logistic function."""
    logits = any(not 0 <= each.score <= 1 for each, _ in found)
    grid = rich.table.Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(width=min(BAR_COLUMNS, columns // 6))
    grid.add_column(ratio=1)
    for each, at in found:
        part = 1 / (1 + math.exp(-max(each.score, -700.0))) if logits else each.score
        where = f"{at.file}:{at.line}  " if several else f"{at.line}  "
        shown = at.text if len(at.text) <= SHOWN_CHARS else at.text[:SHOWN_CHARS] + "…"
        text = "".join(char if char.isprintable() else " " for char in shown)  # a terminal might obey the others
        bar = rich.bar.Bar(1.0, 0.0, part, color="green")
        grid.add_row(f"{each.score:.4f}", bar, rich.text.Text.assemble((where, "dim"), text))
    return grid
