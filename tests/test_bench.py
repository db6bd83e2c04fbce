"""What the benches say of what they measured: verdicts, arithmetic and slopes, on figures that are known."""

import re
import subprocess

import msgspec
import pytest
from rich.console import Console

from bench.engine.figures import GATE, flops, targets
from bench.rig.figures import Spread, Target
from bench.rig.tables import print_figures
from bench.soak import growth_mb
from tests.data import CHECKOUT

MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("found", "at_least", "verdict"),
    [
        (2.0, True, "reached"),
        (1.85, True, "nearly reached"),
        (1.7, True, "missed"),
        (2.0, False, "reached"),
        (2.15, False, "nearly reached"),
        (2.3, False, "missed"),
    ],
)
def test_a_verdict_is_the_medians(found: float, at_least: bool, verdict: str) -> None:
    assert Target("what", 2.0, at_least, Spread(found, 0.0, 99.0), slack=GATE).verdict == verdict


def test_a_ratio_is_taken_round_by_round() -> None:
    """A round in which the whole machine was slow tells the same ratio as the others."""
    times = {
        "exact": {corpus: [1.0, 10.0, 1.0] for corpus in "SMX"},
        "FastEmbed": {corpus: [3.0, 30.0, 4.0] for corpus in "SMX"},
    }
    found = {target.what: target.found for target in targets(times, [], None, 0.0, {})}
    assert found["exact over FastEmbed, X"] == Spread(3.0, 3.0, 4.0)
    assert found["exact over sentence-transformers, X"] is None


def test_the_arithmetic_of_a_text() -> None:
    """all-MiniLM-L6-v2, by hand: 21.2 million operations a token in the layers' matrices, and attention on top."""
    matrices = 6 * 2 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert flops(MINILM, [1]) == matrices + 6 * 4 * 384
    assert flops(MINILM, [100, 1]) == 101 * matrices + (100 * 100 + 1) * 6 * 4 * 384


def test_growth_is_the_slope_of_the_second_half() -> None:
    """Warm-up does not count; 2 MB for 10,000 texts after it."""
    warm = [(texts, 0.0, texts / 10.0) for texts in range(0, 1_000, 100)]
    late = [(texts, 0.0, 100.0 + texts * 2e-4) for texts in range(1_000, 20_001, 500)]
    assert growth_mb([*warm, *late]) == pytest.approx(2.0, rel=0.01)


def test_make_help_fits_a_screen_and_names_every_target() -> None:
    run = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    rules = subprocess.run(["make", "-pqn", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", rules, re.MULTILINE)
    named = {word for line in lines for word in re.split(r"[, ]+", line.split("  ")[0])}
    assert set(phony.split()) - {"help"} <= named


class Path(msgspec.Struct):
    p50_ms: float
    failed: int


class Found(msgspec.Struct):
    seconds: float
    cosine_min: float
    refused: dict[str, int]
    paths: dict[str, Path]
    rounds: dict[str, list[Path]]


def test_figures_print_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure is there, by its field's name, in a table of its kind; what is empty is left out."""
    found = Found(12.5, 0.9999987, {}, {"node": Path(1.25, 3_000)}, {"first": [Path(7.0, 0)]})
    print_figures(found, Console(width=100))
    printed = capsys.readouterr().out
    for words in ("seconds", "12.5", "0.9999987", "p50 ms", "node", "1.25", "3,000", "rounds: first"):
        assert words in printed
    assert "refused" not in printed
