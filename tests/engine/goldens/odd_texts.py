"""Golden texts that are hard by their form, not their length: each reaches a corner of the tokenizer."""
# ruff: noqa: RUF001 - letters that look alike across scripts are the point here

SPECIAL_TOKENS_AS_TEXT = [
    *("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "[CLS] hello [SEP]", "[cls] is not [Sep]", "a[MASK]b"),
    *("[PAD][PAD] tail", "[CLS][SEP][CLS][SEP]", "the [MASK] of the harbour", "[ CLS ]", "[unused1]", "##ing ##s"),
    "<s></s><|endoftext|>",
]

LONG_WORDS = [  # past 100 characters a word becomes one [UNK]
    *("a" * 99, "a" * 100, "a" * 101, "b" * 5_000, "x" * 101 + " and then words", "words and then " + "y" * 300),
    *("é" * 60, "é" * 101, "ab-" * 40, "漢" * 120, "ж" * 100, "ж" * 101, "0123456789" * 11),
    "https://example.org/" + "q" * 200,
]

WHITE_SPACE = [
    *("  leading", "trailing  ", "\n\nlines\n\n", "\ttab", "a\u00a0b", "\u3000wide\u3000", "a" + " " * 2_000 + "b"),
    *("zero\u200bwidth", "\ufeffbom", "soft\u00adhyphen", "word\u2060joiner", "line\u2028separator", "a\vb\fc"),
    *("\u1680ogham", "carriage\rreturn"),
]

NOTHING_TO_SEE = [  # no tokens but the special ones
    *(" ", "\n", "\t\r\n ", "\u200b", "\u00a0\u3000", "\x00", "\x01\x02\x7f", "\ufeff", "\u0301"),
]

CONTROL_AND_FORMAT = [
    *("nul\x00inside", "bell\x07bell", "escape \x1b[31mred", "del\x7fete", "c1\x85next line", "\ue000private\uf8ff"),
    *("\u202ertl override\u202c", "\u2066isolate\u2069", "a\u0300\u0301\u0302\u0303\u0304", "\ufffd replaced \ufffd"),
    *("\U0010ffff", "non\ufffecharacter"),
]

CASE_AND_FOLDING = [
    *("HELLO World", "hello world", "İstanbul ı I i", "ΣΊΣΥΦΟΣ ς σ", "ǅ ǆ Ǆ", "ŒUVRE œuvre", "ﬀ ﬁ ﬂ"),
    *("ＦＵＬＬ ｗｉｄｔｈ", "ẞ ß ss"),
]

SHORT = [
    *("a", "I", "?", "7", "é", "я", "中", "한", "🚀", "the", "test", "x y", "embeddings"),
    "antidisestablishmentarianism",
]

ODD_TEXTS: dict[str, list[str]] = {
    "special tokens as text": SPECIAL_TOKENS_AS_TEXT,
    "long words": LONG_WORDS,
    "white space": WHITE_SPACE,
    "nothing to see": NOTHING_TO_SEE,
    "control and format": CONTROL_AND_FORMAT,
    "case and folding": CASE_AND_FOLDING,
    "short": SHORT,
}
