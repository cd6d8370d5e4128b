"""``pet-finetune info``: what is inside a checkpoint."""

from __future__ import annotations

import argparse
import json

from pet_finetune.progress import clear

from .arguments import MODEL, check_models


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "info",
        help="what is inside a checkpoint",
        description="Sizes, species, targets, cutoff, baselines and provenance of a checkpoint.",
    )
    parser.add_argument("checkpoint", nargs="+", help=MODEL)
    parser.add_argument("--json", action="store_true", help="all of it, as JSON, a list of files")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    check_models(*arguments.checkpoint)
    from pet_finetune.api import checkpoint_facts, describe_checkpoint, show
    from pet_finetune.log import setup_logging

    setup_logging()
    if arguments.json:
        facts = [checkpoint_facts(path) for path in arguments.checkpoint]
        clear()
        print(json.dumps(facts, indent=2, default=str))
        return 0
    for path in arguments.checkpoint:
        for table in describe_checkpoint(path):
            show(table)
    return 0
