"""Make the small model folders that are not built by us: an .onnx file, and static models; and what their vectors are.

Run it in an environment of its own, since the product needs none of this:

    python3.11 -m venv /tmp/goldens && /tmp/goldens/bin/pip install torch==2.13.0
    /tmp/goldens/bin/pip install sentence-transformers==6.2.0 transformers==5.23.0 model2vec==0.10.0 onnx==1.23.2
    /tmp/goldens/bin/python -m tests.engine.goldens.make_folders      (from the root of the checkout)

Each folder under `folders/` is as its own library writes it, but for files that decide nothing; `expected.json` in it
holds the vectors that the library gives to `TEXTS`. The .onnx file keeps its tensors in a file beside it, as those
above 2 GB must, and is of another architecture than the other folders (ELECTRA).
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

HERE = Path(__file__).parent / "folders"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIALS, *(f"w{number}" for number in range(27))]
WIDTH = 8
TEXTS = [
    "w1",
    "W2 w3 w2",
    "w1 never-heard w9 w26",
    "[SEP] w4 w4 w4 w5",
    " ".join(f"w{number % 27}" for number in range(25)),
]
SEED = 20_261_125


def main() -> None:
    """Write every folder anew."""
    shutil.rmtree(HERE, ignore_errors=True)
    make_onnx(HERE / "onnx")
    dice = np.random.default_rng(SEED)
    table = dice.normal(0, 1, (len(WORDS), WIDTH)).astype(np.float32)
    make_model2vec(HERE / "model2vec", table, normalize=True)
    shared = {"token_mapping": dice.integers(0, 6, len(WORDS)), "weights": dice.random(len(WORDS)).astype(np.float32)}
    make_model2vec(HERE / "model2vec_shared_rows", table[:6], normalize=False, **shared)
    make_model2vec(HERE / "model2vec_int8", np.rint(table * 40).astype(np.int8), normalize=True)
    make_static_embedding(HERE / "static_embedding", table)


def make_model2vec(folder: Path, table: Any, *, normalize: bool, **rest: Any) -> None:
    """Model2Vec's own layout: `embeddings`, and `mapping` and `weights` where tokens share rows."""
    from model2vec import StaticModel

    tokenizer = make_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="$A")
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": WIDTH, "seq_length": 1_000_000}
    StaticModel(table, tokenizer, config=config, normalize=normalize, max_length=64, **rest).save_pretrained(folder)
    finish(folder, lambda texts: StaticModel.from_pretrained(folder).encode(texts))


def make_static_embedding(folder: Path, table: Any) -> None:
    """The layout of sentence-transformers, in a folder of its own, which keeps unknown tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    static = StaticEmbedding(make_tokenizer(), embedding_weights=table)
    static.save_in_root = False
    SentenceTransformer(modules=[static, Normalize()], device="cpu").save(str(folder))
    model = SentenceTransformer(str(folder), device="cpu")
    finish(folder, lambda texts: model.encode(texts))


def make_onnx(folder: Path) -> None:
    """ELECTRA as torch exports it, in a folder that sentence-transformers wrote."""
    import onnx
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import ElectraConfig, ElectraModel

    torch.manual_seed(SEED)
    settings: dict[str, Any] = {"attn_implementation": "eager"}
    config = ElectraConfig(
        vocab_size=len(WORDS),
        embedding_size=WIDTH,
        hidden_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        **settings,
    )
    model: Any = ElectraModel(config)
    model.eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.4)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    modules = [Transformer(str(folder)), Pooling(2 * WIDTH, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    whole = SentenceTransformer(str(folder), device="cpu")
    export(model, folder / "onnx.tmp")
    (folder / "onnx").mkdir()
    onnx.save_model(
        onnx.load(folder / "onnx.tmp"),
        folder / "onnx" / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=128,
    )
    (folder / "onnx.tmp").unlink()
    (folder / "model.safetensors").unlink()
    finish(folder, lambda texts: whole.encode(texts))


def export(model: Any, file: Path) -> None:
    """By the exporter whose files most repositories hold (opset 17, by tracing)."""
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = torch.ones(2, 5, dtype=torch.int64)
    torch.onnx.export(
        Encoder(),
        (example, example, torch.zeros_like(example)),
        str(file),
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "rows", 1: "length"} for name in [*names, "last_hidden_state"]},
        dynamo=False,
    )


def make_tokenizer() -> Tokenizer:
    """BERT's, over `WORDS`."""
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def finish(folder: Path, encode: Callable[[Sequence[str]], Any]) -> None:
    """Keep the texts and their vectors beside the model, and drop what decides nothing."""
    vectors = np.asarray(encode(TEXTS), np.float64)
    expected = {"texts": TEXTS, "vectors": [[round(float(value), 9) for value in row] for row in vectors]}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)
    for file in folder.rglob("*.*"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()
