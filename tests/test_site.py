"""The site of the documentation: whole, without dead links and requests to other hosts; its reference is the code's."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bench.site import check, reference
from bench.site.build import ROOT, build
from embedmesh.gateway.api.table import APIS
from embedmesh.http.failures import TABLE

WRITE = "is not up to date: `make docs ARGS=write`"


# -- reference pages that are made from the code -----------------------------------------------------------------------


@pytest.mark.parametrize(("path", "text"), reference.pages().items(), ids=lambda value: getattr(value, "stem", ""))
def test_a_page_that_is_made_is_up_to_date(path: Path, text: str) -> None:
    assert path.exists() and path.read_text("utf-8") == text, f"{path.name} {WRITE}"
    assert str(Path.home()) not in text and str(ROOT) not in text, "it says where it was made"


def page(name: str) -> str:
    return (ROOT / "docs" / "reference" / name).read_text("utf-8")


def test_every_route_command_and_error_is_there() -> None:
    """From the tables that the program itself uses, not from what the pages are made of."""
    routes = {f"### `{route.method} {route.path}`" for api in APIS for route in api.ROUTES}
    assert routes <= set(page("api.md").splitlines())
    assert {f"## embedmesh {name}" for name, _ in reference.commands()} <= set(page("cli.md").splitlines())
    rows = page("errors.md").splitlines()
    for failure, (status, _) in TABLE.items():
        assert any(row.startswith(f"| {status} | `{failure.code}`<br>") for row in rows), failure.__name__


def test_every_option_is_there() -> None:
    text = page("cli.md")
    for name, command in reference.commands():
        help_ = text.partition(f"## embedmesh {name}\n")[2].partition("\n## ")[0]
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert max(option.opts, key=len) in help_, f"{name} {option.opts}"


def test_every_header_that_the_code_names_is_there() -> None:
    """Those of ours are found by their prefix, in every module."""
    known = {name.lower() for name in re.findall(r"^\| `([\w-]+)` \|", page("headers.md"), re.MULTILINE)}
    named = {
        header
        for path in (ROOT / "embedmesh").rglob("*.py")
        for header in re.findall(r"[\"'](x-embedmesh-[a-z-]+)[\"']", path.read_text("utf-8"))
    }
    assert named - {"x-embedmesh-aside", "x-embedmesh-errors"} <= known  # members of the OpenAPI document
    assert {"idempotency-key", "retry-after", "x-request-id", "api-key"} <= known


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """The folder of the built site, and what mkdocs warned of."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    level = logging.getLogger("mkdocs").level
    try:
        yield folder, build(folder)
    finally:
        logging.getLogger("mkdocs").setLevel(level)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_site_is_built_without_a_warning(site: tuple[Path, list[str]]) -> None:
    assert site[1] == []


def test_nothing_is_wrong_with_the_site(site: tuple[Path, list[str]]) -> None:
    assert list(check.problems(site[0])) == []


def test_every_page_is_in_the_site(site: tuple[Path, list[str]]) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        made = site[0] / path.relative_to(ROOT / "docs").with_suffix(".html")
        assert made.exists(), path


SOUND = '<article><h1 id="a">A</h1>' + "word " * check.WORDS_MIN + "</article>"


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        (SOUND + '<a href="#a">a</a><a href="https://github.com/o/r">r</a><img src="x.svg">', None),
        (SOUND + '<a href="b.html">b</a>', "links to b.html, which is not there"),
        (SOUND + '<a href="#b">b</a>', "links to #b, which has no such heading"),
        (SOUND + '<a href="https://example.net/">e</a>', "links to https://example.net/: is that"),
        (SOUND + '<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        (SOUND + '<link rel="preconnect stylesheet" href="//fonts.example">', "fetches //fonts.example"),
        (SOUND + '<p style="background: url(https://i.example/i.png)">', "fetches https://i.example/i.png"),
        (SOUND + '<pre class="mermaid">', "the theme's script asks another host"),
        ("<article></article>", "has 0 words without JavaScript"),
    ],
)
def test_what_is_wrong_with_a_page_is_found(tmp_path: Path, html: str, problem: str | None) -> None:
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search_index.json").write_text('{"docs": [{"location": "page.html"}]}')
    found = [what for _, what in check.problems(tmp_path)]
    assert found == [] if problem is None else [what for what in found if problem in what]


def test_what_a_script_or_a_style_fetches_is_found(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search_index.json").write_text('{"docs": []}')
    (tmp_path / "a.css").write_text("@import url(https://fonts.example/css);")
    (tmp_path / "a.js").write_text('fetch("https://count.example/hit")')
    assert [page for page, _ in check.problems(tmp_path)] == ["a.css", "a.js"]


@pytest.mark.parametrize(
    ("written", "as_mkdocs_wants_it"),
    [
        ("A line:\n- one\n- two\n", "A line:\n\n- one\n- two\n"),
        ("1. One:\n\n   ```console\n   $ ls\n   ```\n", "1. One:\n\n    ```console\n    $ ls\n    ```\n"),
        ("- one\n  - inner\n- two\n", "- one\n    - inner\n- two\n"),
        ("```\n- one\n  two\n```\n", "```\n- one\n  two\n```\n"),
        ("It is\n5. a sentence.\n", "It is\n5. a sentence.\n"),
    ],
)
def test_lists_are_those_that_github_shows(written: str, as_mkdocs_wants_it: str) -> None:
    hooks = pytest.importorskip("bench.site.hooks", reason="mkdocs is not installed", exc_type=ImportError)
    assert hooks.as_python_markdown(written) == as_mkdocs_wants_it
