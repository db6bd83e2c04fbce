"""The house is in order: one name for one thing, small modules and functions, plain sentences, documents that are true.

What a room still owes is in OWED, as a strict expected failure: once the room has paid, its mark has to go.
"""

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "embedmesh"
MODULE_LINES_MAX = 350
FUNCTION_LINES_MAX = 60
CHANGES_MIN = 16  # rows of "where to change what"

OWED: dict[str, list[str]] = {}


def each(name: str, values: Iterable[str], rule: str) -> pytest.MarkDecorator:
    """The test once a value; what is owed is marked."""
    owed = OWED.get(rule, [])
    marks = {value: pytest.mark.xfail(strict=True, reason=f"{rule}: owed by {value}") for value in owed}
    return pytest.mark.parametrize(name, [pytest.param(value, marks=marks.get(value, ())) for value in values])


def rooms(rule: str) -> pytest.MarkDecorator:
    return each("room", ROOMS, rule)


def room_of(module: Path) -> str:
    """The folder right below embedmesh/, or "modules" for what stands beside the rooms."""
    within = module.relative_to(PACKAGE)
    return within.parts[0] if len(within.parts) > 1 else "modules"


@functools.cache
def modules() -> dict[Path, tuple[str, ast.Module]]:
    """Text and tree of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found[path] = text, ast.parse(text)
    return found


ROOMS = sorted({room_of(path) for path in PACKAGE.rglob("*.py")})


def of_room(room: str) -> Iterator[tuple[str, str, ast.Module]]:
    """Name, text and tree of a room's modules."""
    for path, (text, tree) in modules().items():
        if room_of(path) == room:
            yield str(path.relative_to(PACKAGE)), text, tree


# -- sizes -------------------------------------------------------------------------------------------------------------


@rooms("long modules")
def test_no_module_is_long(room: str) -> None:
    lines = {name: text.count("\n") for name, text, _ in of_room(room)}
    assert {name: n for name, n in lines.items() if n > MODULE_LINES_MAX} == {}


@rooms("long functions")
def test_no_function_is_long(room: str) -> None:
    """From `def` to its last line."""
    lines = {
        f"{name}::{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, _, tree in of_room(room)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lines.items() if n > FUNCTION_LINES_MAX} == {}


# -- names -------------------------------------------------------------------------------------------------------------

PORTS = PACKAGE / "rules" / "ports.py"
SAME_ROLE = {"Config": "engine/models/"}  # each architecture's own settings: one a module, used as `bert.Config`
UNIT = re.compile(r"_(MAX|MIN|S|MS|BYTES)\Z")
FORMATS = {"LENGTH_BYTES", "CHUNK_BYTES", "KEY_BYTES"}  # of a file or a hash, which no caller or operator can meet


def is_protocol(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).startswith(("Protocol", "typing.Protocol")) for base in node.bases)


@functools.cache
def classes() -> list[tuple[Path, ast.ClassDef]]:
    return [
        (path, node)
        for path, (_, tree) in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]


@rooms("class names")
def test_a_class_name_stands_for_one_thing(room: str) -> None:
    """In the whole package; a private one in its room. A port and what implements it are one thing."""
    ports = {node.name for path, node in classes() if path == PORTS and is_protocol(node)}
    places: dict[str, list[str]] = defaultdict(list)
    for path, node in classes():
        where = str(path.relative_to(PACKAGE))
        if node.name in ports or where.startswith(SAME_ROLE.get(node.name, "-")):
            continue
        if room_of(path) == room or not node.name.startswith("_"):
            places[node.name].append(where)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if any(room_of(PACKAGE / one) == room for one in where)} == {}


