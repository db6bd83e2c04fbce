"""Daft's `embed_text` with our provider and with its own: right vectors, nothing paid beside them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from embedmesh.client import CallRefused, InputRefused, WrongCall
from tests.client.gateway import ALIAS, KEY, WIDTH, Answer, Received, ScriptedGateway, envelope, vector_of
from tests.engines.conftest import needs

pytestmark = needs("daft")
TEXTS = [f"text {number} ünïcödé" for number in range(250)]


def embedded(gateway: ScriptedGateway, texts: Sequence[str | None], **options: Any) -> list[Any]:
    """The column of vectors, as lists, by our provider."""
    import daft
    from daft.functions import embed_text

    from embedmesh.daft import EmbedmeshProvider

    provider = EmbedmeshProvider(base_url=gateway.base_url, api_key=KEY)
    frame = daft.from_pydict({"id": list(range(len(texts))), "text": texts})
    frame = frame.with_column("embedding", embed_text(frame["text"], provider=provider, model=ALIAS, **options))
    assert str(frame.schema()["embedding"].dtype).replace(" ", "") in (
        f"Embedding[Float32;{options.get('dimensions') or WIDTH}]",
        f"Embedding(Float32,{options.get('dimensions') or WIDTH})",
    )
    found = frame.to_pydict()  # batches come as they are done, as of all asynchronous functions of Daft
    rows = dict(zip(found["id"], found["embedding"], strict=True))
    assert sorted(rows) == list(range(len(texts)))
    return [None if rows[at] is None else np.asarray(rows[at], "<f4") for at in range(len(texts))]


def right(text: str, width: int = WIDTH) -> Any:
    return np.frombuffer(vector_of(text, width), "<f4")


def test_vectors_are_right_and_only_they_are_paid(gateway: ScriptedGateway) -> None:
    found = embedded(gateway, TEXTS, batch_size=32)
    assert np.array_equal(np.stack(found), np.stack([right(text) for text in TEXTS]))
    assert sorted(text for one in gateway.received for text in one.body["input"]) == sorted(TEXTS)


def test_nulls_are_not_sent_and_stay_null(gateway: ScriptedGateway) -> None:
    texts: list[str | None] = [None, "a", None, *TEXTS[:40], *[None] * 40]
    found = embedded(gateway, texts, batch_size=16, dimensions=4, input_type="query")
    assert [row is None for row in found] == [text is None for text in texts]
    assert np.array_equal(found[1], right("a", 4))
    assert {one.body["input_type"] for one in gateway.received} == {"query"}


def refuse_bad(received: Received) -> Answer | None:
    if "bad" in received.body["input"]:
        return 400, envelope("invalid_value", "too bad", f"input.{received.body['input'].index('bad')}")
    return None


def test_a_refused_text_ends_the_query_or_is_null(gateway: ScriptedGateway) -> None:
    gateway.script = refuse_bad
    texts: list[str | None] = ["a", "bad", "b"]
    found = embedded(gateway, texts, on_error="ignore")
    assert found[1] is None and np.array_equal(found[2], right("b"))
    with pytest.raises(Exception, match="too bad") as raised:
        embedded(gateway, texts)
    assert isinstance(raised.value, InputRefused) or "InputRefused" in repr(raised.value)


def test_what_is_wrong_is_said_before_anything_is_paid(gateway: ScriptedGateway) -> None:
    with pytest.raises(WrongCall, match="no option colour"):
        embedded(gateway, ["a"], colour="red")
    gateway.width = None
    with pytest.raises(CallRefused, match="not_found"):
        embedded(gateway, ["a"])
    gateway.width = 0
    with pytest.raises(WrongCall, match="Give dimensions"):
        embedded(gateway, ["a"])
    assert gateway.received == []


def test_daft_s_own_provider_works_unmodified(gateway: ScriptedGateway) -> None:
    """By its OpenAI client; it asks for a vector of "dimension probe" first, which is paid."""
    import daft
    from daft.functions import embed_text

    daft.set_provider("openai", base_url=gateway.base_url, api_key=KEY)
    frame = daft.from_pydict({"text": TEXTS[:50]})
    found = frame.with_column("embedding", embed_text(frame["text"], model=ALIAS)).to_pydict()["embedding"]
    assert np.allclose(np.stack(found), np.stack([right(text) for text in TEXTS[:50]]))
