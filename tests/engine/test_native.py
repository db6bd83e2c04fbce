"""The kernels in C: the vectors of OpenVINO, whatever the sizes, lengths, batches and threads; and what they refuse."""

import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.engine import runtime
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.cpu import cpu_flags
from embedmesh.engine.folder import Folder, read_folder
from embedmesh.engine.native import library
from embedmesh.engine.native.build import CannotBuild, build
from embedmesh.engine.native.family import unsupported
from embedmesh.engine.native.memory import floats
from embedmesh.engine.native.model import NativeModel
from embedmesh.rules.errors import SetupError
from tests.data import model_folder, quick_or
from tests.engine.tiny import POISON, add_module, make_folder, make_weights, textbook, write_json, write_safetensors

OPENVINO_DIFF_MAX = 1e-6  # components of vectors of unit length
CONFIGS = quick_or(40, quick=12)
TOKENS_MAX = 600

needs_kernels = pytest.mark.skipif(library.obstacle() != "", reason=library.obstacle() or "-")


def random_folder(path: Path, dice: np.random.Generator) -> Path:
    """A model of BERT's kind of random sizes and weights, in one of the types that weights come in."""
    kind = str(dice.choice(["bert", "roberta", "xlm-roberta", "distilbert"]))
    heads, width = int(dice.integers(1, 5)), int(dice.choice([4, 8, 16, 24, 32, 64, 80, 128]))
    hidden = heads * width
    while hidden % 16:
        heads, hidden = heads + 1, hidden + width
    middle, layers, vocab = int(dice.integers(1, 30)) * 8, int(dice.integers(1, 4)), 60
    make_folder(path, pooling=str(dice.choice(["mean", "cls"])), max_seq_length=TOKENS_MAX)
    words = {"hidden": "dim", "heads": "n_heads", "layers": "n_layers", "middle": "hidden_dim", "act": "activation"}
    if kind != "distilbert":
        words = {"hidden": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers"}
        words |= {"middle": "intermediate_size", "act": "hidden_act"}
    values = {"hidden": hidden, "heads": heads, "layers": layers, "middle": middle, "act": "gelu"}
    config = {words[name]: value for name, value in values.items()} | {"model_type": kind, "vocab_size": vocab}
    config |= {"max_position_embeddings": TOKENS_MAX + 2, "layer_norm_eps": float(dice.choice([1e-12, 1e-5]))}
    config |= {"type_vocab_size": 2, "pad_token_id": 1}
    write_json(path / "config.json", config)
    write_json(path / "1_Pooling" / "config.json", pooling_config(path, hidden))
    write_safetensors(path / "model.safetensors", random_weights(kind, hidden, middle, layers, vocab, dice))
    return path


def pooling_config(path: Path, hidden: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "1_Pooling" / "config.json").read_text())
    return found | {"word_embedding_dimension": hidden}


def random_weights(
    kind: str, hidden: int, middle: int, layers: int, vocab: int, dice: np.random.Generator
) -> dict[str, np.ndarray]:
    from embedmesh.engine.native.family import KINDS

    names, typed = KINDS[kind].names, KINDS[kind].typed
    stored = str(dice.choice(["float32", "float16", "bfloat16"]))

    def some(*shape: int, spread: float = 0.3) -> np.ndarray:
        array = dice.normal(0, spread, shape).astype(np.float32)
        if stored == "bfloat16":
            return (array.view(np.uint32) >> 16).astype(np.uint16)
        return array.astype(stored)

    shapes = {"embeddings.word_embeddings": (vocab, hidden), "embeddings.position_embeddings": (TOKENS_MAX + 2, hidden)}
    if typed:
        shapes["embeddings.token_type_embeddings"] = (2, hidden)
    weights = {f"{name}.weight": some(*shape) for name, shape in shapes.items()}
    norms = ["embeddings.LayerNorm"]
    for layer in range(layers):
        at = names.layer.format(layer)
        norms += [at + names.mixed_norm, at + names.norm]
        linears = dict.fromkeys((*names.parts, names.mixed), (hidden, hidden))
        for name, (outputs, inputs) in (
            linears | {names.wide: (middle, hidden), names.narrow: (hidden, middle)}
        ).items():
            weights[f"{at}{name}.weight"] = some(outputs, inputs, spread=1 / np.sqrt(inputs))
            weights[f"{at}{name}.bias"] = some(outputs)
    for name in norms:
        weights |= {f"{name}.weight": some(hidden), f"{name}.bias": some(hidden)}
    return weights