@rooms("constants")
def test_a_bound_has_a_name_of_its_own(room: str) -> None:
    """Two bounds of one name and different values say too little about what they bound."""
    values: dict[str, dict[str, str]] = defaultdict(dict)
    for path, (_, tree) in modules().items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value: ast.expr | None = getattr(node, "value", None)
            for target in targets:
                if isinstance(target, ast.Name) and is_bound(target.id) and value and is_number(value):
                    values[target.id][str(path.relative_to(PACKAGE))] = ast.unparse(value)
    unlike = {name: where for name, where in values.items() if len(set(where.values())) > 1}
    assert {name: where for name, where in unlike.items() if any(room_of(PACKAGE / one) == room for one in where)} == {}


def is_bound(name: str) -> bool:
    return name.isupper() and UNIT.search(name) is not None and name not in FORMATS


def is_number(value: ast.expr) -> bool:
    """A literal number, or sums, products and powers of some."""
    if isinstance(value, ast.BinOp):
        return is_number(value.left) and is_number(value.right)
    return isinstance(value, ast.Constant) and isinstance(value.value, int | float)


# -- composition roots -------------------------------------------------------------------------------------------------


@each("root", ["gateway/main.py", "node/main.py", "supervisor.py"], "wiring")
def test_nothing_is_wired_by_setting_an_attribute(root: str) -> None:
    """What is built is complete: it gets what it needs as arguments."""
    _, tree = modules()[PACKAGE / root]
    set_from_outside = [
        f"{ast.unparse(node)}, line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) != "self"
    ]
    assert set_from_outside == []


# -- sentences ---------------------------------------------------------------------------------------------------------

RIDDLES = re.compile(r"\bso many\b|\bwhoever\b|\bwhat is none\b|\bwho asks\b|\bcontract section\b", re.IGNORECASE)


@rooms("docstrings")
def test_every_module_says_what_it_is_for(room: str) -> None:
    assert [name for name, _, tree in of_room(room) if not ast.get_docstring(tree)] == []


@rooms("riddles")
def test_sentences_are_plain_and_refer_to_what_is_here(room: str) -> None:
    """Errors, help, docstrings and comments: no riddles, no reference to a document outside the repository."""
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text, _ in of_room(room)
        for number, line in enumerate(text.splitlines(), 1)
        if RIDDLES.search(line)
    ]
    assert found == []


# -- the glossary ------------------------------------------------------------------------------------------------------

# Words of programming, or of the trade, that mean here what they mean everywhere.
PLAIN_WORDS = (
    "access ai answer api app asset body bytes change client clock config connection cors count counter "
    "credentials database db delivery dice engine error event exchange file folder frame handler head id item "
    "key limit list log loop message metric nonce number option origin outcome page path plan policy port "
    "process range reason record registry reply report request response result room row rule secret server "
    "session settings signature signer size state stats status step store stream table task text thread time "
    "timer token tokenizer type url usage value vector version window word write writer "
)
PLAIN = set(PLAIN_WORDS.split())


