"""The tiers: which numbers a graph is computed in, and what a CPU must have for that. The machine never chooses.

* exact: float32 throughout.
* fast: bfloat16 products, summed in float32. OpenVINO says that it can do so wherever there is AVX-512, and then
  imitates it slowly; here the CPU must have the instruction itself.
* int8: most linear layers multiply 8-bit integers, as `int8.json` in the model folder says. What is left is bfloat16 or
  float32, as it says too. The integers' sums are exact 32-bit ones on a CPU with VNNI or AMX. Older instructions
  saturate at 16 bits and are slower than float32 (docs/decisions/0037-int8-needs-vnni.md), so such CPUs are refused.

So vectors of a tier differ between CPUs only by the order of sums in float32, never by a silent choice.
"""

from typing import TYPE_CHECKING, Literal

from embedmesh.engine.cpu import cpu_flags
from embedmesh.engine.threads import engine_threads
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import TIERS, Tier

if TYPE_CHECKING:  # which tiers there are is known without OpenVINO and its half a second
    import openvino as ov

Rest = Literal["bfloat16", "float32"]
"""What an int8 model computes in outside of its 8-bit products."""

BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # Linux's names for hardware that multiplies bfloat16
INT8_FLAGS = {"avx512_vnni", "amx_int8"}  # and 8-bit integers into 32-bit sums
BF16_WORDS = "bfloat16 instructions (AVX512_BF16 or AMX)"
INT8_OVERLAP_MIN = 97.0  # percent of each text's 10 nearest that are those of exact; bfloat16 alone finds 99
INT8_WORDS = "8-bit integer instructions (AVX512_VNNI or AMX)"
KERNELS_CACHED_MAX = 1_024  # of each kind; the planner's shapes are far fewer, so that no kernel is made twice
PRECISION_HINTS: dict[Tier | Rest, str] = {"exact": "f32", "fast": "bf16", "bfloat16": "bf16", "float32": "f32"}


def tiers_here() -> tuple[Tier, ...]:
    """The tiers that this CPU has the instructions for, in the order of TIERS; int8 perhaps with float32 only."""
    return tuple(tier for tier in TIERS if not _missing(tier, "float32"))


def missing_here() -> dict[Tier, str]:
    """What this CPU lacks for each tier that it cannot serve, in words."""
    return {tier: missing for tier in TIERS if (missing := _missing(tier, "float32"))}


def check_cpu(tier: Tier, rest: Rest = "float32") -> None:
    """Raises SetupError, in one line, where this CPU lacks the instructions of the tier, for int8 with this `rest`."""
    missing = _missing(tier, rest)
    if not missing:
        return
    what = f"This CPU cannot serve the tier {tier!r}: it has no {missing}"
    if tier == "int8" and missing == BF16_WORDS:
        raise SetupError(
            f"{what}, which this folder's layers of {rest} need. Make another folder with `embedmesh models quantize"
            " --rest float32`, or serve the tier 'exact' here."
        )
    if tier == "int8":
        raise SetupError(f"{what}, without which 8 bits are slower than float32. Serve the tier 'exact' here.")
    raise SetupError(f"{what}. Serve the tier 'exact' here.")


def compile_graph(graph: "ov.Model", threads: int, tier: Tier, rest: Rest = "float32") -> "ov.CompiledModel":
    """Compiled for the CPU. Raises SetupError where this CPU cannot do it. For int8 the graph says what is 8 bits.

    One stream over all threads: as fast as two streams, with half the latency and memory. `threads` 0 means what the
    machine lets us use; OpenVINO by itself takes no notice of a CPU quota. The precision is always set: its default
    depends on the machine, and so would the vectors.

    Threads are bound to no core: OpenVINO would bind those of every engine to the same ones, so that two engines, or
    two containers of one machine, wait for each other beside cores that are idle.
    """
    import openvino as ov

    check_cpu(tier, rest)
    options: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[rest if tier == "int8" else tier],
        "EXECUTION_MODE_HINT": "ACCURACY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": engine_threads(threads).number,
        "CPU_RUNTIME_CACHE_CAPACITY": KERNELS_CACHED_MAX,
    }
    return ov.Core().compile_model(graph, "CPU", options)


def _missing(tier: Tier, rest: Rest) -> str:
    """In words what this CPU lacks for a tier; nothing if it has all."""
    flags = cpu_flags()
    if tier == "int8" and not flags & INT8_FLAGS:
        return INT8_WORDS
    if (tier == "fast" or (tier == "int8" and rest == "bfloat16")) and not flags & BF16_FLAGS:
        return BF16_WORDS
    return ""