def random_texts(dice: np.random.Generator, count: int, tokens_max: int = TOKENS_MAX) -> list[list[int]]:
    """Token ids, the padding token among them; short texts are as likely as long ones."""
    lengths = np.exp(dice.uniform(0, np.log(tokens_max), count)).astype(int)
    return [dice.integers(0, 60, length).tolist() for length in lengths]


@needs_kernels
@pytest.mark.story
@pytest.mark.parametrize("seed", range(CONFIGS))
def test_vectors_are_openvino_s(tmp_path: Path, seed: int) -> None:
    """Of random models, for batches of mixed lengths on one to three threads; and to the bit what they are alone."""
    dice = np.random.default_rng(seed)
    folder = read_folder(random_folder(tmp_path / "model", dice))
    assert unsupported(folder) == ""
    reference = CompiledModel(folder, threads=1)
    texts = [*random_texts(dice, 5), [7] * (1 if seed % 2 else TOKENS_MAX)]
    right = np.concatenate([reference.run([ids], 1, len(ids)) for ids in texts])
    models = [NativeModel(folder, threads) for threads in (1, 2, 3)]
    alone = np.concatenate([models[0].run([ids], 1, len(ids)) for ids in texts])
    assert np.abs(alone - right).max() <= OPENVINO_DIFF_MAX
    for model in models:
        order = dice.permutation(len(texts))
        together = model.run([texts[at] for at in order], rows=len(texts), length=TOKENS_MAX)
        assert np.array_equal(together, alone[order])
        model.close()


@needs_kernels
def test_vectors_are_the_textbook_s(tmp_path: Path) -> None:
    """Heads of 4 and a middle of 24, which are padded; with dense layers and without unit length."""
    for pooling in ("mean", "cls"):
        model = NativeModel(read_folder(make_folder(tmp_path / pooling, pooling=pooling, normalize=False)), threads=2)
        for ids in ([2, 3], [2, 9, 8, 7, 3], list(range(2, 50))):
            right = textbook(ids, make_weights(), pooling=pooling, normalize=False)
            assert np.abs(model.run([ids], 1, 48)[0] - right).max() <= 1e-5


@needs_kernels
@pytest.mark.parametrize("activation", ["Identity", "Tanh"])
def test_dense_layers_follow_the_pooling(tmp_path: Path, activation: str) -> None:
    path = make_folder(tmp_path / "tiny", normalize=False)
    kind = "linear.Identity" if activation == "Identity" else "activation.Tanh"
    config = {"in_features": 16, "out_features": 5, "bias": True, "activation_function": f"torch.nn.modules.{kind}"}
    dense = add_module(path, "Dense", config)
    dice = np.random.default_rng(3)
    weights = {"linear.weight": dice.normal(0, 0.1, (5, 16)), "linear.bias": dice.normal(0, 0.1, 5)}
    write_safetensors(dense / "model.safetensors", {name: each.astype(np.float32) for name, each in weights.items()})
    folder, texts = read_folder(path), [[2, 5, 6, 3], [2, 9, 3]]
    right = CompiledModel(folder, threads=1).run(texts, 2, 4)
    assert np.abs(NativeModel(folder, threads=1).run(texts, 2, 4) - right).max() <= OPENVINO_DIFF_MAX


@needs_kernels
def test_what_is_no_number_stays_in_its_text(tmp_path: Path) -> None:
    """The vector of a text that breaks the model is no number; its neighbours' are what they are alone."""
    model = NativeModel(read_folder(make_folder(tmp_path / "tiny")), threads=2)
    texts = [[2, 5, 3], [2, POISON, 6, 7, 3], [2, 8, 9, 3]]
    vectors = model.run(texts, 3, 8)
    assert np.isnan(vectors[1]).all()
    for at in (0, 2):
        assert np.array_equal(vectors[at], model.run([texts[at]], 1, 4)[0])


