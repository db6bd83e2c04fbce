"""The folders that contenders load: the default model for texts of 512 tokens, with `int8.json`, and as ONNX."""

import shutil
from os import symlink
from pathlib import Path

import msgspec

from bench.engine.rounds import engine_digest
from bench.quality import with_int8
from bench.rig.install import HOME, install, run_step
from embedmesh.engine.layout import INT8_FILE

SENTENCE_FILE = "sentence_bert_config.json"
TOKENS = 512  # what the default model's positions allow; its own config says 256
MODELS = HOME / "models"
DIGEST_CHARS = 12


def takes_512(model: Path) -> Path:
    """`model` as links, but with texts of 512 tokens allowed: by its config, and so for all contenders."""
    folder = MODELS / f"{model.name}-{TOKENS}"
    if not (folder / SENTENCE_FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder, copy_function=symlink, ignore=shutil.ignore_patterns(SENTENCE_FILE))
        config = msgspec.json.decode((model / SENTENCE_FILE).read_bytes()) | {"max_seq_length": TOKENS}
        (folder / SENTENCE_FILE).write_bytes(msgspec.json.encode(config))
    return folder


def has_int8(model: Path) -> Path:
    """`model` as links, with an `int8.json` by today's engine. Takes a minute at the first time."""
    folder = MODELS / f"{model.name}-int8-{engine_digest()[:DIGEST_CHARS]}"
    if not (folder / INT8_FILE).exists():
        with with_int8(model) as made:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model, folder, copy_function=symlink)
            shutil.copyfile(made / INT8_FILE, folder / INT8_FILE)
    return folder


def as_onnx(model: Path) -> Path:
    """`model` with an ONNX form of its weights, exported by sentence-transformers' torch. Raises NotInstalled."""
    python, folder = install("sentence-transformers"), HOME / "onnx" / model.name
    if not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        part = folder / "model.onnx.part"
        run_step([str(python), str(Path(__file__).with_name("export.py")), str(model), str(part)])
        part.rename(folder / "model.onnx")
    return folder
