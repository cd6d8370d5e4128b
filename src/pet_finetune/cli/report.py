"""``pet-finetune report``: the page of a run, made again."""

from __future__ import annotations

import argparse
from pathlib import Path

from pet_finetune.errors import ConfigError, DataError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "report",
        help="write report.html for the folder of a run",
        description="Make the report of a run from what lies in its folder: errors before and "
        "after, learning curves, parity plots, worst structures in 3D, and how to use the model. "
        "Training writes it by itself at its end.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="another file than report.html in the folder (one run)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    if arguments.output is not None and len(arguments.folders) > 1:
        raise ConfigError(
            f"report: -o {arguments.output} is one file, but {len(arguments.folders)} runs are "
            "named. Leave -o out: each report goes into its own folder."
        )
    for folder in arguments.folders:
        if not Path(folder).is_dir():
            raise DataError(f"There is no folder '{folder}'. Name the folder of a run.")
    from pet_finetune.api import write_report
    from pet_finetune.log import setup_logging

    setup_logging()
    for folder in arguments.folders:
        print(write_report(folder, arguments.output))
    return 0
