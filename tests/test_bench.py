"""What the benches say of what they measured: verdicts, arithmetic and slopes, on figures that are known."""

import re
import shutil
import subprocess
import sys
from math import inf
from pathlib import Path as FilePath

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench.engine.figures import EXACT, FASTEMBED, NODE, ONNX, Figures, flops, is_settled
from bench.engine.peak import ACCUMULATORS, LOOPS, Peaks, start_state
from bench.engine.rounds import ROUNDS_MAX, ROUNDS_MIN, Rounds, saved_rounds
from bench.engine.targets import targets
from bench.gateway.figures import RATES, AtRate, GatewayRow, found_gates
from bench.gateway.measure import EndsReport, Measured
from bench.rig.command import CannotRun
from bench.rig.figures import Spread, Target, median_interval
from bench.rig.http import Wire, http_request
from bench.rig.processes import OtherWork, cpu_s, kill, wait_for
from bench.rig.tables import print_figures
from bench.soak import growth_mb
from embedmesh.rules.embeddings import COMPACT, VECTORS_HEAD, EmbedVectors, pack_ids
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
    assert Target("what", 2.0, at_least, Spread(found, 0.0, 99.0), slack=0.1).verdict == verdict


def rounds_of(row: str, **taken: list[float]) -> Rounds:
    """Rounds of one row; the names of contenders are `exact`, `FastEmbed` and so on."""
    found = Rounds({"CPU": "this one"})
    for at in range(len(next(iter(taken.values())))):
        found.add(row, {name: seconds[at] for name, seconds in taken.items()})
    return found


def test_a_ratio_is_taken_round_by_round() -> None:
    """A round in which the whole machine was slow tells the same ratio as the others."""
    rounds = rounds_of("S", exact=[1.0, 10.0, 1.0], FastEmbed=[3.0, 30.0, 4.0], onnxruntime=[5.0, 5.0, 5.0])
    ratio = rounds.ratios("S")[0]
    assert (ratio.ours, ratio.theirs, ratio.median) == (EXACT, FASTEMBED, 3.0)
    assert rounds.ratio("S", EXACT, ONNX) is not None
    assert rounds.ratio("S", NODE, EXACT) is None
    assert rounds.ratios("M") == []


def test_exact_is_compared_with_the_best_peer_of_the_row() -> None:
    rounds = rounds_of("L", exact=[2.0] * 6, FastEmbed=[3.0] * 6, onnxruntime=[1.8] * 6)
    found = {target.what: target for target in targets("AVX2", rounds.ratios("L"), [], None, None, None)}
    target = found["L, 256 tokens: exact over onnxruntime (the best peer)"]
    assert (target.found, target.verdict) == (Spread(0.9, 0.9, 0.9), "missed")
    assert found["S: exact over its best peer"].verdict == "not measured"


def test_what_was_not_measured_is_no_promise_kept() -> None:
    """Nor is what was missed; where more rounds might say otherwise, the verdict says so."""
    ratios = rounds_of("L", exact=[2.0, 2.0], FastEmbed=[1.0, 1.5]).ratios("L")
    found = targets("AVX2", ratios, [], None, None, None)
    figures = Figures("this", "AVX2", 2, {}, {}, [], ratios, 0, None, None, None, {}, found)
    missed, unmeasured = figures.broken
    assert missed == (
        "L, 256 tokens: exact over FastEmbed (the best peer): 0.625x instead of 0.95 (too few rounds to say)"
    )
    assert unmeasured == f"{len(found) - 1} targets were not measured"


@pytest.mark.parametrize(
    ("values", "interval"),
    [
        ([1, 2, 3, 4, 5], None),  # both ends enclose the median with 15/16 only
        ([6, 5, 4, 3, 2, 1], (1, 6)),
        ([1, 2, 3, 4, 5, 6, 7, 8], (1, 8)),
        ([1, 2, 3, 4, 5, 6, 7, 8, 99], (2, 8)),  # one wild round tells nothing
    ],
)
def test_between_which_values_the_median_is(values: list[float], interval: tuple[float, float] | None) -> None:
    assert median_interval(values) == interval


