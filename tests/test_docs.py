"""The documentation says what the code does: settings, commands, states, links, and the README's two commands."""

import re
from pathlib import Path

import click
import msgspec
import pytest

from embedmesh.commands.group import COMMANDS, cli
from embedmesh.commands.options import HIDDEN
from embedmesh.rules import tabs
from embedmesh.rules.holds import MOVES
from embedmesh.settings import ENV_PREFIX, GatewaySettings, NodeSettings
from tests.examples import blocks, problem_of

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SETTINGS_PAGE = (ROOT / "docs/reference/settings.md").read_text()
NOT_RUN_MAX = 24  # a new one is a matter for review: `python -m tests.examples` lists them


@pytest.mark.parametrize("settings", [GatewaySettings, NodeSettings])
def test_every_setting_is_documented_with_its_words_and_default(settings: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(settings):
        if field.name in HIDDEN:
            continue
        option = f"| `--{field.name.replace('_', '-')}`"
        rows = [line for line in SETTINGS_PAGE.splitlines() if line.startswith(option)]
        assert rows, f"{field.name} is not in docs/reference/settings.md"
        assert all(f"`{ENV_PREFIX}{field.name.upper()}`" in row for row in rows)
        if isinstance(field.default, int | str):
            assert any(f" {field.default}" in row for row in rows)


def test_every_documented_option_exists() -> None:
    known = {
        f"--{field.name.replace('_', '-')}"
        for s in (GatewaySettings, NodeSettings)
        for field in msgspec.structs.fields(s)
    }
    for option in re.findall(r"^\| `(--[a-z-]+)`", SETTINGS_PAGE, re.MULTILINE):
        assert option in known


def commands() -> list[tuple[str, click.Command]]:
    found = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [(f"{name} {sub}", each) for sub, each in command.commands.items()]
        else:
            found.append((name, command))
    return found


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_explains_itself_with_an_example(name: str, command: click.Command) -> None:
    text = (command.help or "") + (command.epilog or "")
    assert f"embedmesh {name}" in text, f"`embedmesh {name} --help` shows no example"


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_that_prints_a_result_can_print_json(name: str, command: click.Command) -> None:
    if name in ("gateway", "node"):
        return  # they run until they are stopped
    assert any("--json" in option.opts for option in command.params)


def test_the_readmes_first_screen_shows_the_two_commands() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "make serve" in screen
    assert "make test" in screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_commands_that_exist(page: Path) -> None:
    names = {name for name, _ in commands()}
    groups = {name.split()[0] for name in names if " " in name}
    for line in re.findall(r"(?:`|^\$ )(?:\w+=\S+ )*embedmesh ([a-z]+(?: [a-z]+)?)", page.read_text(), re.MULTILINE):
        assert line in names | groups or line.split()[0] in names, line


def test_the_page_on_a_request_shows_every_move_of_a_hold() -> None:
    page = (ROOT / "docs/life-of-a-hard-request.md").read_text()
    rows = set(re.findall(r"^\| (open|captured|released) \| (\w+) \| (\w+) \|$", page, re.MULTILINE))
    assert rows == {(state.value, end.value, after.value) for (state, end), after in MOVES.items()}


def test_the_page_on_a_request_shows_every_move_of_a_tab() -> None:
    page = (ROOT / "docs/life-of-a-request.md").read_text()
    rows = set(re.findall(r"^\| (open|closing) \| (\w+) \| (\w+) \|$", page, re.MULTILINE))
    assert rows == {(state.value, move.value, after.value) for (state, move), after in tabs.MOVES.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_block_is_run_or_says_why_not() -> None:
    """In tutorials and how-to guides; tests/story/test_examples.py runs them."""
    assert [(str(block), problem) for block in blocks() if (problem := problem_of(block))] == []
    assert sum("not run" in block.notes for block in blocks()) <= NOT_RUN_MAX
