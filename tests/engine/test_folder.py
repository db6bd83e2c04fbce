"""What a model folder says is understood or refused by name, in one line."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.engine.folder import digest, read_folder
from embedmesh.engine.layout import ARCHITECTURES
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.errors import SetupError
from tests.data import quick_or
from tests.engine.tiny import CONFIG, POOLING_FLAGS, add_module, make_folder, write_json, write_safetensors

Change = Callable[[Path], object]


def edit(name: str, **members: Any) -> Change:
    """Set members of a JSON object; None takes one out."""

    def change(folder: Path) -> None:
        file = folder / name
        value = json.loads(file.read_text()) | members
        write_json(file, {key: member for key, member in value.items() if member is not None})

    return change


def modules(*types: str) -> Change:
    listed = [{"type": one, "path": "1_Pooling" if number else ""} for number, one in enumerate(types)]
    return lambda folder: write_json(folder / "modules.json", listed)


def sentences(**members: Any) -> Change:
    return lambda folder: write_json(folder / "config_sentence_transformers.json", members)


def dense(**members: Any) -> Change:
    """A dense layer behind the pooling whose config is right but for `members`."""
    right = {"in_features": 16, "out_features": 8, "bias": True, "activation_function": TANH}

    def change(folder: Path) -> None:
        without_normalize(folder)
        config = {key: value for key, value in (right | members).items() if value is not None}
        add_module(folder, "Dense", config)

    return change


def without_normalize(folder: Path) -> None:
    write_json(folder / "modules.json", json.loads((folder / "modules.json").read_text())[:2])


def kwargs_in_modules(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", [{**listed[0], "kwargs": ["task"]}, *listed[1:]])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_length(folder: Path) -> None:
    (folder / "sentence_bert_config.json").unlink()
    edit("config.json", max_position_embeddings=None)(folder)


ST = "sentence_transformers.models."
TANH = "torch.nn.modules.activation.Tanh"


def test_without_weights_a_folder_counts_and_is_not_served(tmp_path: Path) -> None:
    """A gateway needs a model's tokenizer only; a worker starts with the digest, which asks for the weights."""
    folder = make_folder(tmp_path / "tiny")
    pickled(folder)
    assert ModelTokenizer(folder, read_folder(folder).max_tokens).ids(["w1"]) == [[5]]
    with pytest.raises(SetupError, match=r"no weights that are read.*Pickled weights must be converted"):
        digest(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "tiny/config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda folder: (folder / "config.json").write_bytes(b" " * 2_000_000), "larger than"),
        (edit("config.json", model_type=None), "model_type"),
        (edit("config.json", hidden_size=True), "hidden_size of config.json"),
        (edit("sentence_bert_config.json", max_seq_length="64"), "max_seq_length of sentence_bert_config.json"),
        (lambda folder: (folder / "modules.json").unlink(), "has no modules.json"),
        (modules(ST + "Transformer", ST + "Pooling", ST + "LSTM"), "Transformer + Pooling + LSTM"),
        (modules(ST + "Transformer", ST + "Pooling", ST + "Normalize", ST + "Dense"), "Normalize + Dense"),
        (modules(ST + "StaticEmbedding", ST + "Pooling"), "no table of vectors"),
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
        (edit("1_Pooling/config.json", pooling_mode_max_tokens=True), "its pooling is mean + max"),
        (edit("1_Pooling/config.json", pooling_mode=["mean", "cls"]), "its pooling is mean + cls"),
        (edit("1_Pooling/config.json", pooling_mode="mean_sqrt_len_tokens"), "its pooling is mean_sqrt_len_tokens"),
        (edit("1_Pooling/config.json", pooling_mode=3), "its pooling is 3"),
        (
            edit("1_Pooling/config.json", embedding_dimension=15),
            "embedding_dimension of 1_Pooling/config.json is not the 16",
        ),
        (edit("1_Pooling/config.json", pooling_mode_mean_tokens=False), "pooling is none"),
        (edit("1_Pooling/config.json", pooling_mode_new=True), "pooling_mode_new"),
        (edit("1_Pooling/config.json", include_prompt=False), "leaves the prompt out"),
        (edit("sentence_bert_config.json", do_lower_case="yes"), "'do_lower_case' = 'yes'"),
        (edit("sentence_bert_config.json", model_args={"torch_dtype": "float16"}), "'model_args'"),
        (edit("sentence_bert_config.json", transformer_task="fill-mask"), "'transformer_task' = 'fill-mask'"),
        (edit("sentence_bert_config.json", module_output_name="sentence_embedding"), "'module_output_name'"),
        (edit("sentence_bert_config.json", surprise=1), "'surprise'"),
        (sentences(default_prompt_name="query"), "'default_prompt_name' = 'query'"),
        (sentences(truncate_dim=8), "'truncate_dim' = 8"),
        (sentences(model_type="SparseEncoder"), "'SparseEncoder'"),
        (sentences(surprise=1), "'surprise'"),
        (dense(in_features=15), "takes 15 of 16"),
        (dense(out_features=0), "out_features of 2_Dense/config.json"),
        (
            dense(activation_function="torch.nn.modules.activation.SiLU"),
            "2_Dense/config.json has 'activation_function'",
        ),
        (dense(activation_function=None), "activation_function"),
        (dense(use_residual=True), "'use_residual' = True"),
        (dense(module_input_name="token_embeddings"), "'module_input_name'"),
        (dense(surprise=1), "'surprise'"),
        (kwargs_in_modules, "arguments of its own"),
        (lambda folder: write_json(folder / "modules.json", [{}] * 17), "17 modules"),
        (edit("config.json", model_type="deberta-v2"), "'deberta-v2' is not supported without a model.onnx"),
        (no_length, "how many tokens"),
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


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 600) | st.just(10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    *(("config.json", name) for name in ("model_type", "hidden_size", "vocab_size", "max_position_embeddings")),
    *(("config.json", name) for name in ("pad_token_id", "dim", "n_positions")),
    *(("1_Pooling/config.json", name) for name in ("pooling_mode", "pooling_mode_mean_tokens", "embedding_dimension")),
    *(("2_Dense/config.json", name) for name in ("in_features", "out_features", "bias", "activation_function")),
    *(("sentence_bert_config.json", name) for name in ("max_seq_length", "do_lower_case", "modality_config")),
    *(("tokenizer_config.json", name) for name in ("model_max_length", "do_lower_case")),
    *(("config_sentence_transformers.json", name) for name in ("prompts", "truncate_dim", "model_type")),
]


