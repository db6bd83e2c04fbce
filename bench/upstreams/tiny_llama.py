"""A tiny random llama as a float32 GGUF, for llama.cpp: `python -m bench.upstreams.tiny_llama OUT.gguf`.

It has a vocabulary of bytes and letters, and a chat template of its own. What it says means nothing, and is the same
each time at temperature 0. It never ends by itself: only letters have any weight in its output.
"""

import string
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.upstreams.gguf import BOOL, F32, I32, STR, U32, array, field, write

LAYERS, WIDTH, HEADS, INNER = 2, 64, 4, 128
CONTEXT = 4_096  # tokens
SEED = 17
UNKNOWN, BEGIN, END = 0, 1, 2
SPECIALS = ("<unk>", "<s>", "</s>")
NORMAL, UNKNOWN_KIND, CONTROL, BYTE = 1, 2, 3, 6  # kinds of tokens
LETTERS = ["\u2581", *string.ascii_letters, *"0123456789.,;:!?-"]  # the first is a blank, as llama.cpp writes it
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = [*SPECIALS, *BYTES, *LETTERS]
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

Tensor = tuple[str, tuple[int, ...], bytes]


def make(out: Path) -> None:
    """Write it."""
    write(out, _fields(), list(_tensors()))


def _fields() -> list[bytes]:
    kinds = [UNKNOWN_KIND, CONTROL, CONTROL, *[BYTE] * len(BYTES), *[NORMAL] * len(LETTERS)]
    sizes = {
        "vocab_size": len(TOKENS),
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "rope.dimension_count": WIDTH // HEADS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
    }
    return [
        field("general.architecture", STR, "llama"),
        field("general.type", STR, "model"),
        field("general.name", STR, "tiny-llama"),
        field("general.file_type", U32, 0),
        *(field(f"llama.{name}", U32, size) for name, size in sizes.items()),
        field("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        field("tokenizer.ggml.model", STR, "llama"),
        array("tokenizer.ggml.tokens", STR, TOKENS),
        array("tokenizer.ggml.scores", F32, [0.0] * len(TOKENS)),
        array("tokenizer.ggml.token_type", I32, kinds),
        field("tokenizer.ggml.unknown_token_id", U32, UNKNOWN),
        field("tokenizer.ggml.bos_token_id", U32, BEGIN),
        field("tokenizer.ggml.eos_token_id", U32, END),
        field("tokenizer.ggml.add_bos_token", BOOL, True),
        field("tokenizer.ggml.add_space_prefix", BOOL, False),
        field("tokenizer.chat_template", STR, TEMPLATE),
    ]


def _tensors() -> Iterator[Tensor]:
    dice = np.random.default_rng(SEED)

    def random(name: str, *shape: int) -> Tensor:
        return name, shape, dice.normal(0.0, 1.0 / np.sqrt(shape[-1]), shape).astype("<f4").tobytes()

    def ones(name: str) -> Tensor:
        return name, (WIDTH,), np.ones(WIDTH, "<f4").tobytes()

    yield random("token_embd.weight", len(TOKENS), WIDTH)
    for at in range(LAYERS):
        yield ones(f"blk.{at}.attn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield random(f"blk.{at}.{name}.weight", WIDTH, WIDTH)
        yield ones(f"blk.{at}.ffn_norm.weight")
        yield random(f"blk.{at}.ffn_gate.weight", INNER, WIDTH)
        yield random(f"blk.{at}.ffn_up.weight", INNER, WIDTH)
        yield random(f"blk.{at}.ffn_down.weight", WIDTH, INNER)
    yield ones("output_norm.weight")
    output = dice.normal(0.0, 1.0, (len(TOKENS), WIDTH)).astype("<f4")
    output[: len(SPECIALS) + len(BYTES)] = 0.0
    yield "output.weight", output.shape, output.tobytes()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
