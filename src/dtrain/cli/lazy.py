"""Groups of commands that import none of them until it is called."""

from __future__ import annotations

import contextlib
import importlib
import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from dtrain.console import out
from dtrain.errors import UsageError

Commands = Mapping[str, tuple[str, str]]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar to one, ignoring leading dashes."""
    from difflib import get_close_matches

    bare = {name.lstrip("-"): name for name in known}
    near = get_close_matches(word.lstrip("-"), bare, n=1)
    return bare[near[0]] if near else None


class LazyGroup(click.Group):
    """A group that imports a command when it is called.

    Args:
        table: name → (module, one line of help).
        meant: names of commands in other tools, and the names of the group's own for them.
    """

    def __init__(
        self, *args: Any, table: Commands, meant: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self._table, self._meant = table, meant or {}

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _readers_may_leave():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _readers_may_leave():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._table:
            return None
        command: click.Command = importlib.import_module(self._table[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = self._meant.get(args[0]) or nearest(args[0], self._table)
            hint = f" Did you mean {near!r}?" if near else ""
            text = f"No command {args[0]!r}.{hint}"
            raise UsageError(text, code="usage.unknown-command") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])


@contextlib.contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Exit like other programs whose reader has closed, as in `dtrain logs | head -1`.

    click itself would exit with 1.
    """
    try:
        yield
    except BrokenPipeError as error:
        if not out.is_gone(error):
            raise
        out.give_up()
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None
