"""``pet-finetune relax``: structures at the nearest minimum of a model's energy."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import (
    MODEL,
    add_model_arguments,
    add_reading_arguments,
    check_data,
    check_folders,
    check_models,
    model_of,
    systems_of,
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "relax",
        help="relax structures with a model",
        description="Relax each structure of a file to the nearest minimum of the model's energy "
        "with ASE's optimisers, with its cell where asked. Many are computed at once.",
    )
    parser.add_argument("checkpoint", help=MODEL)
    parser.add_argument("structures", help="any file ASE reads; all of its frames are relaxed")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("relaxed.xyz"),
        help="extended XYZ to write (default: relaxed.xyz)",
    )  # fmt: skip
    parser.add_argument("--index", type=int, help="one frame of the file, from 0 (default: all)")
    add_reading_arguments(parser)
    for name, kind, shown, words in (
        ("fmax", float, "EV/A", "largest force on an atom at the end (default: 0.05)"),
        ("steps", int, "N", "the most for one structure (default: 500)"),
        ("optimizer", str, "NAME", "fire (default), lbfgs or bfgs"),
        ("pressure", float, "GPA", "outside, with --cell (default: 0)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar=shown, help=words)
    parser.add_argument("--cell", action="store_true", help="relax the cell with the atoms")
    add_model_arguments(parser, "whose mean moves the atoms")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    check_models(arguments.checkpoint)
    check_folders(*arguments.adapter)
    check_data(arguments.structures)
    from pet_finetune.api import ModelChoice, RelaxSettings, relax_structures
    from pet_finetune.log import setup_logging

    setup_logging()
    names = ("fmax", "steps", "optimizer", "pressure", "cell")
    given = {name: getattr(arguments, name) for name in names}
    relax_structures(
        ModelChoice(arguments.checkpoint, **model_of(arguments)),
        arguments.structures,
        arguments.output,
        RelaxSettings(**{name: value for name, value in given.items() if value is not None}),
        index=arguments.index,
        **systems_of(arguments),
    )
    return 0
