"""`embedmesh embed` with tables: CSV, TSV and Parquet in and out, other columns kept, and gone on with."""

import csv
import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.commands.edge import WIDTH, Edge, bootstrap, failure, start, vector_of
from tests.commands.texts import Embed, rows_of, texts_file

ROWS = [{"id": f"r{number}", "text": f'text {number}, "é"\nnext', "more": str(number % 3)} for number in range(40)]
TYPED = pa.table(
    {
        "at": pa.array([1_700_000_000_000_000_001 + at for at in range(40)], pa.timestamp("ns", "UTC")),
        "price": pa.array([decimal.Decimal(at) / 4 for at in range(40)], pa.decimal128(9, 2)),
        "tags": pa.array([["a", str(at)] for at in range(40)], pa.list_(pa.string())),
        "index": pa.array(range(100, 140), pa.int32()),
        "text": pa.array([row["text"] for row in ROWS], pa.string()).dictionary_encode(),
    }
)


def write_table(file: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    """As `file`'s name says; with a byte order mark and Windows' line ends, as spreadsheets write."""
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
        return file
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return file


def read_table(file: Path) -> list[dict[str, Any]]:
    """Rows with `embedding` as a list or None, whatever the kind."""
    if file.suffix == ".parquet":
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
        return rows
    if file.suffix == ".jsonl":
        return list(rows_of(file))
    with file.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","))
    return [{**row, "embedding": json.loads(row["embedding"] or "null")} for row in read]


def check(file: Path, rows: list[dict[str, str]]) -> None:
    """Every row in its place, with its other columns and its vector, or why it has none."""
    found = read_table(file)
    assert len(found) == len(rows)
    for number, (row, given) in enumerate(zip(found, rows, strict=True)):
        assert (str(row["index"]), row["id"], row["more"]) == (str(number), given["id"], given["more"])
        assert "text" not in row
        if given["text"]:
            assert np.array_equal(np.array(row["embedding"], "<f4"), vector_of(given["text"]))
            assert not row.get("error")
        else:
            assert row["embedding"] is None and "empty_input" in str(row["error"])


