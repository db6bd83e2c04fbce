"""The program's entry. Nothing heavy, not even click, is imported before Ctrl-C is handled."""

import sys

from embedmesh.commands import EXIT_INTERRUPTED, importing


def main() -> None:
    """The console script. A set-up error prints one line, an interruption none; neither prints a traceback."""
    try:
        _run()
    except KeyboardInterrupt:  # also in the moment when the usual handler has just been put back
        sys.exit(EXIT_INTERRUPTED)


def _run() -> None:
    with importing():
        import click

        from embedmesh.commands.group import cli
        from embedmesh.process import EXIT_SETUP
        from embedmesh.rules.errors import SetupError

    try:
        code = cli.main(standalone_mode=False)  # or click says "Aborted!" where Ctrl-C comes between two of its steps
    except SetupError as error:
        click.echo(f"embedmesh: {error}", err=True)
        sys.exit(EXIT_SETUP)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)
