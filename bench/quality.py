"""How good the engine's vectors are, on the default model: `python -m bench.quality [--json]`.

Four questions, the first three of the tier `exact` and each answered against something outside the engine:

* parity: how far from sentence-transformers in fp32, on our own texts of every length and many scripts;
* batch invariance: how far a text's vector moves when other texts share its batch;
* STS-B captions: rank correlation of cosines with human judgement (needs outside data; left out where that is absent);
* tiers: how far `fast` and `int8` are from `exact` on text that int8 was not calibrated on, and how they rank the
  captions. Only tiers that this CPU can run; a model without `int8.json` gets one in a copy of its folder.

`tests/engine/test_parity.py` holds the same figures to their bounds.
"""

import asyncio
import csv
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.rig.command import bench, model_folder, progress
from bench.rig.http import Vectors
from embedmesh.engine import int8
from embedmesh.engine.batch_queue import BatchQueue
from embedmesh.engine.folder import digest, read_folder
from embedmesh.engine.frames import LoadModel
from embedmesh.engine.layout import INT8_FILE
from embedmesh.engine.precision import Rest, tiers_here
from embedmesh.engine.quantize import compare, quantize
from embedmesh.engine.sample_text import library_text, package_text, spread
from embedmesh.engine.supervise import Supervisor
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.models import Tier
from tests.data import find_outside_data
from tests.engine.goldens import Goldens, read_goldens

Ids = list[list[int]]
Embed = Callable[[Ids], Awaitable[Vectors]]
"""Token ids, special tokens not yet added, to one unit vector an input, in input order."""

STSB = "stsb_captions_ccbysa.tsv"
MIX_SIZES = (2, 3, 5, 8, 13, 21)  # texts, from a pair to some batches
MANY = 180  # texts, many batches
CALLS_AT_ONCE = 12  # callers whose texts may share a batch
UNPLANNED_MAX = 13  # texts; of those mixes, what is also run as one batch of some 3,000 padded tokens
QUEUE_TOKENS_MAX = 600_000  # a node's default
ANSWER_S = 60.0  # far more than any call here takes; a hung engine must end the run, not hang it
CALIBRATION_TEXTS = 900  # more than quantize reads
FOREIGN_TEXTS = 800  # whose neighbours are compared; all pairs of them
CALL_TEXTS = 100  # of one call
FOREIGN = "descriptions and licences of installed packages"
SEED = 20_261_122


class Distance(msgspec.Struct, frozen=True):
    """How far apart two arrays of unit vectors are, component by component."""

    max_abs: float
    mean_abs: float
    cosine_min: float


class TierQuality(msgspec.Struct, frozen=True):
    """How far a tier is from exact, and its own `spearman` as in Quality."""

    moved: int8.Quality
    spearman: dict[str, float] | None


class Quality(msgspec.Struct, frozen=True):
    """Every figure. `spearman` is in percent, by split; None where the outside data is absent."""

    texts: int
    tokens: int
    parity: Distance
    batch_invariance: Distance
    spearman: dict[str, float] | None
    tiers: dict[str, TierQuality]

    @property
    def broken(self) -> list[str]:
        """Nothing: `tests/engine/test_parity.py` judges."""
        return []


class Engine(NamedTuple):
    """A started engine. `embed` plans batches as a node does; `one_batch` runs all its inputs together as they are."""

    embed: Embed
    one_batch: Embed
    tokenizer: ModelTokenizer


class Pair(NamedTuple):
    """Two sentences and how alike people found them, 0 to 5."""

    split: str  # dev or test
    left: str
    right: str
    score: float


def parts_of(folder: Path, tier: Tier = "exact") -> tuple[ModelTokenizer, Supervisor]:
    """The tokenizer of the model in a folder, and its worker process, which is not started yet."""
    model = read_folder(folder)
    load = LoadModel(str(folder), digest(folder), model.width, model.max_tokens, threads=0, tier=tier)
    return ModelTokenizer(folder, model.max_tokens), Supervisor(load, on_start=lambda: None)


@asynccontextmanager
async def started(folder: Path, tier: Tier = "exact") -> AsyncIterator[Engine]:
    """The engine of a node, worker process included, on the model in a folder."""
    tokenizer, supervisor = parts_of(folder, tier)
    queue = BatchQueue(supervisor.begin, tokens_max=QUEUE_TOKENS_MAX, on_batch=lambda plan, seconds: None)

    async def embed(ids: Ids) -> Vectors:
        async with asyncio.timeout(ANSWER_S):
            return as_array(await queue.embed([tokenizer.with_specials(each) for each in ids]))

    async def one_batch(ids: Ids) -> Vectors:
        sequences = [tokenizer.with_specials(each) for each in ids]
        async with asyncio.timeout(ANSWER_S):
            return as_array(await supervisor.run(sequences, len(ids), max(map(len, sequences))))

    try:
        await supervisor.start()
        yield Engine(embed, one_batch, tokenizer)
    finally:
        await supervisor.stop()


def as_array(vectors: Sequence[bytes | None]) -> Vectors:
    """Little-endian float32 of equal width as rows. None of them may be missing."""
    whole = [vector for vector in vectors if vector is not None]
    return np.frombuffer(b"".join(whole), "<f4").reshape(len(vectors), -1)


def distance(ours: Vectors, theirs: Vectors) -> Distance:
    """How far `ours` is from `theirs`, row by row; both (rows, width)."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape} and {theirs.shape} do not compare")
    difference = np.abs(ours.astype(np.float64) - theirs)
    return Distance(float(difference.max()), float(difference.mean()), float(cosines(ours, theirs).min()))


def cosines(ours: Vectors, theirs: Vectors) -> NDArray[np.float64]:
    """Row by row, in double precision."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    found: NDArray[np.float64] = np.einsum("ij,ij->i", a, b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of their ranks."""
    _, at, times = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(times) - 1
    means: NDArray[np.float64] = (last - (times - 1) / 2)[at]
    return means


