"""``pet-finetune eval``: errors of a model on labelled structures."""

from __future__ import annotations

import argparse
from pathlib import Path

from pet_finetune.errors import ConfigError

from . import named

_EXAMPLES = """\
examples:
  pet-finetune eval options.yaml -c best_model.ckpt      the sets that the options name
  pet-finetune eval best_model.ckpt structures.xyz       whole files, in eV and Angstrom
  pet-finetune eval --config finetune_configs.json --run-name ethanol_r8_dora [structures.xyz]
"""
_YAML = {".yaml", ".yml"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="errors of a model on labelled structures",
        description="Compare a model's energies, forces, stresses and other targets with labels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "first", nargs="?", metavar="OPTIONS|CHECKPOINT", help="an options file or a model"
    )
    parser.add_argument("files", nargs="*", help="with a model: files of structures")
    parser.add_argument("-c", "--checkpoint", help="with an options file: the model")
    parser.add_argument("--adapter", help="folder of an adapter of this model")
    parser.add_argument(
        "--target",
        help="which target (default: the only one, that of the adapter, or all of the options)",
    )
    parser.add_argument(
        "--rotations",
        type=int,
        default=0,
        metavar="N",
        help="also compare predictions in N random orientations with each other",
    )
    parser.add_argument("--device", help="auto, cpu or cuda (default: auto, or the options')")
    parser.add_argument(
        "-r", "--override", action="append", default=[], metavar="KEY=VALUE",
        help="change an option; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "-o",
        "--output",
        default=named.ROOT,
        help=f"with --config: the folder above those of the runs (default: {named.ROOT})",
    )
    named.add_arguments(parser, several=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    given = {"-c": arguments.checkpoint, "--adapter": arguments.adapter}
    clash = [name for name, value in given.items() if value is not None]
    first = arguments.first
    if arguments.config is not None and first is not None and Path(first).suffix not in _YAML:
        first = None  # the first of the files to evaluate on
    if named.check_arguments(arguments, first, clash):
        return _named(arguments)
    if arguments.first is None:
        raise ConfigError("eval: name a model and files: eval MODEL FILE..., or --config FILE.")
    if Path(arguments.first).suffix in _YAML:
        return _with_options(arguments)
    if arguments.checkpoint is not None:
        raise ConfigError(
            f"eval: with -c the first argument is an options file, but '{arguments.first}' does "
            "not end in .yaml. Write: eval options.yaml -c MODEL, or: eval MODEL FILE..."
        )
    if arguments.override:
        raise ConfigError(
            "eval: -r changes an option, but no options file is given. Write: eval options.yaml "
            "-c MODEL -r KEY=VALUE"
        )
    if not arguments.files:
        raise ConfigError("eval: name the files to evaluate on: eval MODEL FILE...")
    from pet_finetune.log import setup_logging
    from pet_finetune.workflows import evaluate_files

    setup_logging()
    evaluate_files(
        arguments.first,
        arguments.files,
        adapter=arguments.adapter,
        target=arguments.target,
        device=arguments.device or "auto",
        rotations=arguments.rotations,
    )
    return 0


def _named(arguments: argparse.Namespace) -> int:
    """Evaluate a run by its name: on files, or on its own validation and test sets."""
    (entry,) = named.read_runs(arguments, arguments.output)
    from pet_finetune.log import setup_logging
    from pet_finetune.workflows.named_runs import evaluate_named

    setup_logging()
    files = [arguments.first, *arguments.files] if arguments.first is not None else []
    evaluate_named(
        entry,
        files,
        target=arguments.target,
        device=arguments.device,
        rotations=arguments.rotations,
    )
    return 0


def _with_options(arguments: argparse.Namespace) -> int:
    from pet_finetune.config.load import load_options

    if arguments.checkpoint is None:
        raise ConfigError("eval: name the model: eval options.yaml -c MODEL")
    if arguments.files:
        raise ConfigError(
            f"eval: the options file names the structures, so '{arguments.files[0]}' is one file "
            "too many. Write: eval options.yaml -c MODEL, or: eval MODEL FILE..."
        )
    loaded = load_options(arguments.first, arguments.override, require_start=False)
    from pet_finetune.log import get_logger, setup_logging
    from pet_finetune.workflows import evaluate_options

    setup_logging()
    for notice in loaded.notices:
        get_logger(__name__).warning(notice)
    evaluate_options(
        loaded.options,
        arguments.checkpoint,
        adapter=arguments.adapter,
        target=arguments.target,
        device=arguments.device,
        rotations=arguments.rotations,
    )
    return 0