def test_rounds_go_on_until_the_ratio_is_settled() -> None:
    """Within a bound: a machine with other work is never settled."""
    steady = [1.0 + 0.001 * at for at in range(ROUNDS_MIN)]
    rounds = rounds_of("512", exact=steady[:-1], FastEmbed=[2.0] * (ROUNDS_MIN - 1))
    assert not rounds.is_done("512")
    rounds.add("512", {EXACT: steady[-1], FASTEMBED: 2.0})
    assert rounds.is_done("512")
    wild = rounds_of("512", exact=[1.0, 2.0] * (ROUNDS_MAX // 2), FastEmbed=[2.0] * ROUNDS_MAX)
    assert not is_settled(wild.ratios("512")[0])
    assert wild.is_done("512")
    wild.rows["512"].pop()
    assert not wild.is_done("512")


def test_a_round_in_which_others_worked_is_not_taken() -> None:
    """Whatever it found: what is dropped must not depend on who looks good in it."""
    rounds = rounds_of("S", exact=[1.0], FastEmbed=[2.0])
    rounds.add("S", {EXACT: 1.0, FASTEMBED: 9.0}, other_work=0.2)
    rounds.add("S", {EXACT: 1.0, FASTEMBED: 3.0}, other_work=0.01)
    assert rounds.taken("S", FASTEMBED) == [2.0, 3.0]
    assert rounds.disturbed == 1


def test_work_of_others_is_told_from_ours() -> None:
    """A child is ours; a process whose parent has ended is another. However busy the machine is besides."""
    loop = "while True: pass"
    orphan = ["sh", "-c", f"'{sys.executable}' -c '{loop}' >/dev/null 2>&1 & echo $!"]
    work = OtherWork()
    other = int(subprocess.run(orphan, stdout=subprocess.PIPE, check=True).stdout)
    with subprocess.Popen([sys.executable, "-c", loop]) as child:
        try:
            assert wait_for(lambda: min(cpu_s([child.pid]), cpu_s([other])) > 0.3, 60.0)
            ours_s, others_s = work.seconds()
            assert ours_s > 0.3
            assert others_s > 0.25  # the kernel's two counts are a tick or two apart
            idle = OtherWork()
            assert wait_for(lambda: idle.seconds()[0] > 0.3, 60.0)  # what it does from now on
        finally:
            kill(other)
            child.kill()


def test_rounds_are_added_to_those_of_the_same_machine_only(tmp_path: FilePath) -> None:
    file = tmp_path / "results" / "rounds.json"
    with pytest.raises(CannotRun, match="run without --add"):
        saved_rounds(file, {"CPU": "this one"})
    rounds_of("S", exact=[1.0], FastEmbed=[2.0]).save(file)
    assert saved_rounds(file, {"CPU": "this one"}).taken("S", FASTEMBED) == [2.0]
    with pytest.raises(CannotRun, match="another CPU"):
        saved_rounds(file, {"CPU": "another"})


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_loop_of_the_peak_does_all_its_multiply_adds() -> None:
    """A compiler that leaves some out would make the peak too high: what is computed is what arithmetic says."""
    flags = frozenset(FilePath("/proc/cpuinfo").read_text().split())
    if not LOOPS["f32_256"].flags <= flags:
        pytest.skip("needs a CPU with AVX2")
    state, turns = start_state("f32_256"), 1_000
    started, last = state[:-16].astype(np.float64), ACCUMULATORS * 8
    Peaks(flags, 1).loop("f32_256")(turns, state.ctypes.data)
    power = float(np.float32(0.999)) ** turns  # s·a + b, again and again, from s
    wanted = started * power + float(np.float32(0.001)) * (1 - power) / (1 - float(np.float32(0.999)))
    assert len(set(state[:last].tolist())) == last  # all different: none was computed for two
    np.testing.assert_allclose(state[:last], wanted, rtol=1e-5)


def test_the_arithmetic_of_a_text() -> None:
    """all-MiniLM-L6-v2, by hand: 21.2 million operations a token in the layers' matrices, and attention on top."""
    matrices = 6 * 2 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert flops(MINILM, [1]) == matrices + 6 * 4 * 384
    assert flops(MINILM, [100, 1]) == 101 * matrices + (100 * 100 + 1) * 6 * 4 * 384


def gateway_row(name: str, cpu_us: float, per_s: float = 100.0, p50_ms: float = 1.0) -> GatewayRow:
    at = [AtRate(rate, p50_ms, 2 * p50_ms) for rate in RATES]
    return GatewayRow(name, per_s, 1.0, 2.0, cpu_us, cpu_us, 1.0, 100.0, 1.0, 0, at)


@pytest.mark.parametrize(
    ("ours", "theirs", "best", "middle", "verdict"),
    [
        ([105.0, 100.0, 220.0], [100.0, 100.0, 200.0], 1.0, 1.05, "pass"),
        ([100.0, 120.0, 120.0], [100.0, 100.0, 100.0], 1.0, 1.2, "not yet"),  # once does not do
        ([120.0, 120.0, 120.0], [100.0, 200.0, 200.0], 1.2, 0.6, "not yet"),  # the peer was disturbed, not we better
        ([100.0], [inf], None, None, "not measured"),  # it gave no right answer
        ([100.0], [], None, None, "not measured"),
    ],
)
def test_a_gate_is_passed_by_the_best_rounds_and_by_the_median(
    ours: list[float], theirs: list[float], best: float | None, middle: float | None, verdict: str
) -> None:
    rounds = {name: [gateway_row(name, x) for x in each] for name, each in (("hold", ours), ("vllm-router", theirs))}
    gate = found_gates(rounds)[0]
    assert (gate.what, gate.verdict) == ("CPU over vllm-router, 1 key", verdict)
    assert [gate.best, gate.middle] == pytest.approx([best, middle])


def test_a_rate_that_is_not_held_passes_nothing() -> None:
    """The times are of those that were answered: of none, they would be zero."""
    load = EndsReport(10, 0, 0, 0, 3.0, 100.0, 100.0, 100.0, 100.0, 100.0)
    at = AtRate.of(RATES[0], Measured(load, 100.0, 100.0))
    assert at.p50_ms == inf
    late = msgspec.structs.replace(gateway_row("hold", 100.0), at=[at, at])
    gates = {gate.what: gate.verdict for gate in found_gates({"hold": [late], "direct": [gateway_row("direct", inf)]})}
    assert gates["p50 added over direct at 200/s, ms"] == "not yet"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_cheap_node_answers_as_a_real_one_does(tmp_path: FilePath) -> None:
    """Byte for byte, at each of its addresses: what a gateway remembers of replies is remembered of these, too."""
    vector = np.arange(4, dtype="<f4")
    for name, data in (("vector", vector.tobytes()), ("models", b"{}"), ("reply", b"{}")):
        (tmp_path / name).write_bytes(data)
    places = [tmp_path / "one.sock", tmp_path / "other.sock"]
    source = CHECKOUT / "bench" / "gateway" / "ends.c"
    subprocess.run(["cc", "-o", str(tmp_path / "ends"), str(source)], check=True)
    files = [str(tmp_path / name) for name in ("vector", "models", "reply")]
    command = [str(tmp_path / "ends"), ",".join(map(str, places)), *files]
    body = msgspec.msgpack.encode(pack_ids("m", [[1, 2, 3], [4]]))
    answer = msgspec.msgpack.encode(EmbedVectors(8, vector.tobytes() * 2))
    # Lengths are in MessagePack's widest form: what is known beforehand of a reply's size.
    answer = answer.replace(b"\xa6tokens\x08\xa4data\xc4\x20", b"\xa6tokens\xce\0\0\0\x08\xa4data\xc6\0\0\0\x20")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as ends:
        for place in places:
            assert wait_for(place.exists, 5.0)
            with Wire(place) as wire:
                wire.send(http_request("POST", "/v1/embeddings", body, headers={"Content-Type": COMPACT}))
                assert wire.read_some() == VECTORS_HEAD + b"%d\r\n\r\n" % len(answer) + answer
        ends.kill()


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
