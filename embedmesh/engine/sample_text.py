"""Plain English from files that every machine has, so that a tool can try a model without a network or a data set.

There are two kinds with nothing in common, to tune on one and judge on the other: the standard library's docstrings,
and the descriptions and licences of installed packages.
"""

import importlib.metadata
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

QUOTED = re.compile(r'(?:"""|\'\'\')(.+?)(?:"""|\'\'\')', re.DOTALL)
PARAGRAPHS = re.compile(r"\n\s*\n")
PROSE = re.compile(r"[A-Za-z ,.;:'()-]")
PROSE_SHARE_MIN = 0.92  # of a paragraph's characters; below are tables, code and lists of names
PARAGRAPH_BYTES = (40, 4_000)  # shorter is a heading, longer a table or data
SAMPLE_FILE_BYTES_MAX = 1_000_000  # the standard library's largest file with prose has 700 kB
LIBRARY_OTHER = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip"}
PACKAGE_WORDS = ("licen", "copying", "notice", "readme")  # in names of a package's files of prose
COMMON_LICENCES = Path("/usr/share/common-licenses")  # of Debian and its like


def library_text() -> list[str]:
    """Paragraphs of the standard library's docstrings and help topics, always in the same order, none twice."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.rglob("*.py")) if not LIBRARY_OTHER & set(file.relative_to(root).parts)]
    return _distinct(quoted for file in files for quoted in QUOTED.findall(_read(file)))


def package_text() -> list[str]:
    """Paragraphs of installed packages' descriptions and licences, always in the same order, none twice."""
    return _distinct(_package_texts())


def spread(texts: list[str], count: int) -> list[str]:
    """At most `count` of `texts`, evenly from all of them."""
    return [texts[at * len(texts) // count] for at in range(count)] if len(texts) > count else texts


def _package_texts() -> Iterator[str]:
    if COMMON_LICENCES.is_dir():
        yield from map(_read, sorted(COMMON_LICENCES.iterdir()))
    for package in sorted(importlib.metadata.distributions(), key=lambda each: str(each.metadata["Name"])):
        yield str(package.metadata.json.get("description", ""))
        named = [file for file in package.files or [] if any(word in file.name.lower() for word in PACKAGE_WORDS)]
        yield from (_read(Path(str(package.locate_file(file)))) for file in sorted(named) if file.suffix != ".py")


def _read(file: Path) -> str:
    """A file's text; nothing if it is unreadable or too large."""
    try:
        return file.read_text(encoding="utf-8") if file.stat().st_size <= SAMPLE_FILE_BYTES_MAX else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _distinct(texts: Iterable[str]) -> list[str]:
    paragraphs = (" ".join(each.split()) for text in texts for each in PARAGRAPHS.split(text))
    return list(dict.fromkeys(filter(_is_prose, paragraphs)))


def _is_prose(paragraph: str) -> bool:
    shortest, longest = PARAGRAPH_BYTES
    if not shortest <= len(paragraph) <= longest or "http" in paragraph:
        return False
    return len(PROSE.findall(paragraph)) >= PROSE_SHARE_MIN * len(paragraph)
