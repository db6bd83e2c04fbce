"""What a command ends with when its options, its input or its output must change."""

from typing import IO, Any

import click


class WrongUsage(click.ClickException):
    """The command line does not fit what is there. One line, exit code 2, as for an unknown option."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"embedmesh: {self.message}", file=file, err=file is None)
