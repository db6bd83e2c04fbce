"""`embedmesh embed` over a scripted edge: every line gets its row, whatever happens on the way."""

import base64
import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from tests.commands.edge import KEY, Asked, Edge, embeddings, failure, vector_of
from tests.commands.texts import TEXTS, Embed, assert_rows, rows_of, texts_file


def test_every_line_gets_its_row_in_order(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """Batches come back in any order; rows are in the order of the lines, and the checkpoint tells that all is done."""
    out = tmp_path / "out.jsonl"
    result = embed(texts_file(tmp_path, TEXTS), "-o", out, "--batch", 7, "--input-type", "query", "--dimensions", 4)
    assert result.exit_code == 0, result.output
    assert_rows(rows_of(out), TEXTS)
    assert sorted(len(asked.texts) for asked in edge.asked) == [1] + [7] * 7
    assert all(asked.headers["Authorization"] == f"Bearer {KEY}" for asked in edge.asked)
    sent = {name: value for name, value in edge.asked[0].body.items() if name != "input"}
    model = "sentence-transformers/all-MiniLM-L6-v2"
    assert sent == {"model": model, "dimensions": 4, "input_type": "query", "encoding_format": "base64"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.jsonl", "out.jsonl.state", "texts.txt"]


def test_refused_lines_do_not_cost_the_others_their_vectors(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """A refused line has a row that says why, is told by number and never by its text; the exit status is 1."""

    def refuse_secrets(asked: Asked) -> web.Response | None:
        bad = [i for i, text in enumerate(asked.texts) if text.startswith("secret")]
        return failure(400, "context_length_exceeded", "too long", f"input.{bad[0]}") if bad else None

    edge.script = refuse_secrets
    file = tmp_path / "texts.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\nsecret a\n\n\xff\xfe\nfive\nsecret b\nseven")
    out = tmp_path / "out.jsonl"
    result = embed(file, "-o", out)
    assert result.exit_code == 1
    rows = rows_of(out)
    codes = [row["error"]["code"] if "error" in row else None for row in rows]  # type: ignore[index]
    long = "context_length_exceeded"
    assert codes == [None, long, "empty_input", "not_utf8", None, long, None]
    assert [row["embedding"] is None for row in rows] == [code is not None for code in codes]
    assert edge.answered == ["one", "five", "seven"]
    for number in (2, 3, 4, 6):
        assert f"line {number}: " in result.stderr
    assert "secret" not in result.output + out.read_text()


def test_json_lines_with_a_field(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """--field takes one member of each object; lines without it are refused by number."""
    file = texts_file(tmp_path, ['{"id":1,"body":"a"}', '{"body":2}', "[]", "{", '{"body":"\\n"}', '{"body":""}'])
    out = tmp_path / "out.jsonl"
    assert embed(file, "-o", out, "--field", "body").exit_code == 1
    codes = [row.get("error", {}).get("code") for row in rows_of(out)]  # type: ignore[attr-defined]
    assert codes == [None, "missing_field", "missing_field", "invalid_json", None, "empty_input"]
    assert edge.answered == ["a", "\n"]


@pytest.mark.parametrize(
    "answers",
    [
        [failure(429, "rate_limit_exceeded", retry_after_ms="1")],
        [failure(503, "overloaded", Retry_After="0"), failure(502, "bad_node_response", retry_after_ms="0")],
        [web.Response(status=504, text="<html>a proxy</html>", headers={"Retry-After": "0"})],
    ],
)
def test_it_asks_again_when_told_to_wait(edge: Edge, embed: Embed, tmp_path: Path, answers: list[web.Response]) -> None:
    """After 429 and 5xx the same request is sent again, and says how often it was sent before."""
    edge.script = lambda asked: answers[asked.number] if asked.number < len(answers) else None
    out = tmp_path / "out.jsonl"
    result = embed(texts_file(tmp_path, TEXTS[:3]), "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("; trying again") == 1, "one line, however many attempts"
    assert_rows(rows_of(out), TEXTS[:3])
    assert len(edge.asked) == len(answers) + 1
    assert [asked.headers["x-stainless-retry-count"] for asked in edge.asked] == list(map(str, range(len(edge.asked))))
    assert edge.answered == TEXTS[:3]


def test_a_request_with_too_many_tokens_is_split(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """What the endpoint takes only in smaller pieces is sent in smaller pieces."""

    def at_most_three(asked: Asked) -> web.Response | None:
        return failure(400, "max_tokens_per_request", param="input") if len(asked.texts) > 3 else None

    edge.script = at_most_three
    out = tmp_path / "out.jsonl"
    assert embed(texts_file(tmp_path, TEXTS), "-o", out).exit_code == 0
    assert_rows(rows_of(out), TEXTS)


@pytest.mark.parametrize(
    "refusal",
    [
        failure(400, "max_tokens_per_request", param="input"),
        failure(400, "too_many_inputs", param="input"),
        failure(413, "body_too_large"),
        failure(413, "http_413"),
        failure(504, "deadline_exceeded", "Send fewer or shorter inputs."),
    ],
    ids=lambda refusal: f"{refusal.status} {refusal.text[:60]}",
)
def test_what_is_too_much_is_not_sent_again(edge: Edge, embed: Embed, tmp_path: Path, refusal: web.Response) -> None:
    """After a refusal all later requests are smaller: four are under way at the first one, and then a few halves."""
    edge.script = lambda asked: refusal if len(asked.texts) > 5 else None
    out = tmp_path / "out.jsonl"
    texts = [f"text {number:04}" for number in range(400)]
    assert embed(texts_file(tmp_path, texts), "-o", out, "--batch", 16).exit_code == 0
    assert_rows(rows_of(out), texts)
    refused = [asked.number for asked in edge.asked if len(asked.texts) > 5]
    assert len(refused) <= 16 and max(refused) < 32


STOPS = [
    failure(401, "invalid_api_key", "The key is not good."),
    failure(404, "model_not_found", "No such model.", "model"),
    failure(429, "insufficient_quota", "Not enough money."),
    failure(400, "invalid_value", "dimensions: too many", "dimensions"),
    failure(503, "overloaded", x_should_retry="false"),
    web.Response(status=302, headers={"Location": "http://127.0.0.1:9/"}),
    web.Response(text="not JSON"),
    web.json_response({"object": "list", "data": [], "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".npy"])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_stopped_run_goes_on_where_it_was(edge: Edge, embed: Embed, tmp_path: Path, suffix: str, stop: int) -> None:
    """Out of money after some batches: exit 3, a hint, and the next run asks only for what is missing."""
    file = texts_file(tmp_path, ["", *TEXTS])
    out = tmp_path / ("out" + suffix)
    from_here = set(TEXTS[5 * stop - 1 :])
    # By the request, not by the time: what the first run had in flight may arrive when it has ended.
    edge.script = lambda asked: STOPS[2] if len(asked.texts) <= 5 and from_here & set(asked.texts) else None
    result = embed(file, "-o", out, "--batch", 5)
    assert result.exit_code == 3
    assert f"Run the same command again to continue at line {5 * stop + 1}." in result.stderr
    written = out if suffix == ".jsonl" else tmp_path / "out.npy.part"
    with written.open("ab") as rows:  # what a crash in the middle of a write leaves
        rows.write(b'{"index":10,"embe')
    result = embed(file, "-o", out, "--batch", 100)
    assert result.exit_code == 1  # the first line, of the run before, is empty
    assert sorted(edge.answered) == sorted(TEXTS)  # each once: what was paid for is not asked again
    if suffix == ".jsonl":
        assert [row["embedding"] for row in rows_of(out)[:1]] == [None]
        after_the_first = [{**row, "index": row["index"] - 1} for row in rows_of(out)[1:]]  # type: ignore[operator]
        assert_rows(after_the_first, TEXTS)
    else:
        array = np.load(out)
        assert array.dtype == np.float32 and array.shape == (51, 4)
        assert np.isnan(array[0]).all()
        assert np.array_equal(array[1:], np.stack([vector_of(text) for text in TEXTS]))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "texts.txt", out.name, out.name + ".state"}


@pytest.mark.parametrize("answer", STOPS, ids=lambda answer: str(answer.status))
def test_what_no_repetition_mends_stops_the_run(edge: Edge, embed: Embed, tmp_path: Path, answer: web.Response) -> None:
    """One request, one line that says why, and nothing left behind: exit 2 where an option must change, else 3."""
    edge.script = lambda asked: answer
    for name in ("out.jsonl", "out.npy"):
        edge.asked.clear()
        result = embed(texts_file(tmp_path, TEXTS[:2]), "-o", tmp_path / name)
        assert result.exit_code == (2 if answer.status in (400, 404) else 3)
        assert len(edge.asked) == 1
        assert result.stderr.startswith("embedmesh: The endpoint")
        assert ". (" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data", "texts.txt"}


def test_a_refusal_names_the_option_to_change(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """The API speaks of members; the person at the terminal has options."""
    file = texts_file(tmp_path, ["a", "b"])
    edge.script = lambda asked: STOPS[3]
    assert "(invalid_value). Change --dimensions." in embed(file).stderr
    edge.script = lambda asked: STOPS[1]
    assert "No such model (model_not_found). Change --model." in embed(file).stderr
    too_long = failure(400, "context_length_exceeded", 'Shorten it, or send "truncate": "end".', "input.0")
    edge.script = lambda asked: too_long if "a" in asked.texts else None
    assert "(context_length_exceeded; here: --truncate end)" in embed(file).stderr


def test_nothing_listens(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection that is refused ends it, naming address and command; nothing is left behind."""
    monkeypatch.setenv("EMBEDMESH_API_KEY", "sk-other")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else takes the port
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        began = time.monotonic()
        result = embed(texts_file(tmp_path, TEXTS), "-o", tmp_path / "o.npy", "--batch", 5, "--url", url)
    assert time.monotonic() - began < 2
    assert result.exit_code == 78
    assert result.stderr == f"embedmesh: nothing listens at {url}; start it with: embedmesh serve\n"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "texts.txt"}


@pytest.mark.parametrize("name", ["o.jsonl", "o.ndjson", "o.npy"])
def test_a_finished_run_is_not_done_again(edge: Edge, embed: Embed, tmp_path: Path, name: str) -> None:
    """The same command says that all is done and asks for nothing; what is not the same is refused."""
    file, out = texts_file(tmp_path, TEXTS[:9]), tmp_path / name
    assert embed(file, "-o", out).exit_code == 0
    asked, before = len(edge.asked), out.read_bytes()
    again = embed(file, "-o", out)
    assert (again.exit_code, again.stderr) == (0, "already complete: 9 lines\n")
    assert json.loads(embed(file, "-o", out, "--json").stdout)["lines_before"] == 9
    other = embed(file, "-o", out, "--model", "other")
    assert other.exit_code == 2 and "begun with another model" in other.stderr
    assert (len(edge.asked), out.read_bytes()) == (asked, before)
    out.write_bytes(before[:-1])
    changed = embed(file, "-o", out)
    assert changed.exit_code == 2 and "was changed after it was complete" in changed.stderr
    out.unlink()
    assert embed(file, "-o", out, "--model", "other").exit_code == 0  # it was removed: a new one is made


def test_an_output_of_unknown_origin_is_not_touched(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """A file that some other program made stays as it is, as does one that a wrong option was to overwrite."""
    file, out = texts_file(tmp_path, TEXTS[:3]), tmp_path / "o.jsonl"
    out.write_text("precious\n")
    refused = embed(file, "-o", out)
    assert refused.exit_code == 2 and "it is not known which run made it" in refused.stderr
    edge.script = lambda asked: STOPS[3]
    assert embed(file, "-o", out, "--overwrite").exit_code == 2
    assert out.read_text() == "precious\n"


@pytest.mark.parametrize("name", ["o.orc", "o", "o.json"])
def test_an_unknown_kind_of_output(edge: Edge, embed: Embed, tmp_path: Path, name: str) -> None:
    """Refused before anything is asked, naming those that are known."""
    result = embed(texts_file(tmp_path, TEXTS), "-o", tmp_path / name)
    assert result.exit_code == 2 and ".jsonl, .ndjson, .npy, .csv, .tsv, .parquet" in result.stderr
    assert not edge.asked


def test_vectors_of_another_width_or_not_finite_stop_the_run(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """A wrong vector is never written."""
    for vector in (np.array([np.nan, 1], "<f4"), np.array([], "<f4")):
        raw = embeddings(Asked(0, {}, {"model": "m", "input": ["x"]}))
        assert isinstance(raw.body, bytes)
        body = json.loads(raw.body)
        body["data"][0]["embedding"] = base64.b64encode(vector.tobytes()).decode()
        edge.script = lambda asked, body=body: web.json_response(body)  # type: ignore[misc]
        out = tmp_path / f"{len(vector)}.jsonl"
        assert embed(texts_file(tmp_path, ["x"]), "-o", out).exit_code == 3
        assert not out.exists()


@pytest.mark.parametrize(
    "change, says",
    [
        (["--model", "other"], "begun with another model"),
        (["--truncate", "end"], "begun with another truncate"),
        (["--field", "x", "--dimensions", "2"], "begun with another"),
    ],
)
def test_it_does_not_go_on_with_other_settings(
    edge: Edge, embed: Embed, tmp_path: Path, change: list[str], says: str
) -> None:
    """Rows of two models in one file would be worse than no file."""
    file, out = texts_file(tmp_path, TEXTS), tmp_path / "out.jsonl"
    edge.script = lambda asked: None if TEXTS[0] in asked.texts else STOPS[2]
    assert embed(file, "-o", out, "--batch", 10).exit_code == 3
    before = out.read_bytes()
    result = embed(file, "-o", out, *change)
    assert result.exit_code == 2 and says in result.stderr
    assert out.read_bytes() == before


def test_it_does_not_go_on_with_another_input(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """Another beginning or a shorter input is refused; more lines at the end are welcome; --overwrite begins anew."""
    out = tmp_path / "out.jsonl"
    edge.script = lambda asked: None if TEXTS[0] in asked.texts else STOPS[2]
    assert embed(texts_file(tmp_path, TEXTS[:20]), "-o", out, "--batch", 10).exit_code == 3
    edge.script = lambda asked: None
    for other in (["changed", *TEXTS[1:]], TEXTS[:5]):
        result = embed(texts_file(tmp_path, other), "-o", out)
        assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert embed(texts_file(tmp_path, TEXTS), "-o", out).exit_code == 0
    assert_rows(rows_of(out), TEXTS)
    result = embed(texts_file(tmp_path, TEXTS[:2]), "-o", out)
    assert result.exit_code == 2 and "lines of another input" in result.stderr
    assert embed(texts_file(tmp_path, TEXTS[:2]), "-o", out, "--overwrite").exit_code == 0
    assert_rows(rows_of(out), TEXTS[:2])


def test_the_summary_as_json(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """--json puts one object on stdout, with what it cost."""
    result = embed(texts_file(tmp_path, ["a", "", "b"]), "-o", tmp_path / "o.npy", "--json")
    said = json.loads(result.stdout)
    assert said.pop("seconds") > 0
    assert said == {
        "ended": "finished",
        "output": str(tmp_path / "o.npy"),
        "lines_before": 0,
        "refused_before": 0,
        "lines": 3,
        "embedded": 2,
        "refused": 1,
        "refusals": [{"line": 2, "code": "empty_input", "message": "there is no text to embed"}],
        "tokens": 6,
        "cost_nanousd": 6,
    }


def test_an_array_that_begins_with_refused_lines(edge: Edge, embed: Embed, tmp_path: Path) -> None:
    """Rows of NaN wait until a first vector says how wide they are, over a stop as well; then they are all there."""
    out, file = tmp_path / "o.npy", texts_file(tmp_path, ["", "", "", "a", "b"])
    edge.script = lambda asked: STOPS[0]
    assert embed(file, "-o", out, "--batch", 2).exit_code == 3
    edge.script = lambda asked: None
    assert embed(file, "-o", out, "--batch", 2).exit_code == 1
    array = np.load(out)
    assert np.isnan(array[:3]).all()
    assert np.array_equal(array[3:], np.stack([vector_of("a"), vector_of("b")]))


def test_an_empty_input_gives_an_empty_output(embed: Embed, tmp_path: Path) -> None:
    """No lines, no rows, no failure."""
    for name in ("o.jsonl", "o.npy"):
        assert embed(texts_file(tmp_path, []), "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "o.jsonl").read_bytes() == b""
    assert np.load(tmp_path / "o.npy").shape == (0, 0)
