"""The pages that a gateway serves to browsers: each in one file that loads nothing else.

A page's source is several short files, which are joined once, at start.
"""

import base64
import hashlib
from importlib.resources import files

STYLES = ("docs.css",)
SCRIPTS = (  # each uses only the ones before it
    "dom.js",
    "vectors.js",
    "answers.js",
    "reference.js",
    "try.js",
    "ranks.js",
    "talk.js",
    "form.js",
    "docs.js",
)


def docs_page() -> tuple[bytes, str]:
    """The documentation page, and the Content-Security-Policy that it must be served with.

    The policy allows only this script and style, by hash, and requests to the gateway itself: injected text could
    neither run nor send anything away.
    """
    style, script = _joined(STYLES), '"use strict";\n' + _joined(SCRIPTS)
    html = _read("docs.html").replace("<style></style>", f"<style>{style}</style>")
    html = html.replace("<script></script>", f"<script>{script}</script>")
    policy = (
        f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join(_read(name) for name in names)


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    """As a policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