@needs_kernels
@pytest.mark.model
def test_one_text_of_every_length(tmp_path: Path) -> None:
    """Of the default model: lengths around the kernels' blocks, of rows, of queries, of tokens a thread."""
    folder = read_folder(model_folder())
    native, reference = NativeModel(folder, threads=2), CompiledModel(folder, threads=2)
    dice = np.random.default_rng(5)
    for length in (1, 5, 6, 7, 15, 16, 17, 95, 96, 97, 193, 255, 256, 257, 384, 512):
        ids = dice.integers(1_000, 30_000, length).tolist()
        assert np.abs(native.run([ids], 1, length) - reference.run([ids], 1, length)).max() <= OPENVINO_DIFF_MAX


@needs_kernels
@pytest.mark.parametrize(
    "texts", [[], [[]], [[2, 3], []], [[-1]], [[2, 55]], [[2**31]], [[2] * 65], [[2] * 64] * 2_049]
)
def test_what_has_no_row_is_refused(tmp_path: Path, texts: list[list[int]]) -> None:
    """Before anything is computed; the model runs on."""
    model = NativeModel(read_folder(make_folder(tmp_path / "tiny")), threads=1)
    before = model.run([[2, 5, 3]], 1, 4)
    with pytest.raises((ValueError, OverflowError)):
        model.run(texts, len(texts), 4)
    assert np.array_equal(model.run([[2, 5, 3]], 1, 4), before)


@needs_kernels
def test_threads_end_with_their_model(tmp_path: Path) -> None:
    """Models come and go, also at once and without a run; none leaves a thread behind."""
    folder = read_folder(make_folder(tmp_path / "tiny"))
    before = kernel_threads()
    models = [NativeModel(folder, threads=3) for _ in range(4)]
    assert kernel_threads() == before + 4 * 2
    right = models[0].run([[2, 5, 3]], 1, 4)
    for model in models:
        assert np.array_equal(model.run([[2, 5, 3]], 1, 4), right)
        model.close()
    models.clear()
    assert kernel_threads() == before
    for _ in range(200):
        library.load().embedmesh_end(library.load().embedmesh_start(3))
    assert kernel_threads() == before


def kernel_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@needs_kernels
def test_two_models_run_at_one_time(tmp_path: Path) -> None:
    """In threads of their own, more of them than cores: each gets its own vectors, every time."""
    folder = read_folder(make_folder(tmp_path / "tiny"))
    texts = [[2, *range(4, 4 + count), 3] for count in range(1, 30)]
    right = NativeModel(folder, threads=1).run(texts, len(texts), 32)
    wrong: list[int] = []

    def run_often(model: NativeModel) -> None:
        wrong.append(sum(not np.array_equal(model.run(texts, len(texts), 32), right) for _ in range(100)))

    runners = [threading.Thread(target=run_often, args=[NativeModel(folder, threads=3)]) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert wrong == [0, 0, 0]


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from embedmesh.engine.folder import read_folder
from embedmesh.engine.native.model import NativeModel
folder = read_folder(Path(sys.argv[1]))
model = NativeModel(folder, 2)
before = model.run([[2, 5, 3]], 1, 4)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**20, resource.RLIM_INFINITY))
try:
    model.run([[2] * 64] * 2_000, 2_000, 64)
except MemoryError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("same" if (model.run([[2, 5, 3]], 1, 4) == before).all() else "other")
"""


@needs_kernels
@pytest.mark.story
def test_a_run_without_memory_fails_and_the_next_is_right(tmp_path: Path) -> None:
    """It raises MemoryError, never a wrong vector."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(make_folder(tmp_path / "tiny"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("refused: ")
    assert done.stdout.endswith("same\n")


def test_too_much_memory_is_refused() -> None:
    """More than any machine has."""
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 0
    with pytest.raises(MemoryError, match="no memory for"):
        floats(2**60)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"hidden_act": "gelu_new"}, "activation is gelu_new"),
        ({"hidden_size": 24, "num_attention_heads": 4}, "hidden size is 24"),
        ({"hidden_size": 160, "num_attention_heads": 1}, "heads are 160 wide"),
        ({"position_embedding_type": "alibi"}, "not understood"),
        ({"model_type": "mpnet"}, "not of BERT's kind"),
        ({}, ""),
    ],
)
def test_what_the_kernels_take(tmp_path: Path, members: dict[str, Any], says: str) -> None:
    """By the folder's settings alone; all else is OpenVINO's."""
    assert says in unsupported(changed(tmp_path, members))
    assert (says == "") == (unsupported(changed(tmp_path, members)) == "")