@pytest.mark.parametrize("made", [".csv", ".tsv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("given", [".csv", ".tsv", ".parquet"])
def test_a_table_comes_back_with_vectors(edge: Edge, embed: Embed, tmp_path: Path, given: str, made: str) -> None:
    rows = [*ROWS[:5], {**ROWS[5], "text": ""}, *ROWS[6:]]
    out = tmp_path / f"out{made}"
    result = embed(write_table(tmp_path / f"in{given}", rows), "-o", out, "--batch", 6)
    assert result.exit_code == 1 and "line 6: there is no text to embed" in result.stderr
    check(out, rows)
    assert sorted(edge.answered) == sorted(row["text"] for row in rows if row["text"])


@pytest.mark.parametrize("made", [".csv", ".tsv", ".parquet", ".jsonl", ".npy"])
@pytest.mark.parametrize("given", [".csv", ".parquet"])
def test_a_stopped_run_goes_on(edge: Edge, embed: Embed, tmp_path: Path, given: str, made: str) -> None:
    """From where it was, each row once; a torn row is cut off; and when it is complete it says so."""
    table, out = write_table(tmp_path / f"in{given}"), tmp_path / f"out{made}"
    late = {row["text"] for row in ROWS[20:]}
    # By the request, not by the time: what the first run had in flight may arrive when it has ended.
    stop = failure(429, "insufficient_quota")
    edge.script = lambda asked: stop if late & set(asked.texts) and len(asked.texts) <= 5 else None
    assert embed(table, "-o", out, "--batch", 5).exit_code == 3
    part = tmp_path / f"out{made}.part"
    with (part if part.exists() else out).open("ab") as stream:
        stream.write(b'19,"r19')
    assert embed(table, "-o", out, "--batch", 20).exit_code == 0
    assert sorted(edge.answered) == sorted(row["text"] for row in ROWS)
    if made == ".npy":
        assert np.array_equal(np.load(out), np.stack([vector_of(row["text"]) for row in ROWS]))
    else:
        check(out, ROWS)
    assert not part.exists()
    again = embed(table, "-o", out)
    assert again.exit_code == 0 and "already complete: 40 lines" in again.stderr
    write_table(table, [*ROWS[:3], {**ROWS[3], "text": "another"}])
    assert "another input" in embed(table, "-o", out).stderr


def test_a_run_does_not_go_on_with_another_parquet_file(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    edge.script = lambda asked: failure(429, "insufficient_quota") if asked.number else None
    assert embed(table, "-o", out, "--batch", 5).exit_code == 3
    write_table(table, ROWS[::-1])
    result = embed(table, "-o", out)
    assert result.exit_code == 2 and "not that of the run before" in result.stderr


def test_parquet_keeps_the_types_of_its_columns(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """Also those that Python has no value for; a column `index` stands in the place of the number."""
    table, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(TYPED, table, row_group_size=16)
    assert embed(table, "-o", out, "--batch", 7).exit_code == 0
    made = parquet.read_table(out)
    assert made.column_names == ["at", "price", "tags", "index", "embedding", "error"]
    assert made.select(range(4)).equals(TYPED.select(range(4)))
    assert made.schema.field("embedding").type == pa.list_(pa.float32())
    assert np.array_equal(made["embedding"].to_pylist()[7], vector_of(ROWS[7]["text"]))
    lines = tmp_path / "out.jsonl"
    assert embed(table, "-o", lines).exit_code == 0
    first = rows_of(lines)[0]
    assert (first["index"], first["price"], first["tags"]) == (100, "0.00", ["a", "0"])
    assert str(first["at"]).startswith(str(datetime.datetime.fromtimestamp(1_700_000_000, datetime.UTC))[:19])


def test_an_output_is_embedded_again(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """Its columns are made anew, not twice."""
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    assert embed(write_table(tmp_path / "in.csv"), "-o", first).exit_code == 0
    assert embed(first, "-o", second, "--column", "id").exit_code == 0
    assert second.read_text().splitlines()[0] == "index,more,embedding,error"
    assert np.array_equal(np.array(read_table(second)[5]["embedding"], "<f4"), vector_of("r5"))


def test_lines_make_tables_too(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert embed(texts_file(tmp_path, ["one", "two"]), "-o", out).exit_code == 0
    assert [(row["index"], len(row["embedding"])) for row in read_table(out)] == [(0, WIDTH), (1, WIDTH)]
    empty = tmp_path / "empty.csv"
    empty.write_text("text,id\n")
    for kind, columns in ((".csv", "index,embedding,error\n"), (".parquet", ["index", "embedding", "error"])):
        assert embed(empty, "-o", tmp_path / f"empty-out{kind}").exit_code == 0
        made = tmp_path / f"empty-out{kind}"
        assert (made.read_text() if kind == ".csv" else parquet.read_table(made).column_names) == columns


@pytest.mark.parametrize(
    ("name", "header", "options", "says"),
    [
        ("in.csv", "id,body", [], "no column 'text'. Name one with --column: id, body."),
        ("in.csv", "id,text", ["--column", "nope"], "no column 'nope'"),
        ("in.csv", "id,text", ["--field", "text"], "--field is for JSON lines"),
        ("in.txt", "id,text", ["--column", "text"], "Lines have no --column"),
        ("in.parquet", "id,text", [], "no Parquet file"),
        ("in.txt", "id,text", ["--format", "parquet"], "no Parquet file"),
        ("in.csv", '"id,text', [], "a quote left open?"),
    ],
)
def test_what_cannot_be_read_is_told(
    edge: Edge, embed: Embed, tmp_path: Path, name: str, header: str, options: list[str], says: str
) -> None:
    """In words that say what to change; nothing is left behind."""
    (tmp_path / name).write_text(f"{header}\n1,a\n" + "x" * (5_000_000 if header[0] == '"' else 0))
    result = embed(tmp_path / name, "-o", tmp_path / "out.jsonl", *options)
    assert result.exit_code == 2 and says in result.stderr, result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_numbers_are_no_texts(embed: Embed, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "in.parquet")
    result = embed(tmp_path / "in.parquet", "-o", tmp_path / "out.npy")
    assert result.exit_code == 2 and "The column 'text' holds int64, not texts" in result.stderr


def test_csv_comes_through_a_pipe(edge: Edge, tmp_path: Path) -> None:
    data_dir = bootstrap(tmp_path / "data", edge.base_url)
    arguments = ["--format", "csv", "--column", "1", "-o", str(tmp_path / "out.csv"), "--data-dir", str(data_dir)]
    run = start("embed", "-", *arguments)
    _, said = run.communicate("id,body\n7,hello\n", timeout=60)
    assert run.returncode == 0, said
    assert read_table(tmp_path / "out.csv")[0]["id"] == "7" and edge.answered == ["hello"]


@pytest.mark.parametrize(("given", "made"), [("in.parquet", "out.npy"), ("in.csv", "out.parquet")])
def test_without_pyarrow_it_says_what_to_install(edge: Edge, tmp_path: Path, given: str, made: str) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "pyarrow.py").write_text("raise ImportError")
    table, data_dir = write_table(tmp_path / given), bootstrap(tmp_path / "data", edge.base_url)
    arguments = [str(table), "-o", str(tmp_path / made), "--data-dir", str(data_dir)]
    run = start("embed", *arguments, env={"PYTHONPATH": str(tmp_path / "path")})
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2 and "pip install 'embedmesh[parquet]'" in said
