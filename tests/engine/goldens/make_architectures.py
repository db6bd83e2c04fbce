"""Make small random models, one folder or two an architecture, and the vectors that sentence-transformers gives them.

Run it in an environment of its own, since the product needs neither torch nor transformers:

    python3.11 -m venv /tmp/goldens && /tmp/goldens/bin/pip install torch==2.13.0
    /tmp/goldens/bin/pip install sentence-transformers==6.2.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.4.6
    /tmp/goldens/bin/python -m tests.engine.goldens.make_architectures      (from the root of the checkout)

Each folder under `architectures/` is a whole model folder as one finds them published. Beside its config are
`texts.json`, and what the reference makes of these texts in `expected.npz`: `ids` (the token ids of all texts in a
row), `lengths` (tokens of each), `states` (last hidden states, a row a token, in the order of `ids`) and `vectors` (a
row a text). Both are committed: nobody needs this script to run the tests.

The reference is sentence-transformers over the classes of transformers, run in float64 on one text at a time, from the
very files that are committed. Two folders are written in the spelling that the model's own authors publish, which
transformers only runs as remote code: NomicBERT by its GPT-2 words, and GTE as model type `new` with NTK scaling. Their
weights are run through the native classes under the native spelling, so these two prove the builder's arithmetic in
full, and of the spelling only that it is read as this script means it. NTK scaling by a factor f is, by its source
(kexue.fm/archives/9706), a base f times as large and all frequencies divided by f^(2/d); native GTE says this as rope
type `linear` with the factor f^(2/d).
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent / "architectures"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = (1, 2, 5, 14, 38, 138)  # tokens of each text without the two special ones
SEED = 20_261_124
WIDTH = 24
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
ENCODER = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
NTK_FACTOR = 8.0
POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


class Case(NamedTuple):
    """One folder. `prefix` goes in front of every tensor's name; `respell` turns the config into the published one."""

    config: dict[str, Any]
    tokenizer: str
    pooling: str
    normalize: bool
    dense: int | None = None
    dtype: str = "float32"
    prefix: str = ""
    shard_bytes: int | None = None
    respell: Callable[[dict[str, Any]], dict[str, Any]] = dict


def respell_nomic(config: dict[str, Any]) -> dict[str, Any]:
    """As nomic-ai publishes it: GPT-2's words, and a word for everything that its own code can vary."""
    return {
        "model_type": "nomic_bert",
        "activation_function": "swiglu",
        "causal": False,
        "layer_norm_epsilon": config["layer_norm_eps"],
        "max_trained_positions": 2048,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "parallel_block": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "type_vocab_size": config["type_vocab_size"],
        "use_rms_norm": False,
        "vocab_size": config["vocab_size"],
    }


def respell_gte(config: dict[str, Any]) -> dict[str, Any]:
    """As Alibaba-NLP publishes it: model type `new`, and its own words for positions and scaling."""
    same = ("hidden_act", "layer_norm_eps", "max_position_embeddings", "pad_token_id", "type_vocab_size", "vocab_size")
    return {
        "model_type": "new",
        **ENCODER,
        **{member: config[member] for member in same},
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "pack_qkv": True,
        "position_embedding_type": "rope",
        "rope_scaling": {"factor": NTK_FACTOR, "type": "ntk"},
        "rope_theta": config["rope_parameters"]["rope_theta"] / NTK_FACTOR,
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
    }


def respell_old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """As ModernBERT was published, before `layer_types` and `rope_parameters`."""
    rope = config.pop("rope_parameters")
    del config["layer_types"]
    return config | {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
    }


