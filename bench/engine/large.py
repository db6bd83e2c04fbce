"""One large model at its real size: speed on texts of 256 of its tokens, memory, and time to its first vector."""

import json
import struct
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

from bench.engine.contenders import Broke, Runner
from bench.engine.field import Field
from bench.engine.figures import EXACT, ST, ST_FAST, LargeFigures
from bench.engine.rounds import ratio_of
from bench.rig.corpus import corpus
from bench.rig.figures import Spread
from bench.rig.install import NotInstalled
from embedmesh.engine.folder import read_folder
from embedmesh.engine.tokens import ModelTokenizer

TEXTS, TOKENS = 4, 256  # a full batch
ROUNDS, QUICK_ROUNDS = 6, 2
READ_BYTES = 16 * 1024 * 1024
FLOAT_BYTES = 4


def measure_large(
    model: Path, field: Field, quick: bool, step: Callable[[str], None], left_out: dict[str, str]
) -> LargeFigures:
    """Ours first and alone, for its memory; then in turns with sentence-transformers. Raises Broke where ours fails."""
    texts = texts_of(model)
    files = sorted(model.glob("*.safetensors"))
    step(f"{model.name}: reading")
    reading_s = sum(map(_reading_s, files))
    step(f"{model.name}: loading")
    exact = field.ours(EXACT, model)
    runners: dict[str, Runner] = {EXACT: exact}
    try:
        exact.seconds(texts)
        peak_mb = _peak_mb(exact.pid)
        for name in (ST, ST_FAST):
            step(f"{model.name}: {name}")
            try:
                runners[name] = field.theirs(name, model)
                runners[name].seconds(texts)
            except (NotInstalled, Broke) as why:
                left_out[f"{name}, {model.name}"] = str(why)
        taken: dict[str, list[float]] = {name: [] for name in runners}
        for number in range(QUICK_ROUNDS if quick else ROUNDS):
            step(f"{model.name}: round {number + 1}")
            for name, runner in runners.items():
                taken[name].append(runner.seconds(texts))
    finally:
        for runner in runners.values():
            runner.stop()
    peers = [name for name in (ST, ST_FAST) if name in taken]
    best = min(peers, key=lambda name: sorted(taken[name])[len(taken[name]) // 2], default=None)
    ratio = None
    if best is not None:
        pairs = zip(taken[EXACT], taken[best], strict=True)
        ratio = ratio_of("L", f"{model.name}, {EXACT}", best, [theirs / ours for ours, theirs in pairs])
    rates = {name: Spread.of([TEXTS * TOKENS / each for each in seconds]) for name, seconds in taken.items()}
    weights_mb = sum(map(_float_bytes, files)) / 1e6
    return LargeFigures(model.name, rates, ratio, weights_mb, peak_mb, exact.start_s, reading_s)


def texts_of(model: Path) -> list[str]:
    """TEXTS texts of TOKENS tokens of this model's tokenizer, special tokens included; a cut word may make one more."""
    tokenizer = ModelTokenizer(model, read_folder(model).max_tokens)
    words = " ".join(corpus("M", 4 * TEXTS * TOKENS // 64)).split()
    share = len(words) // TEXTS
    room = TOKENS - tokenizer.specials
    return [tokenizer.clip(" ".join(words[at * share : (at + 1) * share]), room, end=False) for at in range(TEXTS)]


def _reading_s(file: Path) -> float:
    begun = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.read(READ_BYTES):
            pass
    return time.perf_counter() - begun


def _peak_mb(pid: int) -> float:
    """The most that was resident of a process, in MB (1e6 bytes), with what it has mapped of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM"))


def _float_bytes(file: Path) -> int:
    """What a safetensors file's numbers take as float32: its header is JSON behind a length of eight bytes."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(FLOAT_BYTES * prod(each["shape"]) for name, each in header.items() if name != "__metadata__")