def changed(path: Path, members: dict[str, Any]) -> Folder:
    folder = make_folder(path / "tiny")
    config = json.loads((folder / "config.json").read_text()) | members
    write_json(folder / "config.json", config)
    write_json(folder / "1_Pooling" / "config.json", pooling_config(folder, config["hidden_size"]))
    return read_folder(folder)


def test_other_poolings_are_openvino_s(tmp_path: Path) -> None:
    assert unsupported(read_folder(make_folder(tmp_path / "tiny", pooling="max"))) == "the pooling is max"


@needs_kernels
@pytest.mark.parametrize(
    ("forced", "flags", "tier", "engine", "why"),
    [
        ("", "avx2 fma", "exact", "native", "AVX2"),
        ("", "avx2 fma avx512f", "exact", "openvino", "AVX-512"),
        ("", "avx2", "exact", "openvino", "no FMA"),
        ("", "", "exact", "openvino", "no AVX2"),
        ("", "avx2 fma", "fast", "openvino", "tier exact only"),
        ("openvino", "avx2 fma", "exact", "openvino", "EMBEDMESH_ENGINE"),
        ("native", "avx2 fma avx512f", "exact", "native", "EMBEDMESH_ENGINE"),
    ],
)
def test_the_engine_by_cpu_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: str, flags: str, tier: Any, engine: str, why: str
) -> None:
    set_machine(monkeypatch, flags, forced)
    choice = runtime.choose_engine(read_folder(make_folder(tmp_path / "tiny")), tier)
    assert choice.engine == engine
    assert why in choice.why


@needs_kernels
def test_an_engine_that_cannot_be_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the setting, and why."""
    folder = read_folder(make_folder(tmp_path / "tiny", pooling="max"))
    for flags, forced, says in (
        ("avx2 fma", "native", "pooling"),
        ("sse2", "native", "AVX2"),
        ("avx2", "fast", "'fast'"),
    ):
        set_machine(monkeypatch, flags, forced)
        with pytest.raises(SetupError, match=f"EMBEDMESH_ENGINE.*{says}"):
            runtime.choose_engine(folder)


def set_machine(monkeypatch: pytest.MonkeyPatch, flags: str, forced: str) -> None:
    """Have the CPU look so; what is built stays."""
    for module in (runtime, library):
        monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setenv("EMBEDMESH_ENGINE", forced)


@needs_kernels
def test_make_model_runs_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = read_folder(make_folder(tmp_path / "tiny"))
    kinds = {"native": NativeModel, "openvino": CompiledModel}
    for engine, kind in kinds.items():
        monkeypatch.setenv("EMBEDMESH_ENGINE", engine)
        model = runtime.make_model(folder, 1, "exact")
        assert type(model) is kind
        assert (
            np.abs(
                model.run([[2, 5, 3]], 1, 4)[0] - textbook([2, 5, 3], make_weights(), pooling="mean", normalize=True)
            ).max()
            < 1e-5
        )


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif("avx2" not in cpu_flags(), reason="not x86-64 with AVX2")
def test_the_library_can_be_built_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, or not at all and with the reason."""
    assert build(tmp_path / "encoder.so").stat().st_size > 10_000
    for compiler, says in (("false", "failed"), ("no-such-compiler", "did not run")):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(CannotBuild, match=says):
            build(tmp_path / "other.so")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.so"]


@pytest.mark.skipif("avx2" not in cpu_flags(), reason="not x86-64 with AVX2")
@pytest.mark.story
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_access_is_out_of_bounds_and_no_two_race(tmp_path: Path, sanitizer: str) -> None:
    """As the compiler's sanitizers see it, for models of random sizes with no float to spare, on 1 to 4 threads."""
    options = ["-std=c11", "-O1", "-mavx2", "-mfma", "-pthread", "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}"]
    program = tmp_path / "driver"
    command = ["cc", *options, str(Path(__file__).with_name("encoder_driver.c")), "-o", str(program), "-lm"]
    if shutil.which("cc") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"no compiler with -fsanitize={sanitizer}")
    command = [str(program), str(quick_or(25, quick=9))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