def test_whatever_stands_in_a_member_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    dense()(folder)
    for name in ("tokenizer_config.json", "config_sentence_transformers.json"):
        write_json(folder / name, {})
    right = {file: json.loads((folder / file).read_text()) for file, _ in PLACES}

    @settings(max_examples=quick_or(200, quick=60), deadline=None)
    @given(place=st.sampled_from(PLACES), value=ANYTHING, model_type=st.sampled_from([*ARCHITECTURES, "model2vec"]))
    def read_with(place: tuple[str, str], value: Any, model_type: str) -> None:
        write_json(folder / "config.json", right["config.json"] | {"model_type": model_type, "dim": 16})
        content = json.loads((folder / place[0]).read_text()) | {place[1]: value}
        write_json(folder / place[0], content)
        try:
            read = read_folder(folder)
            assert min(read.width, read.max_tokens, read.vocab_size) > 0
            digest(folder)
        except SetupError as refused:
            assert "\n" not in str(refused)
        finally:
            write_json(folder / place[0], right[place[0]])

    read_with()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLING_FLAGS)
def test_a_folder_is_read(tmp_path: Path, pooling: str, normalize: bool) -> None:
    folder = read_folder(make_folder(tmp_path / "tiny", pooling=pooling, normalize=normalize))
    assert (folder.pooling, folder.normalize, folder.width, folder.max_tokens) == (pooling, normalize, 16, 48)
    assert (folder.source, folder.vocab_size, folder.transformer) == ("safetensors", CONFIG["vocab_size"], folder.path)


def test_the_newest_spelling_is_read(tmp_path: Path) -> None:
    """As sentence-transformers 6 saves a model: other types, one pooling mode, and the length in the tokenizer."""
    folder = make_folder(tmp_path / "tiny")
    package = "sentence_transformers.base.modules"
    types = [
        f"{package}.transformer.Transformer",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        f"{package}.dense.Dense",
        f"{package}.normalize.Normalize",
    ]
    names = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    listed = [{"idx": n, "name": str(n), "path": names[n], "type": kind} for n, kind in enumerate(types)]
    write_json(folder / "modules.json", listed)
    pooling = {"embedding_dimension": 16, "pooling_mode": "weightedmean", "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    where = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    identity = {"in_features": 16, "out_features": 8, "activation_function": "torch.nn.modules.linear.Identity"}
    for name, config in (("2_Dense", {**identity, "bias": False, **where}), ("3_Normalize", where)):
        (folder / name).mkdir()
        write_json(folder / name / "config.json", config)
    sentence = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    }
    write_json(folder / "sentence_bert_config.json", sentence)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 40})
    sentences(
        __version__={"sentence_transformers": "6.2.0"},
        model_type="SentenceTransformer",
        default_prompt_name=None,
        prompts={"query": "", "document": ""},
        similarity_fn_name="cosine",
    )(folder)
    read = read_folder(folder)
    assert (read.pooling, read.normalize, read.width, read.max_tokens) == ("weighted_mean", True, 8, 40)
    assert [(layer.inputs, layer.outputs, layer.activation, layer.bias) for layer in read.dense] == [
        (16, 8, "identity", False)
    ]


