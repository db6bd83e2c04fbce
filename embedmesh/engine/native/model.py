"""A model of BERT's kind that runs on our own kernels: texts of any lengths at once, nothing padded.

Weights are packed tensor by tensor from the mapped file, whose pages are given back as it goes, so that loading takes
little more than the model does. The table of words stays in the file.
"""

import ctypes
import weakref
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from embedmesh.engine.folder import Dense, Folder
from embedmesh.engine.models.config import EncoderConfig
from embedmesh.engine.native.family import KINDS, PANEL, Kind, read_kind, unsupported
from embedmesh.engine.native.library import Layer, NativeEncoder, Norm, load
from embedmesh.engine.native.memory import Array, Packed, floats
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.errors import SetupError

WORDS = "embeddings.word_embeddings.weight"
SPACE_KEPT_FLOATS = (
    16 * 1024 * 1024
)  # between runs: enough for a batch of large models, not for one of the longest texts
RUN_TOKENS_MAX = 2**17  # of one run: sizes below are far from 32 bits, also at the widest
UNIT_LENGTH_EPS = 1e-12  # a vector of zeros stays one
RELEASE_WORDS_EVERY_TOKENS = 2_048  # a file's pages that texts have touched: a fraction of a millisecond to map again


class NativeModel:
    """A model in the tier exact. Not for two threads at one time."""

    def __init__(self, folder: Folder, threads: int) -> None:
        """Pack the weights, start `threads` - 1 helpers, embed a first token. Raises SetupError."""
        if why := unsupported(folder):
            raise SetupError(f"The kernels cannot run {folder.path.name}: {why}.")
        self._library = load()
        self._config = config = read_kind(folder)
        self._weights = Weights(folder.transformer).rooted(WORDS)
        self._words = self._weights.stored(WORDS, config.vocab_size, config.hidden_size)
        self._dense = [_read_dense(layer) for layer in folder.dense]
        self._normalize = folder.normalize
        self._first_only = folder.pooling == "cls"
        self._padding: int | None = getattr(config, "pad_token_id", None)
        self._tokens_max = config.max_position_embeddings - (0 if self._padding is None else self._padding + 1)
        try:
            self._packed = Packed(_count(config))
            self._encoder = _pack(self._packed, self._weights, config, KINDS[folder.model_type])
            self._positions = _positions(self._weights, config, KINDS[folder.model_type])
        except MemoryError:
            raise SetupError(f"There is not enough memory for {folder.path.name}. Serve a smaller model.") from None
        pool = self._library.embedmesh_start(max(1, threads))
        if not pool:
            raise SetupError(f"There is not enough memory for {folder.path.name}. Serve a smaller model.")
        self._pool = pool
        self._end = weakref.finalize(self, self._library.embedmesh_end, pool)
        self._space = floats(0)
        self._tokens_since_release = 0
        self.run([[0]], rows=1, length=1)

    def run(self, sequences: Sequence[Sequence[int]], rows: int, length: int) -> Array:
        """Vectors [len(sequences), width] of token ids, special tokens included. `rows` and `length` change nothing.

        Raises ValueError for ids and lengths that the model has no rows for, MemoryError.
        """
        lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        tokens, longest = int(offsets[-1]), int(lengths.max(initial=0))
        if not len(lengths) or lengths.min() < 1 or longest > self._tokens_max or tokens > RUN_TOKENS_MAX:
            raise ValueError(f"texts have 1 to {self._tokens_max} tokens, and {RUN_TOKENS_MAX} in all at most")
        ids = np.fromiter(chain.from_iterable(sequences), np.int32, tokens)
        if ids.min() < 0 or ids.max() >= self._config.vocab_size:
            raise ValueError(f"token ids are 0 to {self._config.vocab_size - 1}")
        encoder, size = ctypes.byref(self._encoder), tokens * self._config.hidden_size
        needed = self._library.embedmesh_floats(self._pool, encoder, tokens, longest)
        if needed > self._space.size:
            self._space = floats(0)  # first, so that both are never there at once
            self._space = floats(needed)
        states, beside = self._space[: 2 * size].reshape(2, tokens, self._config.hidden_size)
        states[...] = self._embed(ids)
        beside[...] = self._positions[self._places(ids, lengths, offsets)]
        space = self._space.ctypes.data
        self._library.embedmesh_run(self._pool, encoder, offsets.ctypes.data, len(lengths), longest, space)
        if self._first_only:
            vectors = states[offsets[:-1]]
        else:
            vectors = np.add.reduceat(states, offsets[:-1], axis=0)
            vectors /= lengths[:, None]
        del states, beside
        if self._space.size > SPACE_KEPT_FLOATS:
            self._space = floats(0)
        self._release_pages(tokens)
        return self._finish(vectors)

    def close(self) -> None:
        """End its threads. It cannot run any more."""
        self._end()

    def _embed(self, ids: npt.NDArray[np.int32]) -> Array:
        """The words' rows of the table, which are read from the file as they are there."""
        rows = self._words[ids]
        return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows  # bfloat16

    def _places(
        self, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], offsets: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        """Each token's row of the table of positions. RoBERTa's begin behind padding's; see `models.roberta`."""
        if self._padding is None:
            return np.arange(len(ids), dtype=np.int32) - np.repeat(offsets[:-1], lengths)
        real = ids != self._padding
        counts = np.cumsum(real, dtype=np.int32)
        before = np.repeat(counts[offsets[:-1]] - real[offsets[:-1]], lengths)
        return np.where(real, counts - before, 0).astype(np.int32) + np.int32(self._padding)

    def _finish(self, vectors: Array) -> Array:
        """Pooled states to vectors: the folder's dense layers, and unit length."""
        for layer, kernel, bias in self._dense:
            vectors = np.einsum("ij,kj->ik", vectors, kernel)  # and no product of BLAS, which brings threads of its own
            vectors = vectors if bias is None else vectors + bias
            vectors = np.tanh(vectors) if layer.activation == "tanh" else vectors
        if self._normalize:
            lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
            vectors /= np.maximum(lengths, UNIT_LENGTH_EPS)[:, None]
        return vectors

    def _release_pages(self, tokens: int) -> None:
        self._tokens_since_release += tokens
        if self._tokens_since_release > RELEASE_WORDS_EVERY_TOKENS:
            self._tokens_since_release = 0
            self._weights.release_pages()


