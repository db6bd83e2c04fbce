"""What a model will take and do here, from the headers of its files: nothing is loaded, and no numbers are read.

Memory of an engine's process, in bytes, as `VmRSS` counts it:

    resident = BASE + packed + activations + kernels          loading = BASE + packed + NOT_YET_RELEASED

* packed: OpenVINO's own copy of every linear layer, in the numbers of the tier. Tables that are looked up are not
  copied: they are pages of the file, and the system takes them back when it needs memory.
* activations: the states of the largest batch. A layer's arrays are used again by the next, so that the number of
  layers does not matter: WIDTHS_ALIVE numbers of the hidden width a token were counted. Where near tokens or positions
  bias the scores, there is a number a pair of tokens more. Attention itself never has all its scores in memory.
* kernels: OpenVINO keeps some for each shape of a batch, of which there are the more the longer texts may be.
* float16 and bfloat16 weights are widened in a file (`embedmesh.engine.widened`); where no disk has room, in memory.

Speed, in tokens a second of one text of LENGTH tokens:

    tokens_per_s = cores x FLOPS_A_CORE / (2 x numbers in linear layers + 4 x length x hidden width x layers)

which counts a multiplication and an addition for each weight and token, and for each pair of tokens twice a component
(scores, and their mixture). FLOPS_A_CORE is what the engine reached on two cores of an AMD EPYC; other machines are
often 0.7 to 1.5 times that. It is an estimate: only a measurement says how fast a machine is.
"""

from pathlib import Path
from typing import NamedTuple

from embedmesh.engine.digest import size_bytes
from embedmesh.engine.folder import Folder
from embedmesh.engine.layout import ARCHITECTURES
from embedmesh.engine.plan import BATCH_TOKENS_MAX, pad_length, shapes
from embedmesh.engine.safetensors import FLOAT_DTYPES, INTEGER_DTYPES, Weights
from embedmesh.engine.widened import has_room, places
from embedmesh.rules.models import Tier

CPU_INFO = Path("/proc/cpuinfo")
BASE_BYTES = 107_000_000  # Python and OpenVINO's library
KERNELS_BYTES = 1_000_000  # of a shape: all of MiniLM's 72 took 93 MB, its activations included
NOT_YET_RELEASED_BYTES = 20_000_000  # pages that are read and not given back yet
PACKED_BYTES: dict[Tier, float] = {"exact": 4, "fast": 2, "int8": 1.25}  # a number; int8 leaves some layers in bfloat16
STATE_BYTES = 4
WIDTHS_ALIVE, WIDTHS_ALIVE_ROTARY = 11, 31  # hidden widths a token, counted at 2,048 and 8,192 tokens
ROTARY = ("modernbert", "nomic_bert", "gte", "new")
PAIRWISE = {"modernbert": 1, "mpnet": 12}  # numbers a pair of tokens: a mask, or a bias of each head
ONNX_COPIES = 2.0  # OpenVINO's reader holds the file's numbers beside their packed copy
LENGTH = 256  # of the text that speed is told for
FLOPS_A_CORE = {"avx512f": 70e9, "avx2": 43e9, "": 12e9}  # by what the CPU has, the first that fits
TABLES = ("embeddings.", "lm_head.", "decoder.")  # in names: what is looked up, and heads that nothing uses
UNPACKED = (*TABLES, "pooler.", "head.", "classifier.")  # and of models that make vectors


class Sizes(NamedTuple):
    """Numbers in linear layers; of those, and of tables in bfloat16, how many are widened; and the model's form."""

    linear: int
    widened: int
    layers: int
    hidden: int

    def flops(self, length: int) -> float:
        """Operations a token of a text of `length` tokens."""
        return 2.0 * self.linear + 4.0 * length * self.hidden * self.layers


class Estimate(NamedTuple):
    """Bytes that an engine will have once it serves, and at most while it loads; tokens a second, None if not known."""

    memory_bytes: int
    loading_bytes: int
    tokens_per_s: int | None

    @property
    def peak_bytes(self) -> int:
        """The more of the two."""
        return max(self.memory_bytes, self.loading_bytes)


def estimate(folder: Folder, tier: Tier = "exact", cores: int = 1) -> Estimate:
    """Of a model on `cores` cores of this machine. Raises SetupError where its weights cannot be read."""
    sizes = measure(folder)
    packed = sizes.linear * PACKED_BYTES[tier]
    if folder.source == "onnx":
        packed *= ONNX_COPIES
    if sizes.widened and not has_room(places(folder.transformer), sizes.widened * STATE_BYTES):
        packed += sizes.widened * STATE_BYTES
    loading = BASE_BYTES + packed + min(NOT_YET_RELEASED_BYTES, packed)
    speed = None
    if sizes.linear:
        length = min(LENGTH, folder.max_tokens)
        speed = round(cores * flops_a_core() / sizes.flops(length))
    kernels = KERNELS_BYTES * len(set(shapes(folder.max_tokens)))
    resident = BASE_BYTES + packed + activation_bytes(folder, sizes) + kernels
    return Estimate(round(resident), round(loading), speed)


def measure(folder: Folder) -> Sizes:
    """Count the numbers of a folder's weights. Raises SetupError."""
    layers, hidden = _form(folder)
    if folder.source == "onnx":
        return Sizes(size_bytes(folder.path) // STATE_BYTES, 0, layers, hidden)
    linear = widened = 0
    weights = Weights(folder.transformer)
    unpacked = TABLES if folder.reranks else UNPACKED
    for name, entry in weights.entries():
        if len(entry.shape) != 2 or entry.dtype not in FLOAT_DTYPES | INTEGER_DTYPES:
            continue
        numbers = entry.shape[0] * entry.shape[1]
        table = folder.source == "static" or any(part in name for part in unpacked)
        linear += 0 if table else numbers
        if entry.dtype == "I8" or (entry.dtype in ("F16", "BF16") and not (table and entry.dtype == "F16")):
            widened += numbers
    return Sizes(linear + sum(each.inputs * each.outputs for each in folder.dense), widened, layers, hidden)


def activation_bytes(folder: Folder, sizes: Sizes) -> int:
    """The states of the largest batch."""
    length = pad_length(folder.max_tokens)
    tokens = max(BATCH_TOKENS_MAX, length)
    alive = WIDTHS_ALIVE_ROTARY if folder.model_type in ROTARY else WIDTHS_ALIVE
    pairs = PAIRWISE.get(folder.model_type, 0) * tokens * length
    return STATE_BYTES * (alive * sizes.hidden * tokens * bool(sizes.layers) + pairs)


def flops_a_core(cpuinfo: Path = CPU_INFO) -> float:
    """What a core of this CPU will reach in float32."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        return FLOPS_A_CORE["avx2"]  # not Linux: a recent one, such as Apple's
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return next(flops for flag, flops in FLOPS_A_CORE.items() if not flag or flag in flags)


def _form(folder: Folder) -> tuple[int, int]:
    """Layers and hidden width; no layers where the config does not say."""
    config = folder.config
    names = ("num_hidden_layers", "n_layers", "n_layer")
    layers = next((config[name] for name in names if type(config.get(name)) is int), 0)
    widths = ARCHITECTURES[folder.model_type].width if folder.model_type in ARCHITECTURES else ("hidden_size",)
    hidden = next((config[name] for name in widths if type(config.get(name)) is int), folder.width)
    return (0 if folder.source == "static" else layers), hidden
