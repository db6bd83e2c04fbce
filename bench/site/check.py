"""Checks a built site as its readers meet it: dead links, requests to other hosts, pages that need JavaScript."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

WORDS_MIN = 20  # of a page's own text, which must be in its HTML
OTHER_SITES = re.compile(  # where readers may be sent, when they click; nothing is fetched from there, by us or by them
    r"https://("
    r"(www\.)?(github\.com|pypi\.org|python\.org|rfc-editor\.org|w3\.org|sqlite\.org|postgresql\.org|prometheus\.io|grafana\.com)"
    r"|opentelemetry\.io|openid\.net|filesystem-spec\.readthedocs\.io|huggingface\.co|platform\.openai\.com|semver\.org|diataxis\.fr|squidfunk\.github\.io"
    r")(/.*)?"
)
LOADED = {  # tag -> attributes whose addresses browsers fetch by themselves
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "form": ("action",),
}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch", "manifest"}
IN_STYLE = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^'\")]+)|@import\s+['\"]?((?:https?:)?//[^'\"; ]+)")
IN_SCRIPT = re.compile(r"""["'`]((?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^"'`]*)["'`]""")
ONLY_IF_USED = re.compile(  # in the theme's script: for what no page may have, or for browsers older than 2020
    r"https://unpkg\.com/(mermaid@|resize-observer-polyfill$)|https://(api\.github|gitlab)\.com/|https://\$\{"
    r"|https?://www\.w3\.org/"
)
USES_THEM = re.compile(r"class=\"[^\"]*\bmermaid\b|data-md-component=\"source\"|https://giscus\.app")


class Problem(NamedTuple):
    """What is wrong with the site, and on which of its pages."""

    page: str
    what: str


class SitePage(HTMLParser):
    """What a page links to, what it makes browsers fetch, what can be linked to, and how much text it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.words = 0
        self._in_article = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._in_article |= tag == "article"
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and FETCHED_LINKS & set(given.get("rel", "").split()):
            self.loads.append(given.get("href", ""))
        for name in LOADED.get(tag, ()):
            if name in given:
                self.loads += [part.split()[0] for part in given[name].split(",") if part.strip()]
        self.loads += [first or second for first, second in IN_STYLE.findall(given.get("style", ""))]

    def handle_endtag(self, tag: str) -> None:
        self._in_article &= tag != "article"

    def handle_data(self, data: str) -> None:
        self.words += len(data.split()) if self._in_article else 0


def problems(site: Path) -> Iterator[Problem]:
    """Everything that is wrong with the site in this folder."""
    html = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in sorted(site.rglob("*.html"))}
    pages = {name: SitePage(text) for name, text in html.items()}
    for name, page in pages.items():
        if name == "404.html":  # served for any path, so its links begin at the root
            continue
        yield from (Problem(name, what) for what in _dead_links(site, name, page, pages))
        yield from (Problem(name, f"fetches {load} from another host") for load in page.loads if _is_elsewhere(load))
        if page.words < WORDS_MIN:
            yield Problem(name, f"has {page.words} words without JavaScript")
        if USES_THEM.search(html[name]):
            yield Problem(name, "has something for which the theme's script asks another host")
    yield from _assets(site)
    yield from _search(site, pages)


def other_sites(site: Path) -> Counter[str]:
    """Addresses at other hosts that pages link to, and how often."""
    pages = (SitePage(path.read_text("utf-8")) for path in site.rglob("*.html"))
    return Counter(link for page in pages for link in page.links if _is_elsewhere(link))


def _is_elsewhere(address: str) -> bool:
    return address.startswith(("http:", "https:", "//"))


def _dead_links(site: Path, name: str, page: SitePage, pages: dict[str, SitePage]) -> Iterator[str]:
    for link in page.links:
        if _is_elsewhere(link):
            if not OTHER_SITES.fullmatch(link):
                yield f"links to {link}: is that a well-known home page? Then it belongs to OTHER_SITES"
            continue
        parts = urlsplit(link)
        if parts.scheme:
            yield f"links to {link}"
            continue
        target = (site / name).parent / unquote(parts.path) if parts.path else site / name
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            yield f"links to {link}, which is not there"
            continue
        there = pages.get(target.resolve().relative_to(site.resolve()).as_posix())
        if parts.fragment and there is not None and unquote(parts.fragment) not in there.anchors:
            yield f"links to {link}, which has no such heading"


def _assets(site: Path) -> Iterator[Problem]:
    """Styles fetch nothing from elsewhere; scripts name only what this site does not use."""
    for path in sorted(site.rglob("*.css")):
        for found in IN_STYLE.findall(path.read_text("utf-8")):
            yield Problem(path.relative_to(site).as_posix(), f"fetches {''.join(found)}")
    for path in sorted(site.rglob("*.js")):
        for address in IN_SCRIPT.findall(path.read_text("utf-8")):
            if not ONLY_IF_USED.match(address):
                yield Problem(path.relative_to(site).as_posix(), f"names {address[:80]}")


def _search(site: Path, pages: dict[str, SitePage]) -> Iterator[Problem]:
    """The index is in the site, and has every page."""
    index = site / "search" / "search_index.json"
    found = {row["location"].partition("#")[0] for row in json.loads(index.read_bytes())["docs"]}
    for name in pages:
        if name not in found and name != "404.html" and not (name == "index.html" and "" in found):
            yield Problem(name, "cannot be found by search")
