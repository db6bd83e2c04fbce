"""A model folder in Hugging Face layout, read into one struct. Unknown settings are refused by name, never guessed.

Wrong pooling or a forgotten lower-casing gives vectors that look fine and are useless. So every field that changes them
is understood here, in `modules.py` or by the builder of the architecture, or it is refused.
"""

import math
from pathlib import Path
from typing import Any

import msgspec

from embedmesh.engine import layout, reranker
from embedmesh.engine.digest import digest
from embedmesh.engine.jsonfile import Fields, count, only_known, read_object, text
from embedmesh.engine.modules import MODULES_FILE, Dense, Pooling, read_modules
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import STATIC_TOKENS_MAX
from embedmesh.rules.models import Scores

__all__ = ["Dense", "Folder", "Pooling", "digest", "read_folder"]

STATIC_TOKENS = 512  # what Model2Vec takes when its config does not say
NO_BOUND_TOKENS_MIN = 10**9  # a tokenizer that knows no bound writes 10**30 or the largest of some integer type

SENTENCE_KNOWN: dict[str, tuple[object, ...]] = {
    "max_seq_length": (),
    "do_lower_case": (None, True, False),
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": (None, True, False),  # how batches are laid out, not what is computed
    **dict.fromkeys(("processing_kwargs", "model_args", "tokenizer_args", "config_args"), (None, {})),
    **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs"), (None, {})),
    **dict.fromkeys(("query_length", "document_length", "query_expansion", "tokenizer_name_or_path"), (None,)),
}
SENTENCES_KNOWN: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("__version__", "prompts", "similarity_fn_name", "requirements"), ()),
    "default_prompt_name": (None,),
    "truncate_dim": (None,),
    "model_type": ("SentenceTransformer",),
}
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names for one role, in the order in which they count


class Folder(msgspec.Struct, frozen=True):
    """A model folder's settings.

    `transformer`: the folder of config.json, weights and tokenizer; often `path` itself.
    `source`: what the graph is made from; "safetensors" by a builder, "onnx" by OpenVINO's reader, "static" by look-up.
    `config`: the fields of config.json. `width` is that of the final vectors. `vocab_size`: ids that have a row.
    `max_tokens` bounds one input, special tokens included.
    `lowercase`: the tokenizer is expected to lower-case. `drops_unknown`: unknown tokens are left out (Model2Vec).
    `scores`: what the one number of a model is that reranks, by its own definition; None of one that makes vectors. It
    comes from the last dense layer, else from the head of the architecture.
    """

    path: Path
    transformer: Path
    source: layout.Source
    model_type: str
    config: dict[str, Any]
    pooling: Pooling
    dense: tuple[Dense, ...]
    normalize: bool
    width: int
    vocab_size: int
    max_tokens: int
    prompts: dict[str, str]
    lowercase: bool = False
    drops_unknown: bool = False
    scores: Scores | None = None

    @property
    def reranks(self) -> bool:
        """Whether it scores pairs of texts."""
        return self.scores is not None


def read_folder(path: Path) -> Folder:
    """Read and check all but the tokenizer and encoders' weights. Raises SetupError, in one line."""
    first, static = layout.find_first(path)
    return _read_static(path, first) if static else _read_encoder(path, first)


def _read_encoder(path: Path, transformer: Path) -> Folder:
    config = read_object(transformer / "config.json")
    model_type = text(config, "model_type", path)
    source = layout.find_source(path, transformer, model_type)
    architecture = layout.ARCHITECTURES.get(model_type, layout.Architecture())
    hidden = count(config, _spelling(config, architecture.width), path)
    saved = (path / MODULES_FILE).is_file()  # else it is a reranker, of which CrossEncoder reads no sentence config
    sentences = read_object(path / layout.SENTENCES_FILE, absent_is_empty=True) if saved else {}
    scores: Scores | None = None
    known = SENTENCE_KNOWN
    if not saved or sentences.get("model_type") == layout.CROSS_ENCODER:
        only_known(sentences, reranker.SENTENCES_KNOWN, layout.SENTENCES_FILE, path)
        modules = reranker.read_head(path, config, hidden, saved=saved)
        scores = reranker.read_scores(path, config, sentences)
        known = SENTENCE_KNOWN if modules.dense else SENTENCE_KNOWN | reranker.SENTENCE_KNOWN
    else:
        modules = read_modules(path, hidden)
    sentence = _read_sentence(path, transformer, known) if saved else {}
    return Folder(
        path=path,
        transformer=transformer,
        source=source,
        model_type=model_type,
        config=config,
        pooling=modules.pooling,
        dense=modules.dense,
        normalize=modules.normalize,
        width=1 if scores else modules.dense[-1].outputs if modules.dense else hidden,
        vocab_size=count(config, "vocab_size", path),
        max_tokens=_read_max_tokens(
            path,
            transformer,
            sentence,
            _positions(config, architecture, path),
            known=model_type in layout.ARCHITECTURES,
        ),
        prompts={} if scores else _read_prompts(path),
        lowercase=bool(sentence.get("do_lower_case")),
        scores=scores,
    )


