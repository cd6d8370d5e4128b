"""``pet-finetune options``, ``report`` and ``watch``: what there is to set; the page of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pet_finetune.errors import ConfigError, DataError

from .common import Commands, add_command, start_log

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


def add_report(commands: Commands) -> None:
    """Add ``report`` to the command line."""
    parser = add_command(
        commands,
        "report",
        _report,
        "write report.html for the folder of a run",
        "Make the report of a run from the files in its folder: errors before and after, "
        "learning curves, parity plots, worst structures in 3D, and how to use the model. "
        "Training writes it at its end.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="another file than report.html in the folder (one run)"
    )


def _report(arguments: argparse.Namespace) -> int:
    if arguments.output is not None and len(arguments.folders) > 1:
        raise ConfigError(
            f"report: -o {arguments.output} is one file, but {len(arguments.folders)} runs are "
            "named. Leave -o out: each report goes into its own folder."
        )
    for folder in arguments.folders:
        if not Path(folder).is_dir():
            raise DataError(f"There is no folder '{folder}'. Name the folder of a run.")
    from pet_finetune.api import write_report

    start_log()
    for folder in arguments.folders:
        print(write_report(folder, arguments.output))
    return 0


def add_watch(commands: Commands) -> None:
    """Add ``watch`` to the command line."""
    parser = add_command(
        commands,
        "watch",
        _watch,
        "show the report of a run during the run",
        "Serve the report of a run to the browsers of this computer (127.0.0.1), updated after "
        "each epoch, until Ctrl-C.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="of the page (default: one that is free)"
    )
    parser.add_argument(
        "--every", type=int, default=5, metavar="SECONDS",
        help="after which the browser asks again (default: 5)",
    )  # fmt: skip


def _watch(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"watch --port: expected a number from 0 to 65535, got {arguments.port}.")
    if arguments.every < 1:
        raise ConfigError(f"watch --every: expected a number above 0, got {arguments.every}.")
    if not arguments.folder.is_dir():
        raise ConfigError(
            f"watch: there is no folder '{arguments.folder}'. Name the one of a run, as `train` "
            "tells it in its first line."
        )
    from pet_finetune.api import ReportServer

    try:
        server = ReportServer(arguments.folder, arguments.port, arguments.every)
    except OSError as error:
        raise ConfigError(
            f"watch --port {arguments.port}: {error.strerror}. Take another, or leave it out."
        ) from error
    print(f"{server.address} shows {arguments.folder} until Ctrl-C", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
