"""An .onnx file gives the vectors of what it was exported from (goldens/make_folders.py), or is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import digest, read_folder
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.errors import SetupError
from tests.engine.test_folder import edit
from tests.engine.tiny import make_folder

GOLDEN = Path(__file__).parent / "goldens" / "folders" / "onnx"
FILE, TENSORS = "onnx/model.onnx", "onnx/model.onnx_data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "tiny"))


def respell(folder: Path, old: bytes, new: bytes) -> None:
    """Change a name in the .onnx file; of the same length, so that the file stays whole."""
    assert len(old) == len(new)
    content = (folder / FILE).read_bytes()
    assert old in content
    (folder / FILE).write_bytes(content.replace(old, new))


@pytest.mark.story
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"last_hidden_state", b"last_hidden_state"),
        (b"last_hidden_state", b"some_other_output"),  # the first of three axes
    ],
)
def test_vectors_are_those_of_transformers(folder: Path, old: bytes, new: bytes) -> None:
    """Alone and in a padded batch of mixed lengths."""
    respell(folder, old, new)
    expected = json.loads((folder / "expected.json").read_text())
    tokenizer = ModelTokenizer(folder, 40)
    sequences = [tokenizer.with_specials(ids) for ids in tokenizer.ids(expected["texts"])]
    model = CompiledModel(read_folder(folder), threads=1)
    together = model.run(sequences, 8, 40)
    alone = np.concatenate([model.run([ids], 1, len(ids)) for ids in sequences])
    assert np.abs(together - np.array(expected["vectors"])).max() <= 1e-6
    assert np.abs(together - alone).max() <= 1e-6


def test_the_file_may_lie_beside_the_config(folder: Path) -> None:
    for name in (FILE, TENSORS):
        (folder / name).rename(folder / Path(name).name)
    assert read_folder(folder).source == "onnx"


def test_weights_of_a_known_architecture_are_preferred(tmp_path: Path) -> None:
    """Where they are missing, the .onnx file takes their place."""
    folder = make_folder(tmp_path / "bert")
    (folder / "model.onnx").write_bytes((GOLDEN / FILE).read_bytes())
    assert read_folder(folder).source == "safetensors"
    (folder / "model.safetensors").unlink()
    assert read_folder(folder).source == "onnx"


def test_positions_of_an_unknown_architecture_are_no_promise(folder: Path) -> None:
    """They bound what the tokenizer says, and do not stand for it."""
    edit("config.json", model_type="unheard-of")(folder)
    assert read_folder(folder).max_tokens == 40
    edit("tokenizer_config.json", model_max_length=512)(folder)
    assert read_folder(folder).max_tokens == 40
    edit("tokenizer_config.json", model_max_length=39)(folder)
    assert read_folder(folder).max_tokens == 39
    edit("tokenizer_config.json", model_max_length=10**30)(folder)
    with pytest.raises(SetupError, match="how many tokens"):
        read_folder(folder)


@pytest.mark.parametrize("name", [FILE, TENSORS])
def test_the_digest_covers_the_file_and_its_tensors(folder: Path, name: str) -> None:
    before = digest(folder)
    with (folder / name).open("ab") as file:
        file.write(b"\0")
    assert digest(folder) != before


@pytest.mark.parametrize("name", [b"../ab.onnx_data", b"/etc/os-release", b"other.onnx_data"])
def test_tensors_that_are_not_beside_it_are_refused(folder: Path, name: bytes) -> None:
    respell(folder, b"model.onnx_data", name)
    with pytest.raises(SetupError, match="no file beside it"):
        digest(folder)


@pytest.mark.story
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"token_type_ids", b"other_type_ids", "the input 'other_type_ids'"),
        (b"attention_mask", b"token_type_idx", "the input 'token_type_idx'"),
        (b"Transpose", b"Transpoze", "OpenVINO cannot read model.onnx"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(folder: Path, old: bytes, new: bytes, says: str) -> None:
    respell(folder, old, new)
    with pytest.raises(SetupError) as refused:
        CompiledModel(read_folder(folder), threads=1)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.story
def test_a_file_of_another_width_is_refused(folder: Path) -> None:
    edit("config.json", hidden_size=24)(folder)
    edit("1_Pooling/config.json", embedding_dimension=24)(folder)
    with pytest.raises(SetupError, match=r"gives 16 components a token, and config\.json says 24"):
        CompiledModel(read_folder(folder), threads=1)


@pytest.mark.story
def test_what_is_no_onnx_is_refused(folder: Path) -> None:
    (folder / FILE).write_bytes(b"\x7fELF" * 100)
    with pytest.raises(SetupError, match="OpenVINO cannot read") as refused:
        CompiledModel(read_folder(folder), threads=1)
    assert "\n" not in str(refused.value)