MODERN = {
    "model_type": "modernbert",
    **ENCODER,
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 2,
    "local_attention": 12,
    "max_position_embeddings": 64,
    **{f"{name}_token_id": n for n, name in enumerate(("pad", "unk", "cls", "sep"))},
    "bos_token_id": 2,
    "eos_token_id": 3,
}
CASES = {
    "bert": Case(
        {"model_type": "bert", **ENCODER, "max_position_embeddings": 40, "hidden_act": "gelu_new"},
        "wordpiece",
        "cls",
        True,
        prefix="bert.",
    ),
    "roberta": Case(
        {"model_type": "roberta", **ENCODER, "max_position_embeddings": 42, "type_vocab_size": 1},
        "bytes",
        "mean",
        True,
        shard_bytes=20_000,
    ),
    "xlm_roberta": Case(
        {"model_type": "xlm-roberta", **ENCODER, "max_position_embeddings": 42, "type_vocab_size": 1},
        "unigram",
        "max",
        False,
        dtype="float16",
        prefix="roberta.",
    ),
    "distilbert": Case(
        {
            "model_type": "distilbert",
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 3,
            "hidden_dim": 32,
            "max_position_embeddings": 40,
            "activation": "relu",
        },
        "wordpiece",
        "mean",
        False,
        dense=10,
    ),
    "mpnet": Case(
        {"model_type": "mpnet", **ENCODER, "max_position_embeddings": 142, "layer_norm_eps": 1e-5},
        "mpnet",
        "mean",
        True,
    ),
    "nomic_bert": Case(
        {"model_type": "nomic_bert", **ENCODER, "max_position_embeddings": 64}, "wordpiece", "mean", True
    ),
    "nomic_bert_published": Case(
        {
            "model_type": "nomic_bert",
            **ENCODER,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0},
        },
        "wordpiece",
        "mean",
        True,
        dtype="float16",
        respell=respell_nomic,
    ),
    "modernbert": Case(MODERN, "bytes", "cls", True, dtype="bfloat16", respell=respell_old_rope),
    "modernbert_biases": Case(
        MODERN
        | {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 1.5},
            },
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_activation": "silu",
            "local_attention": 10,
        },
        "bytes",
        "lasttoken",
        False,
        prefix="model.",
    ),
    "gte": Case(
        {"model_type": "gte", **ENCODER, "max_position_embeddings": 64, "type_vocab_size": 0},
        "wordpiece",
        "weightedmean",
        True,
        dtype="bfloat16",
    ),
    "gte_published": Case(
        {
            "model_type": "gte",
            **ENCODER,
            "max_position_embeddings": 64,
            "type_vocab_size": 1,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 20.0 * NTK_FACTOR,
                "factor": NTK_FACTOR ** (2 / (WIDTH // ENCODER["num_attention_heads"])),
            },
        },
        "unigram",
        "cls",
        True,
        prefix="new.",
        respell=respell_gte,
    ),
    "electra": Case(
        {"model_type": "electra", **ENCODER, "embedding_size": 16, "max_position_embeddings": 40},
        "wordpiece",
        "mean",
        True,
        prefix="electra.",
    ),
}


def texts(padding: str) -> list[str]:
    """Letters with spaces between them, each a token; and a text that spells the `padding` token."""
    dice = np.random.default_rng(SEED)
    return [f"q {padding} z", *(" ".join(dice.choice(list(LETTERS), n)) for n in LENGTHS)]


