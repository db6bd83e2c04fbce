"""Whatever body a key without money sends, refusing it costs little: CPU, memory, and moments of the event loop."""

import random
import string
import time
import tracemalloc
from collections.abc import Awaitable, Generator
from typing import Any

import msgspec
import pytest

from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.flow.paid import serve
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import RequestHead
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from tests.engine.tiny import make_folder
from tests.flow.world import EMBEDDINGS, MODEL, PENNY_KEY, POOR_KEY, ScriptedWorld, Shift3, make_world, undelivered

DECODES_MAX = 3  # CPU, in times of decoding 4 MiB of ids on this machine now, 25 to 50 ms; the worst body takes 2.2
MEMORY_BYTES_MAX = 16_000_000  # above the body
HELD_S_MAX = 0.005  # in one step on the event loop
TRIES_MAX = 6  # the least of them counts: others run on this machine, too
LARGEST = "4 MiB"
SIZES = {"100 kB": 100_000, "all but large": 262_144, LARGEST: REQUEST_BODY_BYTES_MAX}

DICE = random.Random(13)
HOSTILE = " ".join("".join(DICE.choices(string.ascii_lowercase, k=99)) for _ in range(800)).encode()
IDS = ",".join(str(1_000 + number % 90_000) for number in range(50_000)).encode() + b","
YARDSTICK = b"[" + (IDS * 15)[: REQUEST_BODY_BYTES_MAX - 8].rpartition(b",")[0] + b"]"
TEXTS = {
    "marks": b"!",
    "random words": HOSTILE,
    "random words with accents": HOSTILE.replace(b"a", "é".encode()),
    "one word": b"a",
    "one word with accents": "é".encode(),
    "spaces": b" ",
    "ideographs": "日".encode(),
    "smileys": "\U0001f600".encode(),
    "a smiley and letters": "\U0001f600".encode() + b"w1 " * 10_000_000,
    "escaped accents": b"\\u00e9",
    "escaped smileys": b"\\ud83d\\ude00",
    "escaped lines": b"\\n",
    "escaped quotes": b'\\"',
    "backslashes": b"\\\\",
    "added tokens": b"[MASK][SEP]",
    "no UTF-8": b"\xff",
    "half a pair": b"\\ud83d ",
}
LISTS = {
    "ids": IDS,
    "ids of one digit": b"1,",
    "huge numbers": b"9" * 1_000 + b",",
    "fractions": b"1.5e300,",
    "empty texts": b'"",',
    "short texts": b'"a b",',
    "texts of 2 kB": b'"' + HOSTILE[:2_000] + b'",',
    "arrays": b"[],",
    "arrays of ids": b"[1,2,3],",
    "objects": b"{},",
    "nulls": b"null,",
    "spaces": b"\n",
}


def body_of(kind: str, size: int) -> bytes:
    """As large as that, or a little smaller."""
    before, fill, after = b'{"model":"tiny","input":', b"", b"}"
    what, _, name = kind.partition(": ")
    if what == "text":
        before, fill, after = before + b'"', TEXTS[name], b'"}'
    elif what == "cut":
        before, fill, after = b'{"truncate":"start","model":"tiny","input":"', TEXTS[name], b'"}'
    elif what == "list":
        before, fill, after = before + b"[", LISTS[name], b"1]}"
    elif what == "deep":
        half = b"[" * (size // 2 - 50)
        return before + half + half.replace(b"[", b"]") + after
    elif what == "member":
        before, fill, after = b'{"input":"a","model":"tiny","' + name.encode() + b'":"', b"x", b'"}'
    elif what == "name":
        before, fill, after = b'{"input":"a","', b"x", b'":1}'
    elif what == "names":
        before, after = b'{"input":"a"', b"}"
        fill = b"".join(b',"%x":1' % number for number in range(size // 5))
    elif what == "number":
        before, fill, after = b'{"model":"tiny","input":"a","dimensions":', b"9", b"}"
    room = size - len(before) - len(after)
    filled = (fill * (room // len(fill) + 1))[:room] if len(fill) <= 2 else fill * (room // len(fill)) or fill[:room]
    if what == "names":
        filled = filled[:room].rpartition(b",")[0]
    return before + filled + after


KINDS = [
    *(f"text: {name}" for name in TEXTS),
    *(f"cut: {name}" for name in ("marks", "random words", "spaces", "smileys")),
    *(f"list: {name}" for name in LISTS),
    *(f"member: {name}" for name in ("model", "user", "truncate", "input_type", "encoding_format")),
    "deep: arrays",
    "name: long",
    "names: many",
    "number: long",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    made = ModelTokenizer(make_folder(tmp_path_factory.mktemp("model") / "tiny"), MODEL.max_tokens)
    made.ids(["w1"])
    return made


@pytest.fixture
def world(tokenizer: ModelTokenizer) -> ScriptedWorld:
    return msgspec.structs.replace(make_world(decoder=Shift3()), tokenizers={MODEL.id: tokenizer})


class Stepped(Awaitable[Any]):
    """Runs a coroutine and measures its longest step, in seconds of the event loop's own CPU time."""

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine
        self.held_s = 0.0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._coroutine.__await__()
        while True:
            begun = time.thread_time()
            try:
                waits_for = next(steps)
            except StopIteration as end:
                return end.value
            finally:
                self.held_s = max(self.held_s, time.thread_time() - begun)
            yield waits_for


async def refuse(world: ScriptedWorld, key: str, body: bytes) -> tuple[str, float, float]:
    """How a body is refused, the CPU time it takes in all threads, and the longest step on the event loop."""

    async def receive(account_id: str) -> bytes:
        return body

    stepped = Stepped(serve(world, EMBEDDINGS, RequestHead(f"Bearer {key}"), receive, undelivered))
    begun = time.process_time()
    with pytest.raises(Failure) as refused:
        await stepped
    return refused.value.code, time.process_time() - begun, stepped.held_s


def decode_s() -> float:
    """The CPU time of decoding 4 MiB of ids: how quick this machine is now."""
    begun = time.process_time()
    msgspec.json.decode(YARDSTICK)
    return time.process_time() - begun


@pytest.mark.parametrize("key", [POOR_KEY, PENNY_KEY])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
async def test_any_body_without_money_is_refused_cheaply(world: ScriptedWorld, kind: str, size: str, key: str) -> None:
    """Of a key without any money, and of one with a little: less than the request may cost.

    What the parser reserves and does not use counts as memory here: for a large body of who has a little it is not
    looked at.
    """
    body = body_of(kind, SIZES[size])
    assert SIZES[size] * 0.7 < len(body) <= SIZES[size]
    tries, decodes = [await refuse(world, key, body)], [decode_s()]
    while len(tries) < TRIES_MAX and not (
        least(tries, 1) <= DECODES_MAX * min(decodes) and least(tries, 2) <= HELD_S_MAX
    ):
        tries.append(await refuse(world, key, body))
        decodes.append(decode_s())
    assert least(tries, 1) <= DECODES_MAX * min(decodes)
    assert least(tries, 2) <= HELD_S_MAX
    if key == POOR_KEY or size != LARGEST:
        tracemalloc.start()
        try:
            await refuse(world, key, body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= MEMORY_BYTES_MAX
    assert world.ledger.log == [] and world.client.asked == []


def least(tries: list[tuple[str, float, float]], what: int) -> float:
    return min(float(each[what]) for each in tries)
