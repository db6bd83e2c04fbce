"""`make docs`: builds the site of the documentation into dist/site and checks it; `ARGS=serve` shows it meanwhile."""

import logging
import sys

import click

from bench.site import reference
from bench.site.build import ROOT, SITE, build
from bench.site.check import other_sites, problems


@click.command()
@click.argument("what", type=click.Choice(["build", "serve", "write"]), default="build")
@click.option("--port", default=8000, show_default=True, help="With `serve`: the port on this machine.")
def main(what: str, port: int) -> None:
    """Build and check the site, serve it while pages change, or write the reference pages that are made from the code.

    \b
    Examples:
      make docs
      make docs ARGS=serve
      make docs ARGS=write
    """
    if what == "write":
        for path in reference.write():
            click.echo(f"written: {path.relative_to(ROOT)}")
        return
    try:
        if what == "serve":
            from mkdocs.commands.serve import serve

            logging.basicConfig(format="%(message)s", level=logging.INFO)
            serve(str(ROOT / "mkdocs.yml"), dev_addr=f"127.0.0.1:{port}")
            return
        warnings = build(SITE)
    except ImportError as error:
        raise click.ClickException(f"{error}. Run `make check` once: it installs what the tests need.") from None
    found = list(problems(SITE))
    for line in (*warnings, *(f"{page}: {what}" for page, what in found)):
        click.echo(line, err=True)
    pages, links = len(list(SITE.rglob("*.html"))), other_sites(SITE)
    click.echo(
        f"{pages} pages, {len(warnings)} warnings, {len(found)} problems, {len(links)} links to other sites: {SITE}"
    )
    sys.exit(1 if warnings or found else 0)


if __name__ == "__main__":
    main()
