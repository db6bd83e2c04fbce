"""What mkdocs does besides drawing pages: the navigation from the folders, and links that lead out of docs/.

A page that lies in a folder of docs/ is in the navigation under the title that it has itself. mkdocs loads this file by
its path, so it imports nothing of ours.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath  # of addresses of pages, which are not files of this machine
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
FILES = "files"  # where the site keeps files of the repository that are no pages
WORDS_MAX = 240  # characters of what a section's first page says of each of its pages
TITLE = re.compile(r"^# +(.+)$", re.MULTILINE)
COMMENT = re.compile(r"^ *<!--.*?--> *\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<head>\]\(|(?:src|srcset|href)=\")(?P<target>[^)\"#\s:]+)(?P<anchor>#[^)\"\s]*)?(?=[)\"])")
FENCE = re.compile(r"^ *(```|~~~)")
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ")
FIRST_ITEM = re.compile(r"[-*] |1\. ")  # what may follow a line of text without a blank line between them


class Section(NamedTuple):
    """A part of the navigation: the pages of one folder."""

    title: str
    folder: str
    about: str


SECTIONS = (
    Section("Tutorials", "tutorial", "From nothing to something that works, step by step."),
    Section("How-to guides", "how-to", "You know what you want to do. Each page has the steps."),
    Section("Reference", "reference", "What there is, in full. Many of these pages are made from the code."),
    Section("Explanation", "", "How it works and why, and what was measured."),
    Section("Decisions", "decisions", "What was decided, what else was thought of, and what was seen."),
)
OF_REPOSITORY = {  # pages of the site that lie beside docs/
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
}
FIRST = {"tutorial/a-watched-installation.md", "reference/contract.md", "life-of-a-request.md"}  # of their sections
ALONE = {"glossary.md", *OF_REPOSITORY.values()}  # pages at the top of docs/ that no section has
ORIGINS = {page: origin for origin, page in OF_REPOSITORY.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages beside docs/, a first page for each section, and what pages link to; sets the navigation."""
    for origin, page in OF_REPOSITORY.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text("utf-8")))
    nav: list[Any] = ["index.md"]
    for section in SECTIONS:
        pages = _pages_of(section, files)
        first = f"{section.folder or 'explanation'}/index.md"
        files.append(File.generated(config, first, content=_first_page(section, first, pages)))
        nav.append({section.title: [first, *pages]})
    nav.append({"More": ["glossary.md", "changelog.md", "security.md", "contributing.md"]})
    config.nav = nav
    texts = [(file.src_uri, file.content_string) for file in files if file.is_documentation_page()]
    for path in sorted({path for uri, text in texts for path in _linked_files(uri, text)}):
        files.append(File.generated(config, f"{FILES}/{path}", content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text without notes for the tests, in Python's Markdown, with links that lead to pages of the site."""
    markdown = "".join(part if is_code else COMMENT.sub("", part) for is_code, part in _parts(markdown))
    return as_python_markdown(_relinked(page.file.src_uri, markdown))


def _pages_of(section: Section, files: Files) -> list[str]:
    """Of a folder itself, by title; decisions by number."""
    by_number = section.folder == "decisions"
    found = [
        (file.src_uri not in FIRST, file.src_uri if by_number else _title(file.content_string).lower(), file.src_uri)
        for file in files.documentation_pages()
        if dirname(file.src_uri) == section.folder and file.src_uri not in ALONE
    ]
    return [name for *_, name in sorted(found)]


def _first_page(section: Section, first: str, pages: list[str]) -> str:
    """The section's pages, each with its first sentence."""
    lines = [f"# {section.title}", "", section.about, ""]
    for name in pages:
        text = (ROOT / "docs" / name).read_text("utf-8")
        link = relpath(name, dirname(first))
        lines.append(f"- [{_title(text)}]({link})" + (f": {said}" if (said := _first_sentence(text)) else ""))
    return "\n".join(lines) + "\n"


def _title(text: str) -> str:
    found = TITLE.search(text)
    return found[1].strip() if found else "Untitled"


def _first_sentence(text: str) -> str:
    """Of the first paragraph below the title, without its links; empty where the page begins with something else."""
    below = COMMENT.sub("", TITLE.sub("", text, count=1)).strip()
    paragraph = " ".join(below.split("\n\n", 1)[0].split())
    if not paragraph or not re.match(r"[\w*`\[]", paragraph) or paragraph.startswith("**"):
        return ""
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", paragraph)
    sentence = re.split(r"(?<=[.?!:])\s", plain, maxsplit=1)[0].rstrip(":")
    return sentence if len(sentence) <= WORDS_MAX else ""


# -- links -------------------------------------------------------------------------------------------------------------


def _folder(src_uri: str) -> str:
    """Of the page's text in the repository."""
    return dirname(ORIGINS.get(src_uri, f"docs/{src_uri}"))


def _linked_files(src_uri: str, markdown: str) -> Iterator[str]:
    """Files of the repository outside docs/ that a page links to, and that are no page of the site."""
    if src_uri.endswith("/index.md"):  # made here, with the site's own links
        return
    for is_code, part in _parts(markdown):
        for found in () if is_code else LINK.finditer(part):
            path = normpath(join(_folder(src_uri), found["target"]))
            outside = not path.startswith(("docs/", "../")) and path not in OF_REPOSITORY
            if outside and (ROOT / path).is_file():
                yield path


def _relinked(src_uri: str, markdown: str) -> str:
    """Links as the site has them: what lies elsewhere in the repository lies elsewhere there."""

    def relink(found: re.Match[str]) -> str:
        path = normpath(join(_folder(src_uri), found["target"]))
        if path.startswith("docs/"):
            page = path.removeprefix("docs/") + ("/index.md" if (ROOT / path).is_dir() else "")
        elif path in OF_REPOSITORY:
            page = OF_REPOSITORY[path]
        elif (ROOT / path).is_file():
            page = f"{FILES}/{path}"
        else:
            return found[0]
        return found["head"] + relpath(page, dirname(src_uri)) + (found["anchor"] or "")

    if src_uri.endswith("/index.md"):  # made here, with the site's own links
        return markdown
    return "".join(part if is_code else LINK.sub(relink, part) for is_code, part in _parts(markdown))


# -- two kinds of Markdown ---------------------------------------------------------------------------------------------


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """Runs of lines, and whether they are a block of code."""
    held: list[str] = []
    fence = ""
    for line in markdown.splitlines(keepends=True):
        mark = FENCE.match(line)
        if mark and not fence:
            yield False, "".join(held)
            held, fence = [line], mark[1]
        elif mark and mark[1] == fence:
            yield True, "".join([*held, line])
            held, fence = [], ""
        else:
            held.append(line)
    yield bool(fence), "".join(held)


def as_python_markdown(markdown: str) -> str:
    """GitHub takes a list right below a line, and what is below an item by two or three spaces; mkdocs wants more.

    Blank lines before such lists are added, and steps of indentation become four spaces.
    """
    lines: list[str] = []
    widths: list[int] = []  # of the items that a line is within: the column of their text
    fenced = False
    for line in markdown.splitlines():
        text = line.lstrip(" ")
        column = len(line) - len(text)
        item = ITEM.match(line)
        if not fenced and text and not (item or column or not lines or lines[-1].strip()):
            widths = []  # a paragraph after a blank line, at the margin: the list is over
        in_list = bool(widths)
        while not fenced and item and widths and column < widths[-1]:
            widths.pop()
        depth = sum(column >= width for width in widths)
        inner = widths[depth - 1] if depth else 0
        shown = " " * (4 * depth + column - inner) + text if text else ""
        if item and not fenced:
            if not in_list and lines and lines[-1].strip() and FIRST_ITEM.match(text):
                lines.append("")
            widths = [*widths[:depth], item.end()]
        lines.append(shown)
        if FENCE.match(line):
            fenced = not fenced
            widths = widths[:depth]
    return "\n".join(lines) + "\n"
