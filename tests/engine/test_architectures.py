"""Each architecture against what sentence-transformers makes of small random models, and its unknown variants refused.

`goldens/make_architectures.py` made the folders and says what the reference is.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import pytest
from openvino import opset13 as op

from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.engine.models import BUILDERS
from embedmesh.engine.plan import pad_length
from embedmesh.engine.safetensors import Weights
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.errors import SetupError

GOLDENS = Path(__file__).parent / "goldens" / "architectures"
NAMES = sorted(path.name for path in GOLDENS.iterdir())

VECTOR_DIFF_MAX = 1e-5  # the promise, for vectors of unit length
NEIGHBOURS_DIFF_MAX = 1e-6  # a text's vector may not tell who shared its batch
STATE_DIFF_MAX = 5e-6  # components of states reach 4; the worst model, of bfloat16 weights, is at 1.7e-6
ROWS = 8  # one more than there are texts, so that there are padding rows

Array = npt.NDArray[np.float32]


def expected(name: str) -> tuple[list[list[int]], dict[str, Array]]:
    """The token ids of each text, and all arrays by name."""
    with np.load(GOLDENS / name / "expected.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    return [ids.tolist() for ids in np.split(found["ids"], np.cumsum(found["lengths"])[:-1])], found


def unit(vectors: Array) -> Array:
    scaled: Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def states_graph(name: str, members: dict[str, Any]) -> ov.Model:
    """The graph of token states alone, for these members of config.json."""
    ids = op.parameter([-1, -1], np.int32, name="ids")
    mask = op.parameter([-1, -1], np.float32, name="mask")
    build = BUILDERS[members["model_type"]]
    return ov.Model([build(members, Weights(GOLDENS / name), ids.output(0), mask.output(0))], [ids, mask], name)


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDENS / name / "config.json").read_text(encoding="utf-8"))
    return found


def test_every_architecture_has_a_golden() -> None:
    """CamemBERT's builder is RoBERTa's."""
    assert {config(name)["model_type"] for name in NAMES} == set(BUILDERS) - {"camembert"}
    assert BUILDERS["camembert"] is BUILDERS["roberta"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_reference_s(name: str) -> None:
    """Also for a text that spells the padding token."""
    tokenizer = ModelTokenizer(GOLDENS / name, 512)
    texts = json.loads((GOLDENS / name / "texts.json").read_text(encoding="utf-8"))
    assert [tokenizer.with_specials(ids) for ids in tokenizer.ids(texts)] == expected(name)[0]


@pytest.mark.story
@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_the_reference_s(name: str) -> None:
    """Alone, and beside longer texts and padding rows."""
    sequences, found = expected(name)
    model = CompiledModel(read_folder(GOLDENS / name), threads=1)
    alone = np.concatenate([model.run([ids], 1, len(ids)) for ids in sequences])
    together = model.run(sequences, ROWS, pad_length(max(map(len, sequences))))
    for vectors in (alone, together):
        assert vectors.shape == found["vectors"].shape
        assert np.abs(unit(vectors) - unit(found["vectors"])).max() <= VECTOR_DIFF_MAX
        assert np.allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(found["vectors"], axis=1), rtol=1e-5)
    assert np.abs(unit(together) - unit(alone)).max() <= NEIGHBOURS_DIFF_MAX


@pytest.mark.story
@pytest.mark.parametrize("name", NAMES)
def test_states_are_the_reference_s(name: str) -> None:
    """Of every token, so that no pooling hides a wrong one; in one padded batch."""
    sequences, found = expected(name)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = ov.Core().compile_model(states_graph(name, config(name)), "CPU", options)
    ids = np.zeros((ROWS, max(map(len, sequences))), np.int32)
    mask = np.zeros(ids.shape, np.float32)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1.0
    states = model([ids, mask])[0]
    mine = np.concatenate([states[row, : len(sequence)] for row, sequence in enumerate(sequences)])
    assert np.abs(mine - found["states"]).max() <= STATE_DIFF_MAX


ROPE = {"rope_type": "default", "rope_theta": 1000.0}
NATIVE_KINDS = {"full_attention": ROPE, "sliding_attention": ROPE}


@pytest.mark.parametrize(
    ("name", "members", "says"),
    [
        ("bert", {"auto_map": {"AutoModel": "jinaai/jina-bert--modeling_bert.JinaBertModel"}}, "auto_map"),
        ("bert", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("bert", {"position_embedding_type": "alibi"}, "'alibi'"),
        ("bert", {"hidden_size": "24"}, "hidden_size"),
        ("bert", {"hidden_size": 10**9}, "hidden_size"),
        ("bert", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("roberta", {"position_embedding_type": "rotary"}, "'rotary'"),
        ("roberta", {"is_decoder": True}, "is_decoder"),
        ("roberta", {"pad_token_id": -1}, "pad_token_id"),
        ("roberta", {"hidden_act": "quick_gelu"}, "'quick_gelu'"),
        ("xlm_roberta", {"add_cross_attention": True}, "add_cross_attention"),
        ("xlm_roberta", {"max_position_embeddings": 43}, "position_embeddings"),
        ("distilbert", {"activation": "mish"}, "'mish'"),
        ("distilbert", {"n_heads": 5}, "num_attention_heads"),
        ("distilbert", {"hidden_size": 32}, "both dim and hidden_size"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets"),
        ("mpnet", {"pad_token_id": 0}, "pad_token_id"),
        ("mpnet", {"num_attention_heads": 4}, "relative_attention_bias"),
        ("nomic_bert", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, "'yarn'"),
        ("nomic_bert", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("nomic_bert", {"rope_parameters": ROPE | {"beta_fast": 32}}, "beta_fast"),
        ("nomic_bert", {"rope_parameters": ROPE | {"factor": 2.0}}, "factor"),
        ("nomic_bert", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta"),
        ("nomic_bert", {"head_dim": 16}, "head_dim"),
        ("nomic_bert", {"rope_parameters": ROPE | {"rope_type": "ntk", "factor": 2.0}}, "'ntk'"),
        ("nomic_bert", {"max_position_embeddings": 2**22}, "max_position_embeddings"),
        ("gte", {"num_attention_heads": 8}, "components"),
        ("nomic_bert_published", {"activation_function": "gelu"}, "activation_function"),
        ("nomic_bert_published", {"causal": True}, "causal"),
        ("nomic_bert_published", {"mlp_fc1_bias": True}, "mlp_fc1_bias"),
        ("nomic_bert_published", {"mlp_fc2_bias": True}, "mlp_fc2_bias"),
        ("nomic_bert_published", {"moe_every_n_layers": 2}, "moe_every_n_layers"),
        ("nomic_bert_published", {"num_experts": 8}, "num_experts"),
        ("nomic_bert_published", {"parallel_block": True}, "parallel_block"),
        ("nomic_bert_published", {"prenorm": True}, "prenorm"),
        ("nomic_bert_published", {"qkv_proj_bias": True}, "qkv_proj_bias"),
        ("nomic_bert_published", {"qkv_proj_bias": ...}, "does not say qkv_proj_bias"),
        ("nomic_bert_published", {"rotary_emb_base": ...}, "does not say rotary_emb_base"),
        ("nomic_bert_published", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction"),
        ("nomic_bert_published", {"rotary_emb_interleaved": True}, "rotary_emb_interleaved"),
        ("nomic_bert_published", {"rotary_emb_scale_base": 512}, "rotary_emb_scale_base"),
        ("nomic_bert_published", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor"),
        ("nomic_bert_published", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("nomic_bert_published", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("nomic_bert_published", {"use_rms_norm": True}, "use_rms_norm"),
        ("nomic_bert_published", {"n_layer": 3}, "encoder.layers.2"),
        ("modernbert", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("modernbert", {"local_rope_theta": None}, "rope_theta"),
        ("modernbert", {"norm_bias": True}, "embeddings.norm.bias"),
        ("modernbert", {"hidden_activation": "gelu_accurate"}, "'gelu_accurate'"),
        ("modernbert", {"local_attention": 0}, "local_attention"),
        ("modernbert", {"rope_parameters": {"full_attention": ROPE | {"rope_type": "dynamic"}}}, "'dynamic'"),
        ("modernbert_biases", {"layer_types": ["full_attention"]}, "layer_types"),
        ("modernbert_biases", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("gte", {"rope_parameters": ROPE | {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("gte", {"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ("gte", {"type_vocab_size": 2}, "token_type_embeddings"),
        ("gte_published", {"layer_norm_type": "rms_norm"}, "layer_norm_type"),
        ("gte_published", {"logn_attention_clip1": True}, "logn_attention_clip1"),
        ("gte_published", {"logn_attention_scale": True}, "logn_attention_scale"),
        ("gte_published", {"position_embedding_type": "absolute"}, "'absolute'"),
        ("gte_published", {"pack_qkv": False}, "pack_qkv"),
        ("gte_published", {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.6}}, "mixed_b"),
        ("gte_published", {"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "'dynamic'"),
        ("gte_published", {"rope_theta": ...}, "rope_theta"),
        ("gte_published", {"auto_map": {"AutoModel": "modeling.OtherModel"}}, "OtherModel"),
    ],
)
def test_a_variant_that_is_not_known_is_refused(name: str, members: dict[str, Any], says: str) -> None:
    """In one line that names it. `...` takes a member away."""
    edited = {member: value for member, value in (config(name) | members).items() if value is not ...}
    with pytest.raises(SetupError) as refused:
        states_graph(name, edited)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("bert", {"auto_map": {"AutoModelForMaskedLM": "code.Head"}, "is_decoder": False}),
        ("nomic_bert_published", {"auto_map": {"AutoModel": "nomic-ai/n--modeling_hf_nomic_bert.NomicBertModel"}}),
        ("gte_published", {"auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"}}),
        ("gte_published", {"rope_scaling": None}),
        ("modernbert", {"layer_norm_eps": 1e-3, "position_embedding_type": "absolute"}),
        ("modernbert_biases", {"rope_parameters": NATIVE_KINDS, "global_rope_theta": 1.5}),
    ],
)
def test_what_published_configs_say_besides_is_taken(name: str, members: dict[str, Any]) -> None:
    assert states_graph(name, config(name) | members).inputs[0].any_name == "ids"
