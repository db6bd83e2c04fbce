"""All commands together. Each is imported only when it is used: `embedmesh serve` should not wait for the others."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from embedmesh import __version__
from embedmesh.commands import EXIT_INTERRUPTED, importing

COMMANDS = {
    "serve": "embedmesh.commands.serve:serve",
    "setup": "embedmesh.commands.setup:setup",
    "embed": "embedmesh.commands.embed:embed",
    "rerank": "embedmesh.commands.rerank:rerank",
    "chat": "embedmesh.commands.chat:chat",
    "batches": "embedmesh.commands.batches:batches",
    "files": "embedmesh.commands.files:files",
    "jobs": "embedmesh.commands.jobs:jobs",
    "doctor": "embedmesh.commands.doctor:doctor",
    "models": "embedmesh.commands.models:models",
    "nodes": "embedmesh.commands.nodes:nodes",
    "accounts": "embedmesh.commands.accounts:accounts",
    "keys": "embedmesh.commands.keys:keys",
    "prices": "embedmesh.commands.prices:prices",
    "ledger": "embedmesh.commands.ledger:ledger",
    "audit": "embedmesh.commands.audit:audit",
    "store": "embedmesh.commands.store:store",
    "config": "embedmesh.commands.config:config",
    "gateway": "embedmesh.commands.serve:gateway",
    "node": "embedmesh.commands.serve:node",
}


class Commands(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        with importing():
            command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises NoSuchCommand that names the nearest: click knows of no command that is not imported."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            raise click.exceptions.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        """Ctrl-C while options are read or help is printed ends it silently."""
        with _quiet_interrupt():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Ctrl-C ends a command silently, unless the command itself reports what it left."""
        with _quiet_interrupt():
            return super().invoke(ctx)


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="embedmesh")
def cli() -> None:
    """One OpenAI-compatible embeddings endpoint in front of as many embedding nodes as you have.

    \b
    Start here:
      embedmesh setup      fetch the default model (once)
      embedmesh serve      run a gateway and a node on this machine
      embedmesh doctor     find out what is wrong with a set-up
    """
