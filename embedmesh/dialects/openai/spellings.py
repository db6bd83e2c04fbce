"""Other APIs' words: which of our roles their values mean, and which of their fields change nothing here."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from embedmesh.rules.embeddings import Role

INPUT_TYPES: dict[str, Role | None] = {
    "query": "query",
    "document": "document",
    "search_query": "query",  # Cohere
    "search_document": "document",  # Cohere
    "passage": "document",  # NVIDIA NIM
}
GEMINI_TASKS: dict[str, Role | None] = {
    "RETRIEVAL_QUERY": "query",
    "RETRIEVAL_DOCUMENT": "document",
    "QUESTION_ANSWERING": "query",
    "FACT_VERIFICATION": "query",
    "CODE_RETRIEVAL_QUERY": "query",
    "SEMANTIC_SIMILARITY": None,
}
JINA_TASKS: dict[str, Role | None] = {
    "retrieval.query": "query",
    "retrieval.passage": "document",
    "code.query": "query",
    "code.passage": "document",
    "text-matching": None,
}
ROLES = INPUT_TYPES | JINA_TASKS | GEMINI_TASKS | {task.lower(): role for task, role in GEMINI_TASKS.items()}
"""What `input_type` and `task` may say, and the role it means. None is no prompt: texts of one kind are compared.

Tasks such as `classification` are not here: models that know them give other vectors for them.
"""


class Harmless(NamedTuple):
    """A field that clients add and that changes nothing, if its value is one that it `takes`."""

    schema: dict[str, Any]
    words: str
    takes: Callable[[object], bool]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


HARMLESS: dict[str, Harmless] = {
    "metadata": Harmless({"type": ["object", "null"]}, "an object", lambda value: isinstance(value, dict)),
    "timeout": Harmless({"type": ["number", "null"]}, "a number", _number),
    "stream": Harmless({"enum": [False, None]}, "false", lambda value: value is False),
    "priority": Harmless({"type": ["number", "null"]}, "a number", _number),
    "keep_alive": Harmless(
        {"type": ["string", "number", "null"]},
        "a time",
        lambda value: isinstance(value, str) or _number(value),
    ),
    "drop_params": Harmless({"type": ["boolean", "null"]}, "true or false", lambda value: isinstance(value, bool)),
    "modality": Harmless({"enum": ["text", None]}, "text", lambda value: value == "text"),
    "late_chunking": Harmless({"enum": [False, None]}, "false", lambda value: value is False),
}

COULD_CHANGE = re.compile(
    "adapter|chunk|clip|context|crop|cut|dim|dtype|embed|encod|format|image|input|instruct|lang|layer|length|limit|lora"
    "|mask|max|messages|min|modal|mode|norm|option|output|overlap|pad|pool|precision|prefix|prompt|quant|raw|return"
    "|revision|role|scal|side|sparse|special|stop|strip|style|suffix|task|template|text|title|token|trim|trunc|type"
    "|vector|version|video|weight|width|window",
    re.IGNORECASE,
)
"""An unknown field with one of these words in its name may ask for other vectors: it is always refused."""
