"""What a model folder says is understood or refused by name, in one line."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedmesh.engine.folder import digest, read_folder
from embedmesh.rules.errors import SetupError
from tests.engine.tiny import make_folder, write_json

Change = Callable[[Path], object]


def edit(name: str, **members: Any) -> Change:
    """Set members of a JSON object; None takes one out."""

    def change(folder: Path) -> None:
        file = folder / name
        value = json.loads(file.read_text()) | members
        write_json(file, {key: member for key, member in value.items() if member is not None})

    return change


def modules(*types: str) -> Change:
    return lambda folder: write_json(folder / "modules.json", [{"type": one, "path": "1_Pooling"} for one in types])


ST = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda folder: (folder / "config.json").write_bytes(b" " * 2_000_000), "larger than"),
        (edit("config.json", model_type=None), "model_type"),
        (edit("config.json", hidden_size=True), "hidden_size"),
        (edit("config.json", max_position_embeddings=16), "exceeds its 16 positions"),
        (lambda folder: (folder / "modules.json").unlink(), "modules.json"),
        (modules(ST + "Transformer", ST + "Pooling", ST + "Dense"), "Dense"),
        (modules(ST + "Transformer"), "modules.json lists Transformer,"),
        (modules(), "modules.json lists nothing"),
        (modules("evil.Transformer", ST + "Pooling"), "evil.Transformer"),
        (
            lambda folder: write_json(
                folder / "modules.json",
                [{"type": ST + "Transformer", "path": ""}, {"type": ST + "Pooling", "path": "../other"}],
            ),
            "outside of the folder",
        ),
        (edit("1_Pooling/config.json", pooling_mode_max_tokens=True), "pooling_mode_mean_tokens + pooling_mode_max"),
        (edit("1_Pooling/config.json", pooling_mode_mean_tokens=None, pooling_mode_lasttoken=True), "lasttoken"),
        (edit("1_Pooling/config.json", pooling_mode_mean_tokens=False), "pooling is none"),
        (edit("1_Pooling/config.json", pooling_mode_new=True), "pooling_mode_new"),
        (edit("1_Pooling/config.json", include_prompt=False), "leaves the prompt out"),
        (edit("sentence_bert_config.json", do_lower_case=True), "do_lower_case"),
        (edit("sentence_bert_config.json", model_args={}), "model_args"),
        (
            lambda folder: write_json(folder / "config_sentence_transformers.json", {"default_prompt_name": "query"}),
            "default prompt",
        ),
        (lambda folder: write_json(folder / "config_sentence_transformers.json", {"prompts": {"q": 1}}), "prompts"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused(tmp_path: Path, change: Change, says: str) -> None:
    """The message is one line, names what is wrong, and shows no path."""
    folder = make_folder(tmp_path / "tiny")
    change(folder)
    with pytest.raises(SetupError) as refused:
        read_folder(folder)
    message = str(refused.value)
    assert says in message
    assert "\n" not in message
    assert str(tmp_path) not in message


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("mean", False), ("cls", True), ("cls", False)])
def test_a_folder_is_read(tmp_path: Path, pooling: str, normalize: bool) -> None:
    folder = read_folder(make_folder(tmp_path / "tiny", pooling=pooling, normalize=normalize))
    assert (folder.pooling, folder.normalize, folder.width, folder.max_tokens) == (pooling, normalize, 16, 48)


def test_without_a_sentence_config_the_positions_are_the_limit(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    (folder / "sentence_bert_config.json").unlink()
    assert read_folder(folder).max_tokens == 64


def test_the_digest_is_what_its_docstring_says(tmp_path: Path) -> None:
    """Computed here anew, from the files' names and bytes alone."""
    folder = make_folder(tmp_path / "tiny")
    names = ["config.json", "modules.json", "sentence_bert_config.json", "tokenizer.json", "model.safetensors"]
    lines = [
        f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()} {n}\n" for n in [*names, "1_Pooling/config.json"]
    ]
    assert digest(folder) == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("name", ["config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"])
def test_the_digest_changes_with_each_file(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "tiny")
    before = digest(folder)
    with (folder / name).open("a") as file:
        file.write(" ")
    assert digest(folder) != before


def test_the_digest_ignores_what_decides_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    before = digest(folder)
    (folder / "README.md").write_text("words")
    assert digest(folder) == before
