"""`embedmesh models`: quantize leaves the model alone and makes all or nothing; fetch says what it may not do."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from embedmesh.catalogue import parse_catalogue
from embedmesh.commands.checks import check_catalogue
from embedmesh.commands.models import models
from embedmesh.engine.folder import digest
from embedmesh.engine.precision import tiers_here
from embedmesh.gateway.models import load_models
from embedmesh.rules.errors import SetupError
from tests.engine.test_rerankers import GOLDENS
from tests.engine.tiny import make_folder

TEXTS = "".join(f"w{n % 50} w{n * 7 % 50} w{n * 3 % 50}\n\n" for n in range(120))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(models, [str(argument) for argument in arguments])


def test_inspect_says_what_a_model_will_take_in_words_that_a_catalogue_skips(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    text = run("inspect", folder).stdout
    assert "# estimated, here, in the tier exact: 0." in text
    assert "tokens a second, in texts of 48, on" in text
    twice = text + text.replace('"tiny"', '"other"', 1)  # appended, as people do
    assert len(parse_catalogue("[defaults]\nprice = 1\n" + twice, name="m.toml", base=tmp_path).written) == 2
    said = json.loads(run("inspect", folder, "--json").stdout)["estimate"]
    assert said["memory_bytes"] > said["loading_bytes"] > 100e6
    assert said["tokens_per_s"] > 1_000 * said["cores"]


def test_a_reranker_s_entry_has_what_a_reranker_has(tmp_path: Path) -> None:
    """It loads as it is printed, is listed and checked; int8 is refused with the reason."""
    file = tmp_path / "models.toml"
    file.write_text(run("inspect", GOLDENS / "bert").stdout.replace("# or search_price", "search_price"))
    model = parse_catalogue(file.read_text(), name="m.toml", base=tmp_path).written[0]
    assert (model.reranks, model.scores, model.width, model.max_tokens) == (True, "raw", 1, 40)
    assert (model.digest, model.price, model.search_price) == (digest(GOLDENS / "bert"), 0, 100_000)
    said = json.loads(run("inspect", GOLDENS / "gte", "--json").stdout)
    assert said["modalities"] == ["rerank"]
    assert not {"width", "token_ids", "prompts"} & set(said)
    listed = run("list", "--catalogue", file).stdout
    assert "reranks, scores raw, at most 40 tokens, $0.0001 a search" in listed
    [told] = json.loads(run("list", "--catalogue", file, "--json").stdout)
    assert [told[name] for name in ("modalities", "width", "scores", "search_price_nanousd")] == [
        ["rerank"], 0, "raw", 100_000
    ]  # fmt: skip
    assert run("check", "--catalogue", file).stdout == "bert: ok\n"
    refused = run("quantize", GOLDENS / "bert", "-o", tmp_path / "int8").exception
    assert "bert reranks, and int8 is made and judged for models that make vectors" in str(refused)


def test_a_catalogue_that_says_another_thing_than_a_folder_is_refused_everywhere(tmp_path: Path) -> None:
    """Else a forgotten `scores` gives every caller the other kind. The node is in tests/node/test_reranking.py."""
    reranker, tiny = run("inspect", GOLDENS / "bert").stdout, run("inspect", make_folder(tmp_path / "tiny")).stdout
    reranks = 'modalities = ["rerank"]'
    raw = "its folder has scores of the kind raw. Mend the catalogue."
    file = tmp_path / "models.toml"
    for entry, says in (
        (reranker.replace('scores = "raw"', ""), f"By the catalogue bert has scores of the kind sigmoid; {raw}"),
        (
            reranker.replace('scores = "raw"', "").replace(reranks, "width = 1"),
            f"By the catalogue bert makes vectors; {raw}",
        ),
        (tiny.replace("width = 16", reranks), "By the catalogue tiny has scores of the kind sigmoid; its folder makes"),
    ):
        file.write_text("[defaults]\nprice = 1\n" + entry)
        checked = run("check", "--catalogue", file)
        assert (checked.exit_code, says in checked.stdout) == (1, True), checked.stdout
        examined = check_catalogue(file)[1]
        assert (examined.state, says in examined.found) == ("fail", True)
        with pytest.raises(SetupError) as refused:
            load_models(file)
        assert says in str(refused.value)
    file.write_text("[defaults]\nprice = 1\n" + reranker + tiny)
    assert set(load_models(file).tokenizers) >= {"bert", "tiny"}


@pytest.mark.story
@pytest.mark.skipif("int8" not in tiers_here(), reason="this CPU has no 8-bit integer instructions")
def test_quantize_makes_a_folder_beside_the_model(tmp_path: Path) -> None:
    """Its entry loads as the same id's int8 tier; the model's own folder is as it was."""
    folder, text = make_folder(tmp_path / "tiny"), tmp_path / "ours.txt"
    text.write_text(TEXTS)
    before = digest(folder)
    done = run("quantize", folder, "--text", text, "--rest", "float32", "--overlap-min", 80)
    assert done.exit_code == 0, done.output
    assert "top-10 overlap" in done.stderr
    made = tmp_path / "tiny-int8"
    said = json.loads((made / "int8.json").read_text())
    assert (said["quality"]["texts"], said["rest"]) == (60, "float32")
    assert (digest(folder), (folder / "int8.json").exists()) == (before, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.txt", "tiny", "tiny-int8"]

    exact = run("inspect", folder).stdout
    catalogue = parse_catalogue("[defaults]\nprice = 1\n" + exact + done.stdout, name="m.toml", base=tmp_path)
    small = catalogue.find("tiny:int8")
    assert small is not None
    assert (small.folder, small.digest, small.tier) == (str(made), digest(made), "int8")

    again = run("quantize", folder, "--text", text)
    assert isinstance(again.exception, SetupError)
    assert "is there already" in str(again.exception)


@pytest.mark.story
def test_quantize_leaves_nothing_where_it_cannot(tmp_path: Path) -> None:
    """Here: too little text to measure with."""
    folder, text = make_folder(tmp_path / "tiny"), tmp_path / "ours.txt"
    text.write_text("w1\nw2\n")
    done = run("quantize", folder, "--text", text)
    assert isinstance(done.exception, SetupError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.txt", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", "no-such-model"], "neither a model of the catalogue nor a folder"),
        (["fetch", "acme/model", "--offline", "--models-dir", "here"], "offline mode forbids to fetch it"),
        (["fetch", "nowhere", "--models-dir", "here"], "no name of a hub either"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert isinstance(done.exception, SetupError)
    assert says in str(done.exception)


def test_fetch_takes_a_folder_that_is_here(tmp_path: Path) -> None:
    """And prints its entry, prompts and all, as inspect does."""
    make_folder(tmp_path / "acme" / "tiny")
    fetched = run("fetch", "acme/tiny", "--models-dir", tmp_path, "--offline", "--json")
    assert fetched.exit_code == 0, fetched.output
    entry = json.loads(fetched.stdout)
    assert (entry["id"], entry["width"], entry["tier"]) == ("acme/tiny", 16, "exact")