@functools.cache
def public_names() -> dict[str, str]:
    """Class names of the rules, and those of other rooms that another room imports: where each is defined."""
    defined = {
        (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."), node.name): path
        for path, (_, tree) in modules().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    names = {name: str(path.relative_to(PACKAGE)) for (_, name), path in defined.items() if room_of(path) == "rules"}
    for path, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    source = defined.get((node.module or "", alias.name))
                    if source is not None and room_of(source) != room_of(path):
                        names[alias.name] = str(source.relative_to(PACKAGE))
    return names


def is_failure(name: str) -> bool:
    """Failures are named as sentences; the closed lists in rules/ are their glossary."""
    files = {PACKAGE / "rules" / file for file in ("errors.py", "lock_failures.py", "file_failures.py")}
    return name in {node.name for path, node in classes() if path in files}


def glossary() -> set[str]:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    return {
        word.strip().lower() for entry in re.findall(r"^\| \*\*(.+?)\*\* \|", text, re.M) for word in entry.split(",")
    }


FORMS = [("$", ""), ("s$", ""), ("es$", ""), ("ies$", "y"), ("$", "s"), ("er$", ""), ("er$", "e"), ("or$", "")]


def is_explained(name: str, words: set[str]) -> bool:
    """The whole name, or what it ends with, has an entry: of one, of many, or of who does it (`Canaries`, `Prober`)."""
    parts = [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|^[a-z]+", name)]
    ends = [" ".join(parts[at:]) for at in range(len(parts))]
    forms = (re.sub(pattern, by, end) for end in ends for pattern, by in FORMS)
    return any(form in words for form in forms)


@rooms("glossary")
def test_the_glossary_has_every_public_noun(room: str) -> None:
    words = glossary() | PLAIN
    mine = {name: where for name, where in public_names().items() if room_of(PACKAGE / where) == room}
    assert {name: where for name, where in mine.items() if not is_failure(name) and not is_explained(name, words)} == {}


# -- CONTRIBUTING ------------------------------------------------------------------------------------------------------


def contributing() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_picture_of_the_rooms_is_the_real_one() -> None:
    """Every room is in it, and what is in it is there. `name/` is a folder; indented deeper, one inside a room."""
    block = re.search(r"```\nembedmesh/\n(.+?)```", contributing(), re.S)
    assert block is not None
    drawn: set[str] = set()
    above = PACKAGE
    for line in block[1].splitlines():
        entry = re.match(r"( +)((?:[\w.]+(?:/|\.py),? *)+)(?:  |$)", line)
        if entry is None:
            continue  # a description goes on
        for name in entry[2].replace(",", " ").split():
            path = (PACKAGE if len(entry[1]) == 2 else above) / name
            assert path.exists(), f"{line.strip()!r}: there is no {path.relative_to(ROOT)}"
            if len(entry[1]) == 2:
                above = path
                drawn.add(name.rstrip("/"))
    assert {room for room in ROOMS if room != "modules"} <= drawn


def changes() -> list[list[str]]:
    """Rows of the table "where to change what", as cells."""
    table = re.search(r"^\| change +\| where +\| test +\|\n\|[-| ]+\|\n((?:\|.+\|\n)+)", contributing(), re.M)
    return [] if table is None else [row.strip("| ").split(" | ") for row in table[1].splitlines()]


def test_what_the_table_of_changes_names_is_there() -> None:
    """Paths from the top of the repository or from embedmesh/; `path::name` is a class, function or constant there."""
    rows = changes()
    assert len(rows) >= CHANGES_MIN
    for cells in rows:
        assert len(cells) == 3, cells
        for cell in cells[1:]:
            named = re.findall(r"`([^`]+)`", cell)
            assert named, f"{cells[0]}: {cell!r} names no path"
            for one in named:
                path, _, name = one.partition("::")
                found = next((at for at in (ROOT / path, PACKAGE / path) if at.exists()), None)
                assert found is not None, f"{cells[0]}: there is no {path}"
                assert not name or name.split("[")[0] in defined_in(found), f"{cells[0]}: {path} has no {name}"


def defined_in(path: Path) -> set[str]:
    """What a module defines: names, and `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


# -- the map -----------------------------------------------------------------------------------------------------------

MAP_FROM, MAP_TO = "<!-- map -->\n", "<!-- end of map -->"


def drawn_map() -> str:
    """Every module with the first line of its docstring, folder by folder."""
    lines: list[str] = []
    folder = None
    for path, (_, tree) in sorted(modules().items(), key=lambda item: (item[0].parent, item[0].name)):
        if path.name in ("__init__.py", "__main__.py"):
            continue
        if path.parent != folder:
            folder = path.parent
            lines += ["", f"**{folder.relative_to(ROOT)}/**", ""]
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        lines.append(f"- `{path.name}` {first}")
    return "\n".join(lines).lstrip("\n") + "\n\n"


def test_the_map_of_modules_is_the_real_one() -> None:
    """To draw it anew: `python -m tests.test_house`."""
    text = contributing()
    assert text[text.index(MAP_FROM) + len(MAP_FROM) : text.index(MAP_TO)] == drawn_map()


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MAP_FROM)
    page.write_text(before + MAP_FROM + drawn_map() + MAP_TO + rest.partition(MAP_TO)[2], encoding="utf-8")
