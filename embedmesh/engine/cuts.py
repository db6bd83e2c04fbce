"""Where a text may be cut so that the ids of its parts, one after another, are the ids of the whole.

A tokenizer normalizes a text, cuts it into words, and gives each word its ids by itself. So a text may be cut wherever
its normalizer looks across in neither direction, its words end, and no added token lies across. This module knows such
positions for the normalizers and pre-tokenizers named below, and for no others.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import msgspec
from tokenizers import Tokenizer

from embedmesh.engine.tokenizer_source import TokenizerJson
from embedmesh.engine.words import MARK

BEFORE_SPACE = r"(?=[ \t\n\r])"
"""BERT's normalizer looks at one character at a time (accents aside); white space becomes no id."""
BETWEEN_IDEOGRAPHS = r"(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])"  # BERT's puts a space around each

JOINING = ((0x0D4E, 0x0D4E), (0x0E33, 0x0E33), (0x0EB3, 0x0EB3), (0x1100, 0x11FF), (0xA960, 0xA97F), (0xD7B0, 0xD7FF))
"""Letters that may be one with a neighbour, from and to: Hangul's parts, and a few vowels."""
LETTERS, ACCENTS = frozenset(("Lu", "Ll", "Lo", "Nd")), frozenset(("Mn", "Mc"))  # categories of Unicode
CLOSING_MARKS = ".,;:!?)"  # may also precede the space

CALM = frozenset(("BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Precompiled", "Nmt"))
"""Normalizers that change a letter, digit or space before a letter or space independently of its neighbours."""
SPACE_SPLITTERS = frozenset(("Whitespace", "WhitespaceSplit", "BertPreTokenizer"))


def cuts_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """A pattern without width that is found only where a text may be cut; None where no such position is known."""
    added = tokenizer.get_added_tokens_decoder().values()
    contents = {token.content for token in added}
    if tokenizer.normalizer is not None:
        contents |= {tokenizer.normalizer.normalize_str(content) for content in contents}
    if not all(content.split() == [content] for content in contents):  # may be found anywhere, or across a space
        return None
    if any(token.rstrip for token in added) or getattr(tokenizer.model, "dropout", None):
        return None
    saved = msgspec.json.decode(tokenizer.to_str(), type=TokenizerJson)
    normalizer, pre_tokenizer = saved.normalizer or {}, saved.pre_tokenizer or {}
    if (normalizer.get("type"), pre_tokenizer.get("type")) == ("BertNormalizer", "BertPreTokenizer"):
        alone = any(token.single_word for token in added)
        return re.compile("|".join([BEFORE_SPACE] if alone else [BEFORE_SPACE, *_beside_marks(normalizer, contents)]))
    return _before_words() if _is_calm(normalizer) and _splits_at_spaces(pre_tokenizer) else None


def _beside_marks(normalizer: dict[str, Any], added: set[str]) -> list[str]:
    """BERT's pre-tokenizer isolates each ASCII mark. Marks that occur in added tokens are left out."""
    taken = {character for content in added for character in content}
    marks = [mark for mark in map(chr, range(33, 127)) if re.fullmatch(MARK, mark) and mark not in taken]
    some = "".join(map(re.escape, marks))
    patterns = [rf"(?<=[{some}])(?=[!-~])", rf"(?<=[!-~])(?=[{some}])"] if marks else []
    if normalizer.get("handle_chinese_chars") and all(map(str.isascii, added)):
        patterns.append(BETWEEN_IDEOGRAPHS)
    return patterns


@functools.cache
def _before_words() -> re.Pattern[str]:
    """Before a lone space between two words of any script, which no normalizer joins over it."""
    letters = _ranges(lambda character: _is_plain(character, LETTERS))
    marks = _ranges(lambda character: _is_plain(character, ACCENTS))
    return re.compile(rf"(?<=[{letters}{marks}{CLOSING_MARKS}])(?= [{letters}])")


def _ranges(wanted: Callable[[str], bool]) -> str:
    """The wanted characters, as ranges of a pattern."""
    groups = itertools.groupby(map(chr, range(0x10000)), wanted)
    runs = [list(characters) for good, characters in groups if good]
    return "".join(rf"\u{ord(run[0]):04x}-\u{ord(run[-1]):04x}" for run in runs)


def _is_plain(character: str, categories: frozenset[str]) -> bool:
    """Whether it is of these categories, and remains by itself in every normal form."""
    if unicodedata.category(character) not in categories or any(a <= ord(character) <= b for a, b in JOINING):
        return False
    composed, taken_apart = unicodedata.normalize("NFKC", character), unicodedata.normalize("NFKD", character)
    if " " in composed + taken_apart:
        return False
    return categories is ACCENTS or (composed[0].isalnum() and taken_apart[0].isalnum())


def _is_calm(normalizer: dict[str, Any]) -> bool:
    match normalizer:
        case {"type": "Sequence", "normalizers": parts}:
            return all(map(_is_calm, parts))
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}}:
            return True
        case {"type": "Replace", "pattern": {"String": str(what)}}:
            return what.split() == [what]
        case {"type": kind}:
            return kind in CALM
        case _:
            return not normalizer


def _splits_at_spaces(pre_tokenizer: dict[str, Any]) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "use_regex": True} | {"type": "Metaspace", "split": True}:
            return True
        case {"type": "Sequence", "pretokenizers": [{"type": first}, *others]}:
            return first in SPACE_SPLITTERS and all(map(_adds_no_first, others))
        case {"type": kind}:
            return kind in SPACE_SPLITTERS
        case _:
            return False


def _adds_no_first(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether it treats the first word of a text like any other."""
    match pre_tokenizer:
        case {"type": "Metaspace", "prepend_scheme": scheme}:
            return scheme in ("always", "never")
        case {"type": kind}:
            return kind in SPACE_SPLITTERS or kind in ("Punctuation", "Digits")
        case _:
            return False
