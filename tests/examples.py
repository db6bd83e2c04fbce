"""Blocks of code in tutorials and how-to guides, as one shell script a page. What is not run says why.

Notes for the tests are HTML comments, which readers do not see:

| comment | what it does |
|---|---|
| `<!-- not run: REASON -->` | the block below is not run; REASONS has the reasons |
| `<!-- tested: tests/FILE.py -->` | a test of its own runs the block below |
| `<!-- file: NAME -->` | the block below is saved under that name |
| `<!-- if: PROGRAM -->` | the block below is run where that program is |
| `<!-- fails -->` | commands of the block below may end with an error |
| `<!-- run: COMMAND -->` | a command that readers need not see |
| `<!-- with: THIS = THAT -->` | from here on THAT is run where the page has THIS |

In a block of `console` the lines that begin with `$ ` are run, with those that they go on in; the others are what was
printed. A program that runs until it is stopped (LASTING) runs beside the commands that follow.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "tutorial").glob("*.md")) + sorted((ROOT / "docs" / "how-to").glob("*.md"))
REASONS = {
    "installs": "it installs packages, from an index or by the system's package manager",
    "another machine": "it needs a second machine, or a name that stands for one",
    "containers": "it needs Docker or Podman; `make ships` does what can be done without",
    "Kubernetes": "it needs a cluster; `make ships` renders and checks what is sent to one",
    "systemd": "it needs systemd as the first process; tests/test_ships.py verifies the units",
    "foreign server": "it needs a server of another make with a model; tests/gateway/test_foreign.py has their forms",
    "model hub": "it needs a hub of models",
    "root": "it changes the machine as root; `make ships` starts what it sets up",
    "form": "it shows a form, with places that a reader fills in",
    "bench": "it needs packages that the tests do not install: `python -m bench.site.snippets` runs it",
}
LASTING = re.compile(r'^(\w+=("[^"]*"|\S+) )*(embedmesh (serve|gateway|node)( |$)|prometheus |caddy run)')
SHELL = {"console", "sh", "bash"}
SHOWN = {"", "text", "json", "toml", "yaml"}  # is looked at, not run
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"<!-- *(not run|tested|file|if|fails|run|with)(?:: *(.*?))? *-->", re.DOTALL)
PREAMBLE = Path(__file__).with_name("examples.sh")


class ExampleBlock(NamedTuple):
    """A block of a page, and the notes that stand above it."""

    page: Path
    line: int
    language: str
    text: str
    notes: Mapping[str, str]

    @property
    def runs(self) -> bool:
        is_code = self.language in SHELL | {"python"}
        return not {"not run", "tested"} & self.notes.keys() and (is_code or "file" in self.notes)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class PageNote(NamedTuple):
    """`run` or `with`, which stand for themselves."""

    kind: str
    text: str


def parts_of(page: Path) -> Iterator[ExampleBlock | PageNote]:
    """Blocks and notes of a page, in order."""
    text = page.read_text("utf-8")
    notes: dict[str, str] = {}
    at = 0
    for block in FENCE.finditer(text):
        for note in NOTE.finditer(text, at, block.start()):
            kind, said = note[1], (note[2] or "").strip()
            if kind in ("run", "with"):
                yield PageNote(kind, said)
            else:
                notes[kind] = said
        at = block.end()
        inner = re.sub(f"^{block[1]}", "", block[3], flags=re.MULTILINE)
        yield ExampleBlock(page, text.count("\n", 0, block.start()) + 1, block[2], inner, notes)
        notes = {}


def blocks() -> list[ExampleBlock]:
    """All blocks of all pages."""
    return [part for page in PAGES for part in parts_of(page) if isinstance(part, ExampleBlock)]


def commands_of(block: ExampleBlock) -> list[str]:
    """The commands of a block of shell, each whole: also where it goes on in the next lines."""
    if block.language != "console":
        return [block.text]
    found: list[str] = []
    for line in block.text.splitlines():
        if found and not _is_whole(found[-1]):
            found[-1] += "\n" + line
        elif line.startswith("$ "):
            found.append(line.removeprefix("$ "))
    return found


def _is_whole(command: str) -> bool:
    try:
        shlex.split(re.sub(r"\$\((.*?)\)", "x", command, flags=re.DOTALL), comments=True)
    except ValueError:
        return False
    return not command.endswith("\\")


def problem_of(block: ExampleBlock) -> str | None:
    """Why the block is neither run nor excused; or what is wrong with what is only shown."""
    if "not run" in block.notes:
        return None if block.notes["not run"] in REASONS else f"no such reason: {block.notes['not run']}"
    if "tested" in block.notes:
        test = ROOT / block.notes["tested"]
        named = test.is_file() and block.page.stem in test.read_text("utf-8")
        return None if named else f"{block.notes['tested']} does not read this page"
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "console" and not commands_of(block):
        return "a block of console without a command"
    elif block.language not in SHOWN | SHELL | {"python"}:
        return f"a block of {block.language} that is not run"
    elif not block.language and block.text.startswith("$ "):
        return "commands without the word `console`"
    return None


def blocks_that_run(page: Path) -> list[str]:
    """Where the blocks are that a page's script runs."""
    return [str(part) for part in parts_of(page) if isinstance(part, ExampleBlock) and part.runs]


def script_of(page: Path, given: dict[str, str]) -> str:
    """A script for bash that runs a page's blocks; `given` replaces texts. It says when each has begun and ended."""
    changes: dict[str, str] = {}
    lines = [PREAMBLE.read_text("utf-8")]
    for part in parts_of(page):
        if isinstance(part, PageNote):
            if part.kind == "with":
                this, _, that = part.text.partition(" =")
                changes[this] = that.removeprefix(" ")
            else:
                lines.append(_changed(part.text, changes | given))
            continue
        if part.runs:
            lines += [f"\nblock {shlex.quote(str(part))}", *_run(part, changes | given), "block_ended"]
    return "\n".join(lines) + "\n"


def _run(block: ExampleBlock, changes: Mapping[str, str]) -> Iterator[str]:
    text = _changed(block.text, changes)
    if name := block.notes.get("file"):
        yield f"cat > {name} <<'END OF FILE'\n{text}END OF FILE"
        return
    if program := block.notes.get("if"):
        yield f"if command -v {program} >/dev/null; then"
    if block.language == "python":
        yield f"expanded <<'END OF FILE'\n{text}END OF FILE\npython expanded.py"
    for command in commands_of(block._replace(text=text)) if block.language in SHELL else ():
        if LASTING.match(command):
            yield f"begin_lasting {shlex.quote(command)}"
            yield f'{{ {command}\n}} >"$LASTING_LOG" 2>&1 </dev/null &\nlasting $!'
        else:
            yield f"{{ {command}\n}} || true" if "fails" in block.notes else command
    if program:
        yield f"else not_here {program}; fi"


def _changed(text: str, changes: Mapping[str, str]) -> str:
    for this, that in changes.items():
        text = text.replace(this, that)
    return text


if __name__ == "__main__":
    for each in blocks():
        if why := each.notes.get("not run"):
            print(f"{each}: {REASONS[why]}")
