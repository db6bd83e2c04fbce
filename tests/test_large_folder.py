"""The folders of large models' size are whole ones, whatever their size: here they are small."""

from pathlib import Path

import pytest

from bench.engine.large_folder import MODELS, find_or_make, make_folder
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.engine.tokens import ModelTokenizer

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 2_000,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_served_like_any_other(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    path = make_folder(model._replace(config=model.config | SMALL), tmp_path / name)
    folder = read_folder(path)
    assert (folder.max_tokens, folder.width, folder.pooling) == (model.max_tokens, 32, model.pooling)
    tokenizer = ModelTokenizer(path, folder.max_tokens)
    assert tokenizer.vocab_size == SMALL["vocab_size"]
    ids = [tokenizer.with_specials(each) for each in tokenizer.ids(["abc is a word", "ab", "x"])]
    vectors = CompiledModel(folder, 1).run(ids, len(ids), 16)
    assert [round(float(vector @ vector), 4) for vector in vectors] == [1.0] * 3
    assert float(vectors[0] @ vectors[1]) < 1


def test_one_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    name = next(iter(MODELS))
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"whole")
    assert find_or_make(name, tmp_path) == tmp_path / name
    assert list((tmp_path / name).iterdir()) == [tmp_path / name / "model.safetensors"]