def test_a_transformer_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    """Then config, tokenizer and weights are looked for there only, and count for the digest."""
    folder = make_folder(tmp_path / "tiny")
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "sentence_bert_config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).rename(folder / "0_Transformer" / name)
    listed = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", [{**listed[0], "path": "0_Transformer"}, *listed[1:]])
    read = read_folder(folder)
    assert (read.transformer, read.max_tokens) == (folder / "0_Transformer", 48)
    digests = {digest(folder)}
    for file in sorted((folder / "0_Transformer").iterdir()):
        with file.open("a") as stream:
            stream.write(" ")
        digests.add(digest(folder))
    assert len(digests) == 5


NAMELESS = 1_000_000_000_000_000_019_884_624_838_656  # what transformers writes for "no limit"


@pytest.mark.parametrize(
    ("config", "tokenizer", "sentence", "tokens"),
    [
        ({}, None, {"max_seq_length": 48}, 48),
        ({}, 40, {"max_seq_length": 48}, 48),
        ({}, None, {"max_seq_length": None}, 64),
        ({}, None, None, 64),
        ({}, 40, None, 40),
        ({}, 512, None, 64),
        ({}, NAMELESS, None, 64),
        ({}, 1e30, None, 64),
        ({"max_position_embeddings": None}, 40, None, 40),
        ({"model_type": "roberta"}, None, None, 62),
        ({"model_type": "xlm-roberta", "pad_token_id": 1}, 512, None, 62),
        ({"model_type": "roberta", "pad_token_id": 0}, None, None, 63),
        ({"model_type": "mpnet"}, None, {"max_seq_length": 62}, 62),
        ({"model_type": "mpnet"}, None, {"max_seq_length": 63}, 62),
        ({"model_type": "roberta", "pad_token_id": 0}, None, {"max_seq_length": 512}, 63),
        ({}, 512, {"max_seq_length": 100_000}, 64),
        ({"model_type": "distilbert", "dim": 16, "hidden_size": None}, None, None, 64),
        ({"model_type": "nomic_bert", "n_embd": 16, "hidden_size": None, "n_positions": 99}, None, None, 99),
        ({"model_type": "nomic_bert"}, None, None, 64),
    ],
)
def test_how_many_tokens(tmp_path: Path, config: Any, tokenizer: Any, sentence: Any, tokens: int) -> None:
    """max_seq_length says it, else the tokenizer's length; at most the positions that the architecture leaves."""
    folder = make_folder(tmp_path / "tiny")
    edit("config.json", **config)(folder)
    (folder / "sentence_bert_config.json").unlink()
    if sentence is not None:
        write_json(folder / "sentence_bert_config.json", sentence)
    if tokenizer is not None:
        write_json(folder / "tokenizer_config.json", {"model_max_length": tokenizer})
    assert read_folder(folder).max_tokens == tokens


@pytest.mark.parametrize("name", ["sentence_roberta_config.json", "sentence_xlnet_config.json"])
def test_the_sentence_config_may_have_an_old_name(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "tiny", max_seq_length=31)
    before = digest(folder)
    (folder / "sentence_bert_config.json").rename(folder / name)
    assert read_folder(folder).max_tokens == 31
    assert digest(folder) != before


@pytest.mark.parametrize(
    ("prompts", "document"),
    [
        ({"query": "q: ", "document": "d: ", "passage": "p: "}, "d: "),
        ({"query": "q: ", "passage": "p: "}, "p: "),
        ({"corpus": "c: "}, "c: "),
        ({"query": "q: "}, None),
    ],
)
def test_the_document_s_prompt_has_three_names(tmp_path: Path, prompts: dict[str, str], document: str | None) -> None:
    folder = make_folder(tmp_path / "tiny")
    sentences(prompts=prompts)(folder)
    read = read_folder(folder).prompts
    assert read.get("document") == document
    assert read.get("query") == prompts.get("query")


def test_a_dense_layer_decides_the_width(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny", normalize=False)
    dense()(folder)
    before = digest(folder)
    write_safetensors(folder / "2_Dense" / "model.safetensors", {"linear.bias": np.zeros(8, np.float32)})
    assert read_folder(folder).width == 8
    assert digest(folder) != before


def test_every_architecture_that_is_built_is_read() -> None:
    from embedmesh.engine.models import BUILDERS

    assert set(ARCHITECTURES) == set(BUILDERS)


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


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "int8.json", "config_sentence_transformers.json"])
def test_the_digest_changes_when_a_deciding_file_appears(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "tiny")
    before = digest(folder)
    (folder / name).write_text("{}")
    assert digest(folder) != before


def test_an_onnx_file_that_is_not_used_is_not_hashed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    before = digest(folder)
    (folder / "model.onnx").write_bytes(b"not in use")
    assert digest(folder) == before
