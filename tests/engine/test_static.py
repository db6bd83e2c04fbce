"""Static models give the vectors of the libraries that made them (goldens/make_folders.py), or are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import digest, read_folder
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.errors import SetupError
from tests.engine.test_folder import edit
from tests.engine.tiny import write_json, write_safetensors

GOLDENS = Path(__file__).parent / "goldens" / "folders"
STATIC = ("model2vec", "model2vec_shared_rows", "model2vec_int8", "static_embedding")
WORDS, WIDTH = 32, 8
TABLE = np.ones((WORDS, WIDTH), np.float32)


@pytest.mark.story
@pytest.mark.parametrize("name", STATIC)
def test_vectors_are_the_library_s(name: str) -> None:
    """Alone and beside longer texts, from the text on: special and unknown tokens are as the library has them."""
    expected = json.loads((GOLDENS / name / "expected.json").read_text())
    folder = read_folder(GOLDENS / name)
    tokenizer = ModelTokenizer(GOLDENS / name, folder.max_tokens)
    sequences = [tokenizer.with_specials(ids) for ids in tokenizer.ids(expected["texts"])]
    model = CompiledModel(folder, threads=1)
    together = model.run(sequences, 8, 40)
    alone = np.concatenate([model.run([ids], 1, len(ids)) for ids in sequences])
    assert np.abs(together - np.array(expected["vectors"])).max() <= 1e-6
    assert np.abs(together - alone).max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "normalize", "max_tokens", "drops_unknown"),
    [
        ("model2vec", True, 64, True),
        ("model2vec_shared_rows", False, 64, True),
        ("model2vec_int8", True, 64, True),
        ("static_embedding", True, 8_192, False),
    ],
)
def test_a_static_folder_is_read(name: str, normalize: bool, max_tokens: int, drops_unknown: bool) -> None:
    folder = read_folder(GOLDENS / name)
    assert (folder.source, folder.pooling, folder.width, folder.vocab_size) == ("static", "mean", WIDTH, WORDS)
    assert (folder.normalize, folder.max_tokens, folder.drops_unknown) == (normalize, max_tokens, drops_unknown)


@pytest.mark.parametrize("name", STATIC)
def test_no_special_tokens_are_added(name: str) -> None:
    """And the count is of what is embedded: Model2Vec leaves unknown tokens out, sentence-transformers does not."""
    tokenizer = ModelTokenizer(GOLDENS / name, 64)
    ids = tokenizer.ids(["w1 never w2", "never"])
    assert ids == ([[6, 7], []] if name.startswith("model2vec") else [[6, 1, 7], [1]])
    assert tokenizer.ids(["never w3"]) == ([[8]] if name.startswith("model2vec") else [[1, 8]])
    assert (tokenizer.with_specials([6]), tokenizer.specials, tokenizer.vocab_size) == ([6], 0, WORDS)


@pytest.mark.parametrize(("max_length", "tokens"), [(7, 7), (None, 512), ("null", 8_192)])
def test_how_many_tokens_model2vec_takes(tmp_path: Path, max_length: Any, tokens: int) -> None:
    folder = copy("model2vec", tmp_path)
    edit("config.json", max_length=max_length)(folder)
    if max_length == "null":
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"max_length": None})
    assert read_folder(folder).max_tokens == tokens


def test_model2vec_without_modules_json_is_known_by_its_config(tmp_path: Path) -> None:
    folder = copy("model2vec", tmp_path)
    before = digest(folder)
    (folder / "modules.json").unlink()
    assert read_folder(folder).normalize
    assert digest(folder) != before


def tensors(**tensors: Any) -> Callable[[Path], object]:
    return lambda folder: write_safetensors(folder / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("config.json", normalize=False), "disagree on the normalisation"),
        (edit("config.json", normalize="yes"), "'normalize' = 'yes'"),
        (edit("config.json", max_length=0), "max_length"),
        (tensors(other=TABLE), "no table of vectors"),
        (tensors(embeddings=TABLE[0]), "no table"),
        (tensors(embeddings=TABLE[:0]), "no table"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no table of vectors"),
    ],
)
def test_a_static_folder_that_is_not_understood_is_refused(
    tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    folder = copy("model2vec", tmp_path)
    change(folder)
    with pytest.raises(SetupError) as refused:
        read_folder(folder)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (tensors(embeddings=TABLE, mapping=np.full(WORDS, WORDS)), "outside of its table"),
        (tensors(embeddings=TABLE, mapping=np.full(WORDS, -1)), "outside of its table"),
        (tensors(embeddings=TABLE, mapping=TABLE.astype(np.int64)), "outside of its table"),
        (tensors(embeddings=TABLE, mapping=np.zeros((), np.int64)), "outside of its table"),
        (tensors(embeddings=TABLE, mapping=TABLE[:, 0]), "as F32, and only I64"),
        (tensors(embeddings=TABLE, weights=TABLE[0]), "shape"),
        (tensors(embeddings=TABLE.astype(np.float64)), "as F64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[Path], object], says: str) -> None:
    folder = copy("model2vec", tmp_path)
    change(folder)
    with pytest.raises(SetupError) as refused:
        CompiledModel(read_folder(folder), threads=1)
    assert says in str(refused.value)


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / name, tmp_path / name))
