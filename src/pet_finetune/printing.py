"""Tables on the terminal, and the same as plain lines for a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console, RenderableType
from rich.table import Table

from . import processes
from .progress import clear

_WIDTH = 110  # where there is no terminal


def table_text(table: Table) -> str:
    """A table as plain lines."""
    console = Console(width=_WIDTH, no_color=True, force_terminal=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def print_rich(content: RenderableType) -> None:
    """Print a table or the like to standard output, names in brackets as they are."""
    if sys.stdout is None:  # it was closed
        return
    clear()
    width = None if sys.stdout.isatty() else _WIDTH
    Console(file=sys.stdout, width=width, markup=False, emoji=False).print(content)


def show(table: Table) -> str:
    """Print a table to standard output, once of several processes; return it as plain text."""
    if processes.leader():
        print_rich(table)
    return table_text(table)


def facts_table(title: object, facts: Mapping[str, str]) -> Table:
    """Names in bold and what there is to say of each."""
    table = Table(title=str(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(name, text)
    return table
