"""``pet-finetune export``: a model for simulation engines, or for metatrain."""

from __future__ import annotations

import argparse

from .arguments import MODEL, check_folders, check_models

_EXAMPLES = """\
examples:
  pet-finetune export best_model.ckpt -o model.pt
  pet-finetune export foundation.ckpt --adapter run/adapter -o water.pt
  pet-finetune export best_model.ckpt -o model.pt --dtype float64
  pet-finetune export best_model.ckpt --format metatrain -o model.ckpt
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "export",
        help="a model for LAMMPS, i-PI, ASE and other engines, or for metatrain",
        description="Write a model as a metatomic file, which runs without pet-finetune, or as a "
        "checkpoint of metatrain.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help=MODEL)
    parser.add_argument(
        "-o",
        "--output",
        help="the file (default: the checkpoint's name with .pt, or with _metatrain.ckpt)",
    )
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help="metatomic, for engines, or metatrain, for mtt eval, train and export "
        "(default: metatrain where the file ends with .ckpt, else metatomic)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="DIR",
        help="folder of an adapter of this model, to merge into it; several, or the folder of a "
        "run with finetune.ensemble, are a committee, whose uncertainty is in the file",
    )
    parser.add_argument(
        "--target",
        help="the energy that engines get (default: that of the adapter, the only one, or energy);"
        " for metatrain the only target to write (default: all)",
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float32 or float64 for everything (default: the model's in the network, and float64 "
        "for positions and energies)",
    )
    parser.add_argument("--name", help="of the model, for its metadata (default: the file's name)")
    parser.add_argument(
        "--author", action="append", default=[], help="for its metadata; may be repeated"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    (source,) = check_models(arguments.checkpoint)
    check_folders(*arguments.adapter or ())
    from pet_finetune.api import export_model, export_table, show
    from pet_finetune.log import setup_logging

    setup_logging()
    ending = "_metatrain.ckpt" if arguments.format == "metatrain" else ".pt"
    outcome = export_model(
        arguments.checkpoint,
        arguments.output or f"{source.stem}{ending}",
        format=arguments.format,
        adapter=arguments.adapter,
        target=arguments.target,
        dtype=arguments.dtype,
        name=arguments.name,
        authors=arguments.author,
    )
    show(export_table(outcome))
    return 0
