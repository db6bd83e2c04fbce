"""Builds the site by mkdocs, and keeps what it warns of."""

import logging
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SITE = ROOT / "dist" / "site"


class _Kept(logging.Handler):
    """Lines of warnings and worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def build(out: Path) -> list[str]:
    """Writes the site into this folder, which is emptied before; the warnings. Raises ImportError without mkdocs."""
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config

    kept = _Kept()
    log = logging.getLogger("mkdocs")
    log.addHandler(kept)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=False)  # we count them ourselves
        config.plugins.on_startup(command="build", dirty=False)
        mkdocs_build(config)
        config.plugins.on_shutdown()
    finally:
        log.removeHandler(kept)
    return kept.lines
