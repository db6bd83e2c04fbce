"""`embedmesh embed` as a job: units, parts, the manifest; killed anywhere and gone on with."""

import csv
import gzip
import json
import signal
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from embedmesh.bulk.estimate import estimate
from embedmesh.bulk.remote import file_system
from embedmesh.bulk.sources import batches_of
from embedmesh.bulk.units import JOB_UNIT_BYTES_MAX, UNIT_TEXTS_MAX, JobPlan, JobUnit, units_of
from embedmesh.bulk.work import requests_of
from embedmesh.commands.bulk import counting
from tests.commands.edge import Edge, bootstrap, failure, start, vector_of
from tests.commands.test_embed_process import wait_until
from tests.commands.texts import Embed

MANY = [f"text {number} é漢" for number in range(5_000)]  # three units
PLAN = JobPlan(base_url="http://127.0.0.1:1/v1", api_key="secret", fields={"model": "m"}, output="parquet:out")


def jsonl(file: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"id": f"r{at}", "text": text, "n": at}) + "\n" for at, text in enumerate(texts)]
    content = "".join(lines).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """Of all parts, in the order of their names; a reader of the folder sees the same rows."""
    names = sorted(path for path in folder.iterdir() if path.name.startswith("part-"))
    assert not [path for path in folder.iterdir() if path not in names and path.name != "_manifest.jsonl"]
    if names and names[0].suffix == ".jsonl":
        return [json.loads(line) for name in names for line in name.read_bytes().splitlines()]
    rows: list[dict[str, Any]] = [row for name in names for row in parquet.read_table(name).to_pylist()]
    return rows


def check_rows(rows: list[dict[str, Any]], texts: list[str]) -> None:
    """Every row once, in order, with its own vector."""
    assert [row["index"] for row in rows] == list(range(len(texts)))
    found = np.array([row["embedding"] for row in rows], "<f4")
    assert np.array_equal(found, np.stack([vector_of(text) for text in texts]))