def _read_static(path: Path, table: Path) -> Folder:
    """A table of one vector a token, as Model2Vec writes it ("embeddings") or as sentence-transformers does.

    Model2Vec also cuts texts at the usual number of *characters* of `max_length` tokens; that is not done here.
    """
    weights = Weights(table)
    model2vec = weights.has("embeddings")
    rows, width = _table_shape(weights, "embeddings" if model2vec else "embedding.weight", path)
    config = read_object(table / "config.json", absent_is_empty=not model2vec)
    only_known({"normalize": config.get("normalize", False)}, {"normalize": (True, False)}, "config.json", path)
    modules = read_modules(path, None) if (path / MODULES_FILE).is_file() else None
    normalize = bool(config.get("normalize", False)) if model2vec or modules is None else modules.normalize
    if modules is not None and modules.normalize != normalize:
        raise SetupError(f"Model folder {path.name}: config.json and {MODULES_FILE} disagree on the normalisation.")
    given = config.get("max_length", STATIC_TOKENS) if model2vec else None
    return Folder(
        path=path,
        transformer=table,
        source="static",
        model_type="model2vec",
        config=config,
        pooling="mean",
        dense=(),
        normalize=normalize,
        width=width,
        vocab_size=math.prod(weights.entry("mapping").shape) if weights.has("mapping") else rows,
        max_tokens=STATIC_TOKENS_MAX if given is None else count(config | {"max_length": given}, "max_length", path),
        prompts=_read_prompts(path),
        drops_unknown=model2vec,
    )


def _table_shape(weights: Weights, name: str, path: Path) -> tuple[int, int]:
    if not weights.has(name):
        raise SetupError(f"Model folder {path.name} has no table of vectors in safetensors. Fetch the model again.")
    shape = weights.entry(name).shape
    if len(shape) != 2 or not all(shape):
        raise SetupError(f"Model folder {path.name}: the tensor {name} is no table.")
    return shape[0], shape[1]


def _spelling(config: Fields, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in config), names[0])


def _positions(config: Fields, architecture: layout.Architecture, path: Path) -> int | None:
    """How many tokens have a position; None where config.json does not say."""
    name = _spelling(config, architecture.positions)
    if config.get(name) is None:
        return None
    padding = config.get("pad_token_id", 1)
    lost = (padding if type(padding) is int else 1) + 1 if architecture.reserved else 0
    return count({name: config[name] - lost} if type(config[name]) is int else config, name, path)


def _read_sentence(path: Path, transformer: Path, known: dict[str, tuple[object, ...]]) -> Fields:
    """The sentence config, whose fields must be `known`; its `max_seq_length` is checked."""
    file = next((transformer / name for name in layout.SENTENCE_FILES if (transformer / name).is_file()), None)
    if file is None:
        return {}
    sentence = read_object(file)
    only_known(sentence, known, file.name, path)
    if sentence.get("max_seq_length") is not None:
        count(sentence, "max_seq_length", path, file.name)
    return sentence


def _read_max_tokens(path: Path, transformer: Path, sentence: Fields, positions: int | None, *, known: bool) -> int:
    """`max_seq_length`, else what the tokenizer's config says, as in sentence-transformers; at most the positions.

    An architecture that is not `known` may reserve positions, so there the tokenizer's config must say.
    """
    length: int | None = sentence.get("max_seq_length")
    if length is not None:
        return length if positions is None else min(length, positions)
    tokenizer = read_object(transformer / "tokenizer_config.json", absent_is_empty=True)
    given = tokenizer.get("model_max_length")
    bound = given if type(given) is int and 0 < given < NO_BOUND_TOKENS_MIN else None
    limits = [limit for limit in (bound, positions if known or bound else None) if limit is not None]
    if not limits:
        raise SetupError(
            f"Model folder {path.name} does not say how many tokens an input may have: add max_seq_length to "
            f"{layout.SENTENCE_FILES[0]}."
        )
    return min(limits)


def _read_prompts(path: Path) -> dict[str, str]:
    config = read_object(path / layout.SENTENCES_FILE, absent_is_empty=True)
    only_known(config, SENTENCES_KNOWN, layout.SENTENCES_FILE, path)
    try:
        prompts = msgspec.convert(config.get("prompts") or {}, dict[str, str])
    except msgspec.ValidationError:
        raise SetupError(f"Model folder {path.name}: the prompts are not texts by name.") from None
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), None)
    return prompts if document is None else prompts | {"document": document}