def make_tokenizer(kind: str) -> Any:
    """A tokenizer whose every word is a letter."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    specials = BERT_SPECIALS if kind in ("wordpiece", "bytes") else ROBERTA_SPECIALS
    if kind == "bytes":
        words = [*LETTERS, "Ġ", *(f"Ġ{letter}" for letter in LETTERS)]
        merges = [("Ġ", letter) for letter in LETTERS]
        vocab = {word: n for n, word in enumerate([*specials, *words])}
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "unigram":
        words = ["▁", *(f"▁{letter}" for letter in LETTERS)]
        pieces = [(word, 0.0) for word in specials] + [(word, -2.0) for word in words]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        vocab = {word: n for n, word in enumerate([*specials, *LETTERS])}
        unknown = "[UNK]" if kind == "wordpiece" else "<unk>"
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(specials))
    head, tail = (2, 3) if specials is BERT_SPECIALS else (0, 2)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials[head]} $A {specials[tail]}", special_tokens=[(specials[head], head), (specials[tail], tail)]
    )
    return tokenizer


def randomize(module: Any, seed: int) -> None:
    """Weights large enough that a mistake shows, scales around 1, and no shift that is zero."""
    import torch

    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            noise = torch.randn(weight.shape, generator=dice)
            is_scale = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(1 + 0.2 * noise if is_scale else 0.2 * noise)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_weights(folder: Path, tensors: dict[str, Any], shard_bytes: int | None) -> None:
    """`model.safetensors`, or shards and their index."""
    from safetensors.torch import save_file

    if shard_bytes is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if sum(one.nbytes for one in shards[-1].values()) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def write_folder(folder: Path, case: Case, seed: int) -> tuple[dict[str, Any], Any]:
    """A model folder in its native spelling; gives back its config, and the model with its weights as stored."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel

    tokenizer = make_tokenizer(case.tokenizer)
    specials = {"pad_token_id": tokenizer.token_to_id("[PAD]") or tokenizer.token_to_id("<pad>") or 0}
    members = {"vocab_size": tokenizer.get_vocab_size(), **specials, **case.config}
    config = AutoConfig.for_model(**members)
    build: Any = AutoModel.from_config
    model = build(config)
    randomize(model, seed)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        tensors = load_file(f"{saved}/model.safetensors")
        native: dict[str, Any] = json.loads(Path(saved, "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, case.dtype)
    tensors = {case.prefix + name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if ".pooler." not in "." + name}
    if case.prefix:  # as a checkpoint with a head has it
        tensors["head.bias"] = torch.zeros(4, dtype=dtype)
    folder.mkdir()
    write_weights(folder, tensors, case.shard_bytes)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(folder / "config.json", native | {"dtype": case.dtype})
    positions = native["max_position_embeddings"] - (2 if case.config["model_type"] in WITH_PADDING_POSITIONS else 0)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False})
    kinds = ["Transformer", "Pooling", *(["Dense"] if case.dense else []), *(["Normalize"] if case.normalize else [])]
    modules = [
        {
            "idx": n,
            "name": str(n),
            "path": f"{n}_{kind}" if n else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for n, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    flags = {flag: mode == case.pooling for mode, flag in POOLING_FLAGS.items()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **flags})
    if case.dense:
        dense = {"in_features": WIDTH, "out_features": case.dense, "bias": True}
        tanh = {"activation_function": "torch.nn.modules.activation.Tanh"}
        write_json(folder / "2_Dense" / "config.json", dense | tanh)
        linear = torch.nn.Linear(WIDTH, case.dense)
        randomize(linear, seed)
        state = {f"linear.{name}": tensor for name, tensor in linear.state_dict().items()}
        save_file(state, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    return native, model.to(dtype).float()


WITH_PADDING_POSITIONS = ("roberta", "xlm-roberta", "mpnet")


def embed(folder: Path, stored: Any, sequences: list[list[int]]) -> tuple[list[Any], Any]:
    """States and vector of each sequence, alone and in float64; the padded batch is checked to agree.

    What is loaded must be what was `stored`: transformers only warns of tensors that it does not find.
    """
    import torch
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}).double().eval()

    loaded = model[0].model.state_dict()
    for name, tensor in stored.state_dict().items():
        assert "pooler" in name or torch.equal(loaded[name], tensor.double()), f"{folder.name}: {name} is another"

    def run(rows: list[list[int]]) -> Any:
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=model[0].model.config.pad_token_id
        )
        mask = torch.tensor([[n < len(row) for n in range(ids.shape[1])] for row in rows]).long()
        with torch.no_grad():
            return model({"input_ids": ids, "attention_mask": mask})

    alone = [run([row]) for row in sequences]
    vectors = torch.cat([one["sentence_embedding"] for one in alone])
    assert (run(sequences)["sentence_embedding"] - vectors).abs().max() < 1e-6, f"{folder.name}: padding shows"
    return [one["token_embeddings"][0].numpy() for one in alone], vectors.numpy()


def make(name: str, case: Case, seed: int) -> None:
    """Write one folder, or stop where its vectors would not show a mistake."""
    from tokenizers import Tokenizer

    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    native, stored = write_folder(folder, case, seed)
    limit = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chosen = [
        text for text in texts(str(tokenizer.id_to_token(native["pad_token_id"]))) if len(text.split()) + 2 <= limit
    ]
    sequences = [tokenizer.encode(text).ids for text in chosen]
    assert [len(ids) for ids in sequences[1:]] == [n + 2 for n in LENGTHS if n + 2 <= limit]
    assert native["pad_token_id"] in sequences[0], f"{name}: the padding token was not recognised"
    states, vectors = embed(folder, stored, sequences)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (units @ units.T - 2 * np.eye(len(units))).max()
    assert nearest < 0.999, f"{name}: two texts are too much alike ({nearest:.4f})"
    if case.respell is not dict:
        write_json(folder / "config.json", case.respell(native) | {"dtype": case.dtype})
    write_json(folder / "texts.json", chosen)
    np.savez(
        folder / "expected.npz",
        ids=np.concatenate(sequences).astype(np.int32),
        lengths=np.array([len(ids) for ids in sequences], np.int32),
        states=np.concatenate(states).astype(np.float32),
        vectors=vectors.astype(np.float32),
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{name:22} {len(sequences)} texts, nearest pair {nearest:.3f}, {size:,} bytes")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for number, (name, case) in enumerate(CASES.items()):
        make(name, case, SEED + number)
