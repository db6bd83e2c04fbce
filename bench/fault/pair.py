"""Two honest nodes, one in float32 (`exact`) and one in bfloat16 (`fast`): would a canary ever take one for a liar?

    python -m bench.fault.pair [--texts N] [--json]

The real engine embeds texts of every kind and length in both tiers, and they are compared as `embedmesh.fleet.canary`
compares. The target is that no pair is below its COSINE_MIN. Where the CPU has no bfloat16 there is nothing to compare;
then it says so, and judges nothing.
"""

import json
from collections.abc import Iterator
from random import Random

import msgspec
import numpy as np

from bench.quality import cosines, cut_ids, started
from bench.rig.command import bench, model_folder, progress
from bench.rig.corpus import corpus
from embedmesh.engine.precision import tiers_here
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.fleet.canary import COSINE_MIN
from tests.data import find_outside_data
from tests.engine.goldens import read_goldens

TEXTS = 100_000
SEED = 20_261_125
CALL_TEXTS = 512  # of one call to the engine
RARE = 1e-4  # the quantile that is shown
MAX_TOKENS = 256
SHARES = {"S": 0.33, "X": 0.33, "M": 0.08, "L": 0.01, "odd": 0.10, "repeated": 0.07, "any tokens": 0.08}
"""Of the texts: the corpora's four kinds; odd texts and other scripts; few words many times; tokens by dice."""


class TextKind(msgspec.Struct, frozen=True):
    """How alike the two tiers are on one kind of text: cosines."""

    texts: int
    least: float
    rare: float  # all but one in 10,000 are above it
    mean: float


class TierComparison(msgspec.Struct, frozen=True):
    """All kinds together, and each."""

    measured: bool
    why: str = ""
    texts: int = 0
    tokens: int = 0
    below: int = 0  # COSINE_MIN: so often an honest node would have been called a liar
    all: TextKind | None = None
    kinds: dict[str, TextKind] = {}

    @property
    def broken(self) -> list[str]:
        """What does not hold, in words."""
        return [f"{self.below} pairs are below {COSINE_MIN['fast']}"] if self.below else []


def inputs(tokenizer: ModelTokenizer, count: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Kind, and token ids of its texts, special tokens not added."""
    dice = Random(SEED)
    for kind, share in SHARES.items():
        some = max(1, round(count * share))
        match kind:
            case "S" | "X" | "M" | "L":
                yield kind, cut_ids(tokenizer, corpus(kind, some))
            case "odd":
                yield kind, cut_ids(tokenizer, _odd(dice, some))
            case "repeated":
                yield kind, cut_ids(tokenizer, _repeated(dice, some))
            case _:
                lengths = [dice.randint(1, MAX_TOKENS - tokenizer.specials) for _ in range(some)]
                yield kind, [[_token(tokenizer, dice) for _ in range(length // 4 + 1)] for length in lengths]


def _token(tokenizer: ModelTokenizer, dice: Random) -> int:
    while (token := dice.randrange(tokenizer.vocab_size)) in tokenizer.special_ids:
        pass
    return token


def _odd(dice: Random, count: int) -> list[str]:
    """Golden texts and naughty strings, alone, then two or three of them together."""
    known = read_goldens().texts
    naughty = find_outside_data("naughty_strings.json")
    if naughty is not None:
        known += [text for text in json.loads(naughty.read_text(encoding="utf-8")) if text]
    known = [text for text in known if len(text) < 2_000]
    return (known + [" ".join(dice.choices(known, k=dice.randint(2, 3))) for _ in range(count)])[:count]


def _repeated(dice: Random, count: int) -> list[str]:
    """One to three words, again and again."""
    words = [word for text in corpus("S", 500) for word in text.split()]
    return [" ".join(dice.choices(words, k=dice.randint(1, 3)) * dice.randint(2, 60)) for _ in range(count)]


async def measure(texts: int = TEXTS) -> TierComparison:
    """Both tiers in turns, so that each has the machine for itself."""
    if "fast" not in tiers_here():
        return TierComparison(
            False, "this CPU has no bfloat16 instructions (AVX512_BF16 or AMX), so it cannot serve `fast`"
        )
    folder = model_folder()
    found: dict[str, list[np.ndarray]] = {}
    tokens = 0
    async with started(folder, "exact") as exact, started(folder, "fast") as fast:
        with progress() as bar:
            task = bar.add_task("vectors in both tiers", total=texts)
            for kind, ids in inputs(exact.tokenizer, texts):
                for at in range(0, len(ids), CALL_TEXTS):
                    some = ids[at : at + CALL_TEXTS]
                    found.setdefault(kind, []).append(cosines(await exact.embed(some), await fast.embed(some)))
                    tokens += sum(map(len, some)) + exact.tokenizer.specials * len(some)
                    bar.advance(task, len(some))
    by_kind = {kind: np.concatenate(each) for kind, each in found.items()}
    whole = np.concatenate(list(by_kind.values()))
    return TierComparison(
        measured=True,
        texts=len(whole),
        tokens=tokens,
        below=int((whole < COSINE_MIN["fast"]).sum()),
        all=_kind(whole),
        kinds={kind: _kind(each) for kind, each in by_kind.items()},
    )


def _kind(values: np.ndarray) -> TextKind:
    return TextKind(len(values), float(values.min()), float(np.quantile(values, RARE)), float(values.mean()))


if __name__ == "__main__":
    bench(measure, file="fault-pair.json", texts="to embed in each tier")