def spearman(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Rank correlation, -1 to 1: Pearson's correlation of the ranks."""
    return float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1])


def read_pairs(path: Path) -> list[Pair]:
    """The STS-B captions, in the file's order."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Pair(row["split"], row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]


def golden_ids(tokenizer: ModelTokenizer, goldens: Goldens) -> Ids:
    """Ids of the golden texts, cut at the end to what the model takes, special tokens not yet added."""
    return [ids[: goldens.max_tokens - tokenizer.specials] for ids in tokenizer.ids(goldens.texts)]


async def one_by_one(engine: Engine, ids: Ids) -> Vectors:
    """Each text alone in its batch."""
    return np.concatenate([await engine.embed([each]) for each in ids])


async def mixed(engine: Engine, ids: Ids, alone: Vectors, dice: Random, many: int = MANY) -> Distance:
    """How far vectors move from `alone` (one row an input) when each shares its batch with others by dice."""

    def some(count: int) -> list[int]:
        return [dice.randrange(len(ids)) for _ in range(count)]

    planned = [some(size) for size in (*MIX_SIZES, many)]
    unplanned = [some(size) for size in MIX_SIZES if size <= UNPLANNED_MAX]  # from 3 to 256 tokens side by side
    at_once = [some(dice.randint(1, 4)) for _ in range(CALLS_AT_ONCE)]
    answers = [await engine.embed([ids[at] for at in mix]) for mix in planned]
    answers += [await engine.one_batch([ids[at] for at in mix]) for mix in unplanned]
    answers += await asyncio.gather(*(engine.embed([ids[at] for at in mix]) for mix in at_once))
    return distance(np.concatenate(answers), alone[np.concatenate(planned + unplanned + at_once)])


async def agreement(engine: Engine, pairs: Sequence[Pair]) -> dict[str, float]:
    """Spearman's rank correlation of cosines with people's scores, in percent: of `dev`, `test` and `all`."""
    left = await engine.embed(engine.tokenizer.ids([pair.left for pair in pairs]))
    right = await engine.embed(engine.tokenizer.ids([pair.right for pair in pairs]))
    cosines = (left * right).sum(axis=1)

    def percent(of: Sequence[int]) -> float:
        return 100 * spearman([cosines[at] for at in of], [pairs[at].score for at in of])

    rows = range(len(pairs))
    splits = {name: [at for at in rows if pairs[at].split == name] for name in ("dev", "test")}
    return {name: percent(of) for name, of in splits.items()} | {"all": percent(rows)}


def cut_ids(tokenizer: ModelTokenizer, texts: Sequence[str]) -> Ids:
    """Ids of texts, cut at the end to what the model takes, special tokens not yet added."""
    return [ids[: tokenizer.max_tokens - tokenizer.specials] for ids in tokenizer.ids(texts)]


async def foreign_vectors(engine: Engine) -> Vectors:
    """Vectors of text of another kind than int8 is calibrated on."""
    ids = cut_ids(engine.tokenizer, spread(package_text(), FOREIGN_TEXTS))
    calls = [ids[at : at + CALL_TEXTS] for at in range(0, len(ids), CALL_TEXTS)]
    return np.concatenate([await engine.embed(each) for each in calls])


@contextmanager
def with_int8(folder: Path) -> Iterator[Path]:
    """The folder if it has an `int8.json`, else a copy, of links, that has."""
    if (folder / INT8_FILE).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(parent) / folder.name
        shutil.copytree(folder, copy, copy_function=os.symlink)
        model = read_folder(copy)
        tokenizer = ModelTokenizer(copy, model.max_tokens)
        some, other = spread(library_text(), CALIBRATION_TEXTS), spread(package_text(), FOREIGN_TEXTS)
        calibration, judged = (list(map(tokenizer.with_specials, cut_ids(tokenizer, texts))) for texts in (some, other))
        with progress() as bar:
            task = bar.add_task(f"making {INT8_FILE}")

            def show_step(done: int, steps: int) -> None:
                bar.update(task, completed=done, total=steps)

            rest: Rest = "bfloat16" if "fast" in tiers_here() else "float32"
            found = quantize(model, calibration, judged, FOREIGN, threads=0, rest=rest, on_progress=show_step)
            int8.write(copy, found)
        yield copy


async def measure_tier(folder: Path, tier: Tier, exact: Vectors, stsb: Path | None) -> TierQuality:
    """A tier against `exact`, the foreign vectors of the tier of that name."""
    async with started(folder, tier) as engine:
        return TierQuality(
            moved=compare(exact, await foreign_vectors(engine), FOREIGN),
            spearman=await agreement(engine, read_pairs(stsb)) if stsb else None,
        )


async def measure() -> Quality:
    """Every figure of the default model."""
    folder = model_folder()
    goldens, stsb = read_goldens(), find_outside_data(STSB)
    async with started(folder) as engine:
        ids = golden_ids(engine.tokenizer, goldens)
        alone = await one_by_one(engine, ids)
        parity = distance(alone, goldens.vectors)
        invariance = await mixed(engine, ids, alone, Random(SEED))
        agreed = await agreement(engine, read_pairs(stsb)) if stsb else None
        exact = await foreign_vectors(engine)
    tiers: dict[str, TierQuality] = {}
    for tier in tiers_here()[1:]:
        with with_int8(folder) if tier == "int8" else nullcontext(folder) as files:
            tiers[tier] = await measure_tier(files, tier, exact, stsb)
    return Quality(len(ids), sum(goldens.tokens), parity, invariance, agreed, tiers)


if __name__ == "__main__":
    bench(measure)
