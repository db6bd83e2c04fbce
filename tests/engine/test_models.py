"""BERT against the textbook in numpy, and every variant that is not known refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.rules.errors import SetupError
from tests.engine.test_folder import edit
from tests.engine.tiny import POISON, make_folder, make_weights, textbook, write_safetensors

pytestmark = pytest.mark.story


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_the_textbook_s(tmp_path: Path, pooling: str, normalize: bool) -> None:
    """Alone, and beside longer texts and padding rows."""
    folder = make_folder(tmp_path / "tiny", pooling=pooling, normalize=normalize)
    model = CompiledModel(read_folder(folder), threads=1)
    dice = np.random.default_rng(7)
    sequences = [[2, *dice.integers(4, POISON, n).tolist(), 3] for n in (0, 1, 2, 5, 17, 38)]
    expected = np.array([textbook(ids, make_weights(), pooling=pooling, normalize=normalize) for ids in sequences])
    together = model.run(sequences, 8, 48)
    alone = np.concatenate([model.run([ids], 1, len(ids)) for ids in sequences])
    assert np.abs(together - expected).max() <= 1e-5
    assert np.abs(together - alone).max() <= 1e-6


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"hidden_act": "mish"}, "'mish'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_hidden_layers": 3}, "no tensor encoder.layer.2"),
        ({"intermediate_size": 25}, "shape"),
        ({"layer_norm_eps": None}, "layer_norm_eps"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"vocab_size": 9}, "word_embeddings"),
    ],
)
def test_a_variant_that_is_not_known_is_refused(tmp_path: Path, members: dict[str, Any], says: str) -> None:
    folder = make_folder(tmp_path / "tiny")
    edit("config.json", **members)(folder)
    with pytest.raises(SetupError) as refused:
        CompiledModel(read_folder(folder), threads=1)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    weights = make_weights()
    del weights["encoder.layer.1.output.dense.bias"]
    write_safetensors(folder / "model.safetensors", weights)
    with pytest.raises(SetupError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        CompiledModel(read_folder(folder), threads=1)
