"""Texts to measure with, made of what is on every machine: `corpus("M", 64)`. Always the same on the same machine.

Lengths are in tokens of the default model's tokenizer, special tokens included. S and M: like queries, and like
chunks of documents. Q: like a question, each as long as the next. D: like titles and sentences that are ranked. L: as
long as the default model takes; 512: as most others of its kind take; P: as long as they take with a query of 12 tokens
before it. X: as a store of short and long records has it, most of them short, some full.
"""

from collections.abc import Iterator
from functools import cache
from itertools import chain, cycle
from random import Random
from typing import Literal, NamedTuple

from embedmesh.engine.sample_text import library_text, package_text
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.errors import SetupError
from tests.data import find_model_folder

Name = Literal["S", "Q", "D", "M", "L", "P", "512", "X"]


class Lengths(NamedTuple):
    """Tokens of a corpus' texts: log-normal, then cut to `low` and `high`."""

    median: float
    spread: float  # standard deviation of the logarithm
    low: int
    high: int


LENGTHS: dict[Name, Lengths] = {
    "S": Lengths(12.5, 0.25, 6, 24),  # mean 13
    "Q": Lengths(28, 0.0, 28, 28),
    "D": Lengths(28, 0.3, 10, 64),  # mean 29
    "M": Lengths(133, 0.18, 64, 224),  # mean 135
    "L": Lengths(256, 0.0, 256, 256),
    "P": Lengths(499, 0.0, 499, 499),
    "512": Lengths(512, 0.0, 512, 512),
    "X": Lengths(29.5, 1.12, 5, 256),  # mean 48
}
SEED = 20_261_123


def corpus(name: Name, count: int) -> list[str]:
    """`count` texts, in an order that says nothing about their lengths. Raises SetupError without the default model.

    Beyond some 10,000 texts of S (or 1,500 of L) the machine's text begins anew: other cuts of the same words.
    """
    dice = Random(f"{SEED} {name}")
    lengths = LENGTHS[name]
    paragraphs = _paragraphs()
    start = dice.randrange(len(paragraphs))
    source = cycle((*paragraphs[start:], *paragraphs[:start]))
    return [_cut(source, _length(lengths, dice)) for _ in range(count)]


def token_counts(texts: list[str]) -> list[int]:
    """Tokens of each text, special tokens included."""
    tokenizer = _tokenizer()
    return [len(ids) + tokenizer.specials for ids in tokenizer.ids(texts)]


def _length(lengths: Lengths, dice: Random) -> int:
    return min(max(round(dice.lognormvariate(0, lengths.spread) * lengths.median), lengths.low), lengths.high)


def _cut(source: Iterator[tuple[tuple[str, int], ...]], length: int) -> str:
    """Words from the start of a paragraph, and of those behind it as needed, that make exactly `length` tokens.

    A word is never cut: where one would be too much, the next that fits is used.
    """
    left = length - _tokenizer().specials
    words: list[str] = []
    for word, tokens in chain.from_iterable(source):
        if tokens <= left:
            words.append(word)
            left -= tokens
        if not left:
            break
    return " ".join(words)


@cache
def _paragraphs() -> tuple[tuple[tuple[str, int], ...], ...]:
    """Every paragraph on the machine as its words, each with its tokens: WordPiece cuts at white space first."""
    texts = [*library_text(), *package_text()]
    words = list({word for text in texts for word in text.split()})
    tokens = dict(zip(words, map(len, _tokenizer().ids(words)), strict=True))
    return tuple(tuple((word, tokens[word]) for word in text.split()) for text in texts)


@cache
def _tokenizer() -> ModelTokenizer:
    folder = find_model_folder()
    if folder is None:
        raise SetupError("The default model's files are not here: run `embedmesh setup` first.")
    return ModelTokenizer(folder, max_tokens=256)


def main() -> None:
    """What the corpora are: `python -m bench.corpus`."""
    for name in LENGTHS:
        texts = corpus(name, 500)
        counts = sorted(token_counts(texts))
        middle, late = counts[len(counts) // 2], counts[len(counts) * 95 // 100]
        print(
            f"{name}: {len(set(texts))} texts of {counts[0]} to {counts[-1]} tokens, mean {sum(counts) / 500:.1f}, "
            f"median {middle}, p95 {late}; such as {texts[0][:60]!r}"
        )


if __name__ == "__main__":
    main()
