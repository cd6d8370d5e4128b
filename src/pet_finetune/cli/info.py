"""``pet-finetune info``: what is inside a checkpoint."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "info",
        help="what is inside a checkpoint",
        description="Sizes, species, targets, cutoff, baselines and provenance of a checkpoint.",
    )
    parser.add_argument("checkpoint", nargs="+", help="ours or metatrain's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    from pet_finetune.checkpoint.info import describe_checkpoint
    from pet_finetune.log import setup_logging
    from pet_finetune.report.tables import show

    setup_logging()
    for path in arguments.checkpoint:
        for table in describe_checkpoint(path):
            show(table)
    return 0