def test_inputs_of_every_kind_become_one_folder(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """Rows are numbered over all inputs; other columns are kept; what cannot be embedded has a row that says why."""
    table = tmp_path / "a.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "text"), ("c0", "one"), ("c1", ""), ("c2", 'two\n"lines"')])
    typed = pa.table({"id": pa.array([7, None], pa.int64()), "text": ["three", "four"]})
    parquet.write_table(typed, tmp_path / "b.parquet")
    packed = jsonl(tmp_path / "c.jsonl.gz", ["five", "six"])
    inputs = (table, tmp_path / "b.parquet", packed)
    for output, folder in (("out/", "out"), (f"jsonl:{tmp_path}/lines", "lines")):
        output = f"{tmp_path}/{output}" if output.endswith("/") else output
        result = embed(*inputs, "-o", output, "--id", "id", "--json")
        assert result.exit_code == 1, result.output
        told = json.loads(result.stdout)
        assert (told["ended"], told["units"], told["texts"], told["refused"]) == ("finished", 3, 7, 2)
        assert "row 2: empty_input" in result.stderr and "row 5: missing_id" in result.stderr
        rows = rows_in(tmp_path / folder)
        assert [(row["index"], row["id"]) for row in rows] == list(enumerate(["c0", "c1", "c2", 7, None, "r0", "r1"]))
        assert "n" in rows[-1] and "text" not in rows[-1]
        good = {row["index"]: row["embedding"] for row in rows if not row.get("error")}
        texts = {0: "one", 2: 'two\n"lines"', 3: "three", 5: "five", 6: "six"}
        assert good.keys() == texts.keys()
        assert all(np.array_equal(np.array(good[at], "<f4"), vector_of(text)) for at, text in texts.items())
        assert all(row["embedding"] is None for row in rows if row["index"] in (1, 4))
    asked = len(edge.asked)
    again = embed(*inputs, "-o", f"{tmp_path}/out/", "--id", "id")
    assert again.exit_code == 1 and "already complete: 7 texts, 2 of them refused" in again.stderr
    assert len(edge.asked) == asked


@pytest.mark.story
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_job_goes_on(edge: Edge, embed: Embed, tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Of what was committed nothing is asked again; every row is there once; nobody else writes meanwhile."""
    file, out = jsonl(tmp_path / "in.jsonl", MANY), f"{tmp_path}/out/"
    data_dir = bootstrap(tmp_path / "data", edge.base_url)
    edge.holds_back = lambda asked: asked.texts[0] not in MANY[:UNIT_TEXTS_MAX]
    process = start("embed", str(file), "-o", out, "--data-dir", str(data_dir))
    manifest = tmp_path / "out" / "_manifest.jsonl"
    wait_until(lambda: manifest.exists() and manifest.read_bytes().count(b"\n") == 2)
    rival = embed(file, "-o", out)
    assert rival.exit_code == 2 and "Another `embedmesh embed` writes" in rival.stderr
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == status and "Traceback" not in said, said
    with manifest.open("ab") as torn:
        torn.write(b'{"unit":1,"key":"torn')
    edge.holds_back = lambda asked: False
    before, edge.answered = sorted(edge.answered), []
    assert before == sorted(MANY[:UNIT_TEXTS_MAX])
    result = embed(file, "-o", out)
    assert result.exit_code == 0, result.output
    assert "continuing: 2,048 texts are done" in result.stderr
    assert sorted(edge.answered) == sorted(MANY[UNIT_TEXTS_MAX:])
    check_rows(rows_in(tmp_path / "out"), MANY)
    lines = [json.loads(line) for line in manifest.read_bytes().splitlines()]
    assert [row["unit"] for row in lines[1:-1]] in ([0, 1, 2], [0, 2, 1]) and lines[-1] == {"finished": 3}


def test_what_stops_a_unit_stops_the_job_and_keeps_the_others(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "in.jsonl", MANY)
    edge.script = lambda asked: failure(401, "invalid_api_key") if MANY[-1] in asked.texts else None
    result = embed(file, "-o", f"{tmp_path}/out/", "--concurrency", 2)
    assert result.exit_code == 3 and "Run the same command again" in result.stderr
    edge.script = lambda asked: None
    assert embed(file, "-o", f"{tmp_path}/out/").exit_code == 0
    check_rows(rows_in(tmp_path / "out"), MANY)
    assert edge.answered.count(MANY[0]) == 1


@pytest.mark.parametrize(
    "more, says",
    [
        (lambda file: jsonl(file, ["other", *MANY[1:60]]) and (), "The input is not that of the job"),
        (lambda file: jsonl(file, MANY[:3_000]) and (), "The input is not that of the job"),
        (lambda file: ("--model", "m2"), "was begun with another model"),
        (lambda file: ("--id", "id"), "was begun with another id"),
        (lambda file: ("--budget", "1"), "has no jobs in a ledger, which --budget needs"),
        (lambda file: ("--manifest", file), "is no manifest of a job"),
        (lambda file: ("--manifest", file.with_name("new")), "holds parts already"),
    ],
)
def test_what_does_not_go_with_a_job_is_refused(
    embed: Embed, tmp_path: Path, more: Callable[[Path], tuple[object, ...]], says: str
) -> None:
    """In one line, and nothing is lost by it. With --overwrite the same may begin anew."""
    file = jsonl(tmp_path / "in.jsonl", MANY[:50])
    out = ("-o", f"{tmp_path}/out/")
    assert embed(file, *out).exit_code == 0
    before = rows_in(tmp_path / "out")
    given = more(file)
    result = embed(file, *out, *given)
    assert result.exit_code == 2 and says in result.stderr.splitlines()[-1], result.output
    assert rows_in(tmp_path / "out") == before
    if "--budget" not in given and "--manifest" not in given:
        assert embed(file, *out, *given, "--overwrite").exit_code == 0
        assert len(rows_in(tmp_path / "out")) == len(file.read_bytes().splitlines())


@pytest.mark.parametrize(
    "given, says",
    [
        (["a.jsonl", "b.jsonl"], "A job writes OUT/"),
        (["missing.jsonl", "-o", "out/"], "missing.jsonl cannot be read"),
        (["a.jsonl", "-o", "out/", "--id", "no"], "no column 'no'"),
        (["a.jsonl", "-o", "out/", "--confidential"], "cannot be --confidential"),
        (["-o", "out/"], "name them"),
        (["gs://b/a.jsonl", "-o", "out/"], "install gcsfs"),
        (["memory://b/a.jsonl", "-o", "memory://b/out.jsonl"], "not one file"),
        (["memory://b/a.jsonl", "-o", "out/"], "cannot be read (FileNotFoundError)"),
    ],
)
def test_wrong_usage(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", MANY[:3])
    result = embed(*given)
    assert result.exit_code == 2 and says in result.stderr.splitlines()[-1], result.output


def test_a_part_that_was_changed_is_found(embed: Embed, tmp_path: Path) -> None:
    """At the end every part is there, and of its size; drafts of workers that were killed are removed."""
    file = jsonl(tmp_path / "in.jsonl", MANY[:50])
    assert embed(file, "-o", f"npy:{tmp_path}/out").exit_code == 0
    part = next((tmp_path / "out").glob("part-*.npy"))
    assert np.array_equal(np.load(part), np.stack([vector_of(text) for text in MANY[:50]]))
    (tmp_path / "out" / ".draft-0").write_bytes(b"half")
    assert embed(file, "-o", f"npy:{tmp_path}/out").exit_code == 0
    assert not (tmp_path / "out" / ".draft-0").exists()
    part.unlink()
    result = embed(file, "-o", f"npy:{tmp_path}/out")
    assert result.exit_code == 3 and part.name in result.stderr


def test_a_dry_run_asks_for_nothing_that_is_paid(
    edge: Edge, embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the input, counts some of it, and asks for the price alone."""
    monkeypatch.setattr(counting, "counter_for", lambda fields: (lambda texts: [2] * len(texts), "by two"))
    from aiohttp import web

    edge.routes["/v1/models/m"] = web.json_response({"price_nanousd_per_million_tokens": 10_000_000})
    result = embed(jsonl(tmp_path / "in.jsonl", MANY), "--dry-run", "--model", "m", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["units"], told["texts"], told["tokens"], told["cost_nanousd"]) == (3, 5_000, 10_000, 100_000)
    assert edge.asked == [] and list(tmp_path.glob("out*")) == []
    result = embed(tmp_path / "in.jsonl", "--dry-run")
    assert "tokens: about 10,000 ± 0 (5,000 texts counted by two)" in result.stdout
    assert "money: not known" in result.stdout


def test_an_estimate_has_its_spread() -> None:
    """The whole is within the spread of what a sample of at least 1 % says."""
    units = [
        JobUnit(key="k", number=at, first=0, texts=["x" * (5 + at % 7)] * 9, refused=[], ids=None, columns={})
        for at in range(1_000)
    ]
    counted: list[int] = []

    def count(texts: list[str]) -> list[int]:
        counted.append(len(texts))
        return [len(text) // 2 for text in texts]

    found = estimate(units, count)  # type: ignore[arg-type]
    truth = sum(len(text) // 2 for unit in units for text in unit.texts)
    assert found.spread is not None and abs(found.tokens - truth) <= found.spread < truth / 10
    assert 10 <= found.sampled_texts / 9 <= 20 and len(counted) < 70
    assert found.texts == 9_000


def test_the_input_alone_decides_what_a_unit_is(tmp_path: Path) -> None:
    """Cut twice it has the same keys, another input or model has others; units and requests keep their bounds."""
    texts = ["x" * (1 + at % 40 * 100) for at in range(3_000)] + ["y" * JOB_UNIT_BYTES_MAX] * 2
    file = jsonl(tmp_path / "in.jsonl", texts)

    def cut(plan: JobPlan = PLAN) -> list[JobUnit]:
        return list(units_of(batches_of([str(file)], None, None), plan))

    units = cut()
    assert [unit.key for unit in units] == [unit.key for unit in cut()]
    assert [text for unit in units for text in unit.texts] == texts
    assert all(len(unit.texts) <= UNIT_TEXTS_MAX for unit in units)
    assert all(sum(map(len, unit.texts)) <= JOB_UNIT_BYTES_MAX or len(unit.texts) == 1 for unit in units)
    for unit in units:
        requests = requests_of(unit, list(range(len(unit.texts))))
        assert [text for request in requests for text in request.texts] == unit.texts
    assert JobUnit.of_dict(json.loads(json.dumps(units[0].as_dict()))) == units[0]
    other = JobPlan(base_url="b", api_key="k", fields={"model": "m2"}, output="parquet:elsewhere")
    assert not {unit.key for unit in cut(other)} & {unit.key for unit in units}
    assert "secret" not in repr(PLAN) and "secret" not in json.dumps(PLAN.settings)
    assert JobPlan(**PLAN.as_dict()) == PLAN
    jsonl(file, [*texts[:-1], "z"])
    assert [unit.key for unit in cut()[:-2]] == [unit.key for unit in units[:-2]]
    assert cut()[-1].key != units[-1].key


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".npy", ".lance"])
def test_one_file_is_made_of_the_parts(edge: Edge, embed: Embed, tmp_path: Path, suffix: str) -> None:
    """In the order of the input, with the columns of all inputs; the parts are gone then, and it is not made twice."""
    if suffix == ".lance":
        pytest.importorskip("lance")
    first, second = jsonl(tmp_path / "a.jsonl", MANY), tmp_path / "b.txt"
    second.write_text("more\n\nlast\n")
    out = tmp_path / f"out{suffix}"
    result = embed(first, second, "-o", out)
    assert result.exit_code == 1, result.output
    texts = [*MANY, "more", "", "last"]
    if suffix == ".npy":
        vectors = list(np.load(out))
    elif suffix == ".jsonl":
        vectors = [json.loads(line)["embedding"] for line in out.read_bytes().splitlines()]
    else:
        table = parquet.read_table(out) if suffix == ".parquet" else __import__("lance").dataset(str(out)).to_table()
        assert table["index"].to_pylist() == list(range(len(texts)))
        assert table["id"].to_pylist() == [f"r{at}" for at in range(len(MANY))] + [None] * 3
        vectors = table["embedding"].to_pylist()
    for text, vector in zip(texts, vectors, strict=True):
        if text:
            assert np.array_equal(np.array(vector, "<f4"), vector_of(text))
        else:
            assert vector is None or np.isnan(vector).all()
    asked, made = len(edge.asked), out.stat().st_mtime_ns
    again = embed(first, second, "-o", out)
    assert again.exit_code == 1 and "already complete" in again.stderr
    assert (len(edge.asked), out.stat().st_mtime_ns) == (asked, made)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))) == sorted(
        [out.name, f"{out.name}.manifest.jsonl"]
    )


