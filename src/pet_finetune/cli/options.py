"""``pet-finetune options``: the options reference in the terminal, and the schema for editors."""

from __future__ import annotations

import argparse
import json

_EXAMPLES = """\
examples:
  pet-finetune options                                  what there is
  pet-finetune options architecture.training.finetune   a branch with all that is below it
  pet-finetune options --schema > options.schema.json   for editors
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "options",
        help="what can stand in an options file",
        description="Print the reference of the options, or their JSON schema.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("branch", nargs="?", help="dotted name of an option or a section")
    parser.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON schema, which editors check options files with while one types",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
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
