"""``pet-finetune options``: the options reference in the terminal, and the schema for editors."""

from __future__ import annotations

import argparse
import json

from .common import Commands, add_command

_EXAMPLES = """\
  pet-finetune options                                  what there is
  pet-finetune options architecture.training.finetune   a branch with all that is below it
  pet-finetune options --schema > options.schema.json   for editors
"""


def add_options_command(commands: Commands) -> None:
    """Add ``options`` to the command line."""
    parser = add_command(
        commands,
        "options",
        _options,
        "show the reference of options files",
        "Print the reference of the options, or their JSON schema.",
        _EXAMPLES,
    )
    parser.add_argument("branch", nargs="?", help="dotted name of an option or a section")
    parser.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON schema, with which editors check options files",
    )


def _options(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    from pet_finetune.config.options_reference import entries_below, option_entries, options_schema

    if arguments.schema:
        print(json.dumps(options_schema(), indent=2, ensure_ascii=False))
        return 0
    console = Console(highlight=False, soft_wrap=False)
    if arguments.branch is None:
        for entry in option_entries():
            if not entry.ignored:
                default = f" [dim]({escape(entry.default)})[/dim]" if entry.default else ""
                console.print(f"[bold]{escape(entry.name)}[/bold]{default}", soft_wrap=True)
        return 0
    for entry in entries_below(arguments.branch):
        default = f", default {entry.default}" if entry.default not in ("", "required") else ""
        default = ", required" if entry.default == "required" else default
        console.print(f"[bold]{escape(entry.name)}[/bold]")
        lines = f"[dim]{escape(entry.type + default)}[/dim]\n{escape(entry.meaning)}"
        console.print(Padding(lines.replace("`", ""), (0, 0, 0, 4)))
    return 0