@pytest.fixture(params=["memory", "s3"])
def address(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own, in memory and at a real server that speaks S3."""
    if request.param == "memory":
        return f"memory://{uuid4()}"
    found: str = request.getfixturevalue("s3").new_address(monkeypatch.setenv)
    return found


def test_inputs_and_outputs_at_addresses(
    edge: Edge, embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """By fsspec; the manifest is a local file. What has changed there is noticed."""
    monkeypatch.chdir(tmp_path)
    there, root = file_system(address, use_listings_cache=False, skip_instance_cache=True)
    there.pipe_file(f"{root}/in/a.parquet", parquet_bytes(["one", "two"]))
    there.pipe_file(f"{root}/in/b.jsonl.gz", jsonl(tmp_path / "b.jsonl.gz", ["three"]).read_bytes())
    command = (f"{address}/in/a.parquet", f"{address}/in/b.jsonl.gz", "-o", f"parquet:{address}/out")
    try:
        assert embed(*command).exit_code == 0
        parts = sorted(path for path in there.ls(f"{root}/out", detail=False) if "part-" in path)
        rows = [row for path in parts for row in parquet.read_table(there.open(path)).to_pylist()]
        check_rows(rows, ["one", "two", "three"])
        assert "already complete" in embed(*command).stderr and len(edge.asked) == 2
        there.pipe_file(f"{root}/in/a.parquet", parquet_bytes(["one", "other"]))
        assert "The input is not that of the job" in embed(*command).stderr
        assert embed(*command, "--overwrite").exit_code == 0
        assert len([path for path in there.ls(f"{root}/out", detail=False) if "part-" in path]) == 2
    finally:
        there.rm(root, recursive=True)


def parquet_bytes(texts: list[str]) -> bytes:
    into = BytesIO()
    parquet.write_table(pa.table({"text": texts}), into)
    return into.getvalue()
