"""Make the golden vectors of all-MiniLM-L6-v2: our texts, embedded by sentence-transformers in fp32 on the CPU.

Run it in an environment of its own, since the product needs neither torch nor transformers:

    python3.11 -m venv /tmp/goldens && /tmp/goldens/bin/pip install torch==2.13.0
    /tmp/goldens/bin/pip install sentence-transformers==6.2.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.4.6
    /tmp/goldens/bin/python -m tests.engine.goldens.make_goldens MODEL_FOLDER      (from the root of the checkout)

It writes two files beside itself: `all_minilm_l6_v2.npz` (array `vectors`, float32, one row a text) and
`all_minilm_l6_v2.json` (the texts in the same order, each with its kind and its tokens really embedded, special tokens
included; and the versions used). Texts are the same on every run; vectors are too, but for the last bits of a float
where the processor differs. Both files are committed: nobody needs this script to run the tests.
"""

import hashlib
import json
import platform
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from tests.engine.goldens.odd_texts import ODD_TEXTS

HERE = Path(__file__).parent
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # sentence_bert_config.json; the tokenizer.json beside it says 128, which is a trap
TOKENS_MIN = 3  # one token between [CLS] and [SEP]
EDGES = (127, 128, 129, 130, 255, 256)  # both sides of that trap, and of the model's own limit
EDGE_FLAVOURS = ("english", "cyrillic", "code", "mixed scripts", "odd white space")
TOO_LONG = (257, 300, 700)  # these must come out cut at MAX_TOKENS
SEED = 20_261_122
MADE_WITH = ("torch", "sentence-transformers", "transformers", "tokenizers", "numpy")
FILLER = "."  # one token wherever it stands

Count = Callable[[str], int]


class Flavour(NamedTuple):
    """One kind of made-up text: its words, and what may stand between two of them."""

    words: list[str]
    joints: list[str]


class Text(NamedTuple):
    """A text and why it is here."""

    kind: str
    text: str


def read_flavours() -> dict[str, Flavour]:
    """The flavours of `words.toml`, mixtures made of those above them."""
    flavours: dict[str, Flavour] = {}
    for kind, said in tomllib.loads((HERE / "words.toml").read_text(encoding="utf-8")).items():
        words = said.get("words", "").split()
        for other, every in said.get("take", {}).items():
            words += flavours[other].words[::every]
        flavours[kind] = Flavour(words, said.get("joints", [" "]))
    return flavours


def compose(flavour: Flavour, tokens: int, count: Count, dice: Random) -> str:
    """Words of a flavour, put together until they are exactly `tokens` long, special tokens included."""
    text, length = "", count("")
    while length < tokens:
        joint = dice.choice(flavour.joints) if text else ""
        for word in [*dice.sample(flavour.words, k=len(flavour.words)), FILLER]:
            longer = text + joint + word
            if length < count(longer) <= tokens:
                text, length = longer, count(longer)
                break
        else:
            raise AssertionError(f"no way from {length} to {tokens} tokens")
    return text


def texts(count: Count) -> Iterator[Text]:
    """Every golden text. `count` says how many tokens a text has, special tokens included, without any limit."""
    dice = Random(SEED)
    flavours = read_flavours()
    kinds = list(flavours)
    for tokens in range(TOKENS_MIN, MAX_TOKENS + 1):
        kind = kinds[tokens % len(kinds)]
        yield Text(kind, compose(flavours[kind], tokens, count, dice))
    for tokens in (*EDGES, *TOO_LONG):
        for kind in EDGE_FLAVOURS[: None if tokens in EDGES else 1]:
            yield Text(kind, compose(flavours[kind], tokens, count, dice))
    for kind, odd in ODD_TEXTS.items():
        yield from (Text(kind, text) for text in odd)


def load(folder: Path) -> tuple[Any, Any]:
    """The reference model and the folder's own tokenizer without its limit of 128; both are checked to agree."""
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]
    from tokenizers import Tokenizer

    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise SystemExit("these are not the weights that the goldens are for")
    model = SentenceTransformer(str(folder), device="cpu").float()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return model, tokenizer


def embedded_ids(model: Any, text: str) -> list[int]:
    """The ids that sentence-transformers feeds its network for a text."""
    return list(model.preprocess([text])["input_ids"][0].tolist())


def cut(ids: list[int]) -> list[int]:
    """Ids cut at the end to what the model takes, the closing special token kept."""
    return ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]]


def main(folder: Path) -> None:
    """Write both files, or stop where the reference does not do what this script says it does."""
    model, tokenizer = load(folder)
    assert model.max_seq_length == MAX_TOKENS, "the reference must take the model's own limit"
    chosen = list(dict.fromkeys(texts(lambda text: len(tokenizer.encode(text).ids))))
    tokens = []
    for kind, text in chosen:
        ids = embedded_ids(model, text)
        assert ids == cut(tokenizer.encode(text).ids), f"the tokenizers disagree about a text of kind {kind}"
        tokens.append(len(ids))
    assert set(tokens) >= set(range(TOKENS_MIN, MAX_TOKENS + 1)), "a length is missing"

    # One text at a time: no padding, so nothing depends on a text's neighbours.
    rows = [model.encode(text, batch_size=1, show_progress_bar=False, convert_to_numpy=True) for _, text in chosen]
    vectors = np.stack(rows).astype("<f4")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6), "the reference must answer unit vectors"

    about = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "weights_sha256": WEIGHTS_SHA256,
        "max_tokens": MAX_TOKENS,
        "made_with": {name: version(name) for name in MADE_WITH} | {"python": platform.python_version()},
        "texts": [
            {"kind": kind, "tokens": count, "text": text} for (kind, text), count in zip(chosen, tokens, strict=True)
        ],
    }
    written = json.dumps(about, ensure_ascii=True, indent=0)
    (HERE / "all_minilm_l6_v2.json").write_text(written + "\n", encoding="ascii")
    np.savez_compressed(HERE / "all_minilm_l6_v2.npz", vectors=vectors)
    print(f"{len(chosen)} texts, {sum(tokens)} tokens")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.engine.goldens.make_goldens MODEL_FOLDER")
    main(Path(sys.argv[1]))
