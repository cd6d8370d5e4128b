"""``pet-finetune convert``: data as a set that stays on disk."""

from __future__ import annotations

import argparse

from .arguments import check_data

_EXAMPLES = """\
examples:
  pet-finetune convert data.xyz data/
  pet-finetune convert omol.aselmdb data/ --labels energy forces
  pet-finetune convert data.db data.zip
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "convert",
        help="data as a set that stays on disk, in a format of metatrain's",
        description="Write the structures of a file, with their labels under the same names and in "
        "the same units, as metatrain's memory-mapped folder, or as its zip. Training reads such a "
        "set from disk. What was stopped is gone on with by the same command.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help="extended xyz, a database of ASE's (.db, .aselmdb), a set of metatrain's, or another "
        "file that ASE reads",
    )
    parser.add_argument("output", help="a folder, or a file that ends with .zip")
    parser.add_argument("--format", default="", help="ASE's name of the format of the source")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="names of the values to keep (default: all that are numbers)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    check_data(arguments.source)
    from pet_finetune.api import convert
    from pet_finetune.log import get_logger, setup_logging

    setup_logging()
    done = convert(
        arguments.source, arguments.output, format=arguments.format, labels=arguments.labels
    )
    get_logger().info(
        "%s %s %d structures with %s",
        done.path,
        "holds" if done.made else "is there already and holds",
        done.structures,
        ", ".join(done.labels) or "no labels",
    )
    return 0
