"""How a gateway is put together: what a part needs it gets when it is constructed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedmesh

PACKAGE = Path(embedmesh.__file__).parent
ROOMS = ("gateway", "fleet", "flow", "http", "signing", "storage")


def wirings(source: str, *, any_value: bool = False) -> Iterator[str]:
    """Assignments of a function to an attribute of another object; with `any_value`, of anything."""
    tree = ast.parse(source)
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if not isinstance(target, ast.Attribute) or ast.unparse(target.value) == "self":
                continue
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            is_function = (
                isinstance(value, ast.Lambda)
                or (value is not None and ast.unparse(value).removeprefix("self.") in methods)
                or (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("partial"))
            )
            if any_value or is_function:
                yield ast.unparse(node)


EXAMPLES = [
    ("registry.on_change = lambda: None", ["registry.on_change = lambda: None"]),
    ("def f(): ...\nmembers.prove = f", ["members.prove = f"]),
    ("class A:\n def g(self): b.on_end = self.g", ["b.on_end = self.g"]),
    ("a.b = functools.partial(print, 1)", ["a.b = functools.partial(print, 1)"]),
    ("class A:\n def __init__(self, call): self.call = call", []),
    ("node.draining = record.draining", []),
]


@pytest.mark.parametrize(("source", "found"), EXAMPLES)
def test_a_wiring_is_recognised(source: str, found: list[str]) -> None:
    assert list(wirings(source)) == found


@pytest.mark.parametrize("room", ROOMS)
def test_no_part_gets_a_callback_after_its_construction(room: str) -> None:
    found = {str(path): list(wirings(path.read_text())) for path in (PACKAGE / room).rglob("*.py")}
    assert found, "the room has moved"
    assert {path: words for path, words in found.items() if words} == {}


def test_the_composition_root_sets_nothing_but_the_exit_code() -> None:
    source = (PACKAGE / "gateway" / "main.py").read_text()
    assert list(wirings(source, any_value=True)) == ["ending.exit_code = EXIT_SOFTWARE"]
