"""The tiers: which numbers a graph is computed in, and what a CPU must have for that. The machine never chooses.

* exact: float32 throughout.
* fast: bfloat16 products, summed in float32. OpenVINO says that it can do so wherever there is AVX-512, and then
  imitates it slowly; here the CPU must have the instruction itself.
* int8: as fast, but most linear layers multiply 8-bit integers, as `int8.json` in the model folder says. Their sums are
  exact 32-bit integers on a CPU with VNNI or AMX; older instructions saturate at 16 bits, so such CPUs are refused.

So vectors of a tier differ between CPUs only by the order of sums in float32, never by a silent choice.
"""

import openvino as ov

from embedmesh.engine.cpu import cpu_flags
from embedmesh.engine.threads import engine_threads
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import TIERS, Tier

BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # Linux's names for hardware that multiplies bfloat16
INT8_FLAGS = {"avx512_vnni", "amx_int8"}  # and 8-bit integers into 32-bit sums
KERNELS_CACHED_MAX = 1_024  # of each kind; the planner's shapes are far fewer, so that no kernel is made twice
PRECISION_HINTS: dict[Tier, str] = {"exact": "f32", "fast": "bf16", "int8": "bf16"}


def tiers_here() -> tuple[Tier, ...]:
    """The tiers that this CPU has the instructions for, in the order of TIERS."""
    return tuple(tier for tier in TIERS if not _missing(tier))


def check_cpu(tier: Tier) -> None:
    """Raises SetupError, in one line, where this CPU lacks the instructions of the tier."""
    if missing := _missing(tier):
        raise SetupError(f"This CPU cannot serve the tier {tier!r}: it has no {missing}. Serve the tier 'exact' here.")


def compile_graph(graph: ov.Model, threads: int, tier: Tier) -> ov.CompiledModel:
    """Compiled for the CPU. Raises SetupError where this CPU cannot do it. For int8 the graph says what is 8 bits.

    One stream over all threads: as fast as two streams, with half the latency and memory. `threads` 0 means what the
    machine lets us use; OpenVINO by itself takes no notice of a CPU quota. The precision is always set: its default
    depends on the machine, and so would the vectors.

    Threads are bound to no core: OpenVINO would bind those of every engine to the same ones, so that two engines, or
    two containers of one machine, wait for each other beside cores that are idle.
    """
    check_cpu(tier)
    options: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[tier],
        "EXECUTION_MODE_HINT": "ACCURACY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": engine_threads(threads).number,
        "CPU_RUNTIME_CACHE_CAPACITY": KERNELS_CACHED_MAX,
    }
    return ov.Core().compile_model(graph, "CPU", options)


def _missing(tier: Tier) -> str:
    """In words what this CPU lacks for a tier; nothing if it has all."""
    flags = cpu_flags()
    if tier != "exact" and not flags & BF16_FLAGS:
        return "bfloat16 instructions (AVX512_BF16 or AMX)"
    if tier == "int8" and not flags & INT8_FLAGS:
        return "8-bit integer instructions (AVX512_VNNI or AMX)"
    return ""