def _read_dense(layer: Dense) -> tuple[Dense, Array, Array | None]:
    weights = Weights(layer.path)
    kernel = weights.get("linear.weight", layer.outputs, layer.inputs)
    return layer, kernel, weights.get("linear.bias", layer.outputs) if layer.bias else None


def _widths(config: EncoderConfig) -> tuple[int, int]:
    """Widths of all heads together and of a layer's middle, each padded so that it is a multiple of PANEL."""
    head, middle = (-(-width // PANEL) * PANEL for width in (config.head_width, config.intermediate_size))
    return config.num_attention_heads * head, middle


def _count(config: EncoderConfig) -> int:
    """Floats of a model's packed weights."""
    hidden, (inner, middle) = config.hidden_size, _widths(config)
    kernels = hidden * (4 * inner + 2 * middle)
    return config.num_hidden_layers * (kernels + 3 * inner + middle + 6 * hidden) + 2 * hidden


def _positions(weights: Weights, config: EncoderConfig, kind: Kind) -> Array:
    """What each position adds to a word: its row, and that of token type 0, which all tokens of a lone text have."""
    positions = weights.get("embeddings.position_embeddings.weight", config.max_position_embeddings, config.hidden_size)
    if not kind.typed:
        return positions
    rows = getattr(config, "type_vocab_size", 0)
    types = weights.get("embeddings.token_type_embeddings.weight", rows, config.hidden_size)
    added: Array = positions + types[0]
    return added


def _pack(packed: Packed, weights: Weights, config: EncoderConfig, kind: Kind) -> NativeEncoder:
    """The model as the kernels take it. Raises SetupError for weights that do not fit."""
    inner, middle = _widths(config)
    layers = (Layer * config.num_hidden_layers)()
    for number in range(config.num_hidden_layers):
        layers[number] = _layer(packed, weights, config, kind, kind.names.layer.format(number))
        weights.release_pages()
    norm = _norm(packed, weights, "embeddings.LayerNorm", config.hidden_size)
    heads = config.num_attention_heads
    sizes = config.hidden_size, heads, inner // heads, middle, len(layers)
    return NativeEncoder(*sizes, config.layer_norm_eps, norm, layers)


def _layer(packed: Packed, weights: Weights, config: EncoderConfig, kind: Kind, at: str) -> Layer:
    hidden, (inner, middle), names = config.hidden_size, _widths(config), kind.names
    heads, width = config.num_attention_heads, config.head_width

    def get(name: str, outputs: int, inputs: int) -> tuple[Array, Array]:
        return weights.get(f"{at}{name}.weight", outputs, inputs), weights.get(f"{at}{name}.bias", outputs)

    def padded(array: Array, *shape: int) -> Array:
        """With zeros behind its end along every axis."""
        if array.shape == shape:
            return array
        return np.pad(array, [(0, want - have) for want, have in zip(shape, array.shape, strict=True)])

    parts = []
    for name in names.parts:
        kernel, bias = get(name, hidden, hidden)
        if name == names.parts[0]:
            factor = np.float32(np.log2(np.e) / np.sqrt(width))
            kernel, bias = kernel * factor, bias * factor
        kernel = padded(kernel.reshape(heads, width, hidden), heads, inner // heads, hidden).reshape(inner, hidden)
        bias = padded(bias.reshape(heads, width), heads, inner // heads).reshape(inner)
        parts.append((kernel, bias))
    mixed, mixed_bias = get(names.mixed, hidden, hidden)
    mixed = padded(mixed.reshape(hidden, heads, width), hidden, heads, inner // heads).reshape(hidden, inner)
    wide, wide_bias = get(names.wide, config.intermediate_size, hidden)
    narrow, narrow_bias = get(names.narrow, hidden, config.intermediate_size)
    return Layer(
        packed.linear([kernel for kernel, _ in parts], [bias for _, bias in parts]),
        packed.linear([mixed], [mixed_bias]),
        packed.linear([padded(wide, middle, hidden)], [padded(wide_bias, middle)]),
        packed.linear([padded(narrow, hidden, middle)], [narrow_bias]),
        _norm(packed, weights, at + names.mixed_norm, hidden),
        _norm(packed, weights, at + names.norm, hidden),
    )


def _norm(packed: Packed, weights: Weights, name: str, hidden: int) -> Norm:
    return Norm(
        packed.vector(weights.get(f"{name}.weight", hidden)), packed.vector(weights.get(f"{name}.bias", hidden))
    )
