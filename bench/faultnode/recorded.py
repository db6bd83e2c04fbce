"""Streams in the manner of makes that are known: written by us, byte for byte as each of them writes.

`streams/NAME.txt` is the body of one answer; this table says what it means.
"""

from dataclasses import dataclass
from pathlib import Path

STREAMS = Path(__file__).parent / "streams"
TEXT = 'Gr\u00fc\u00dfe aus Z\u00fcrich \U0001f600: \u20ac5.\n"OK"'

Calls = tuple[tuple[str, str], ...]
"""Names and arguments of tools."""


@dataclass(frozen=True)
class Recorded:
    """What a stream says. `usage` is input and output tokens; None where its make tells none."""

    name: str
    says: str  # what is of its make
    events: int  # with data, [DONE] aside
    usage: tuple[int, int] | None
    finish: str = "stop"
    text: str = TEXT
    reasoning: str = ""
    calls: Calls = ()

    @property
    def body(self) -> bytes:
        return (STREAMS / f"{self.name}.txt").read_bytes()

    @property
    def chat(self) -> bool:
        return not self.name.endswith("completions")


CITY = '{"city":"Z\u00fcrich"}'

RECORDED = (
    Recorded("openai_chat", "every event has a null usage and an obfuscation", 10, (11, 8)),
    Recorded(
        "openai_tools",
        "two calls, their arguments in pieces; cached input",
        12,
        (82, 45),
        "tool_calls",
        text="",
        calls=(("get_weather", '{"city": "Z\u00fcrich"}'), ("get_time", '{"zone": "UTC"}')),
    ),
    Recorded(
        "vllm_chat",
        "reasoning first; every event has the usage until then",
        15,
        (15, 13),
        reasoning="\nDer Nutzer gr\u00fc\u00dft.",
    ),
    Recorded(
        "vllm_tools",
        "the call's first piece has no arguments, its others no id",
        10,
        (169, 22),
        "tool_calls",
        text="",
        calls=(("get_weather", '{"city": "Z\u00fcrich", "days": 3}'),),
    ),
    Recorded("sglang_chat", "members that are not used are null; matched_stop", 10, (12, 8)),
    Recorded("llamacpp_chat", "content is null at first; model is a path; timings", 10, (14, 8)),
    Recorded("llamacpp_completions", "the usage is on the event that finishes", 8, (4, 7), "length"),
    Recorded("ollama_chat", "every event has the role", 9, (31, 8)),
    Recorded(
        "ollama_tools",
        "whole calls without index, one an event",
        4,
        (188, 41),
        "tool_calls",
        text="",
        calls=(("get_weather", CITY), ("get_weather", '{"city":"Gen\u00e8ve"}')),
    ),
    Recorded("tgi_chat", "no blank after `data:`; an empty id; comments", 9, (10, 8)),
    Recorded("lmstudio_chat", "no usage", 8, None),
    Recorded("llamacpppython_chat", "lines end in CR LF; comments with the time; no usage", 9, None),
)
