"""``pet-finetune info``, ``adapter`` and ``export``: what one does with models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pet_finetune.terminal import clear

from . import common

_OF_ADAPTERS = """\
  pet-finetune adapter info run/adapter
  pet-finetune adapter check run/adapter -c foundation.ckpt
  pet-finetune adapter merge run/adapter -c foundation.ckpt -o tuned.ckpt
  pet-finetune adapter combine water/ ice/ --weights 0.5 0.5 -o mixed/
"""
_OF_EXPORT = """\
  pet-finetune export best_model.ckpt -o model.pt
  pet-finetune export foundation.ckpt --adapter run/adapter -o water.pt
  pet-finetune export best_model.ckpt -o model.pt --dtype float64
  pet-finetune export best_model.ckpt --format metatrain -o model.ckpt
"""
#: Options of ``export`` with a value.
_EXPORT: dict[str, common.Option] = {
    "format": (
        str,
        "FORMAT",
        "metatomic, for engines, or metatrain, for mtt eval, train and export "
        "(default: metatrain where the file ends with .ckpt, else metatomic)",
    ),
    "target": (
        str,
        None,
        "the energy that engines get (default: that of the adapter, the only one, or energy);"
        " for metatrain the only target to write (default: all)",
    ),
    "dtype": (
        str,
        "TYPE",
        "float32 or float64 for everything (default: the model's in the network, and float64 "
        "for positions and energies)",
    ),
    "name": (str, None, "of the model, for its metadata (default: the file's name)"),
}


def add_info(commands: common.Commands) -> None:
    """Add ``info`` to the command line."""
    parser = common.add_command(
        commands,
        "info",
        _info,
        "show the contents of a checkpoint",
        "Sizes, species, targets, cutoff, baselines and provenance of a checkpoint.",
    )
    parser.add_argument("checkpoint", nargs="+", help=common.MODEL)
    parser.add_argument("--json", action="store_true", help="everything as JSON, a list of files")


def _info(arguments: argparse.Namespace) -> int:
    common.check_models(*arguments.checkpoint)
    from pet_finetune.api import checkpoint_facts, describe_checkpoint, show

    common.start_log()
    if arguments.json:
        facts = [checkpoint_facts(path) for path in arguments.checkpoint]
        clear()
        print(json.dumps(facts, indent=2, default=str))
        return 0
    for path in arguments.checkpoint:
        for table in describe_checkpoint(path):
            show(table)
    return 0


def add_adapter(commands: common.Commands) -> None:
    """Add ``adapter`` to the command line."""
    parser = common.add_command(
        commands,
        "adapter",
        _show_adapters,
        "show, check, merge and combine adapters",
        "Work with adapter folders, ours or Hugging Face PEFT's.",
        _OF_ADAPTERS,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    info = actions.add_parser("info", help="what a folder holds")
    info.add_argument("folder", nargs="+")
    info.set_defaults(run=_show_adapters)

    check = actions.add_parser(
        "check",
        help="check whether adapter folders can be used",
        description="The exit status is 1 if one cannot.",
    )
    check.add_argument("folder", nargs="+")
    check.add_argument("-c", "--checkpoint", help="the base, to check that they fit")
    check.set_defaults(run=_check)

    merge = actions.add_parser("merge", help="write base and adapter as one checkpoint")
    merge.add_argument("folder")
    merge.add_argument("-c", "--checkpoint", required=True, help="the base")
    merge.add_argument("-o", "--output", required=True, help="the new checkpoint")
    merge.set_defaults(run=_merge)

    combine = actions.add_parser("combine", help="write a weighted sum of adapters as a new one")
    combine.add_argument("folder", nargs="+")
    combine.add_argument(
        "--weights", nargs="+", type=float, help="one for each (default: equal ones)"
    )
    combine.add_argument(
        "--combination",
        default="cat",
        metavar="KIND",
        help="cat: exact, ranks add up; svd: its best approximation of a given rank; linear: "
        "PEFT's sum of factors (default: cat)",
    )
    combine.add_argument("--rank", type=int, help="of the result, for svd")
    combine.add_argument("-c", "--checkpoint", help="the base, where the weights do not sum to 1")
    combine.add_argument("-o", "--output", required=True, help="the new folder")
    combine.set_defaults(run=_combine)


def _show_adapters(arguments: argparse.Namespace) -> int:
    common.check_folders(*arguments.folder)
    from pet_finetune.api import describe_adapter, show

    for folder in arguments.folder:
        show(describe_adapter(folder))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    common.check_models(arguments.checkpoint)
    if not any(Path(folder).is_dir() for folder in arguments.folder):
        common.check_folders(*arguments.folder)
    from pet_finetune.api import check_adapters

    findings = check_adapters(arguments.folder, arguments.checkpoint)
    for finding in findings:
        print(f"{finding.folder}: {'ok' if finding.sound else 'WRONG'}: {finding.text}")
    return 0 if all(finding.sound for finding in findings) else 1


def _merge(arguments: argparse.Namespace) -> int:
    common.check_models(arguments.checkpoint)
    common.check_folders(arguments.folder)
    from pet_finetune.api import merge_adapter

    print(merge_adapter(arguments.folder, arguments.checkpoint, arguments.output))
    return 0


def _combine(arguments: argparse.Namespace) -> int:
    common.check_models(arguments.checkpoint)
    common.check_folders(*arguments.folder)
    from pet_finetune.api import combine_adapters

    folder = combine_adapters(
        [Path(folder) for folder in arguments.folder],
        arguments.output,
        weights=arguments.weights,
        combination=arguments.combination,
        rank=arguments.rank,
        checkpoint=arguments.checkpoint,
    )
    print(folder)
    return 0


def add_export(commands: common.Commands) -> None:
    """Add ``export`` to the command line."""
    parser = common.add_command(
        commands,
        "export",
        _export,
        "write a model for LAMMPS, i-PI, ASE and other engines, or for metatrain",
        "Write a model as a metatomic file, which runs without pet-finetune, or as a "
        "checkpoint of metatrain.",
        _OF_EXPORT,
    )
    parser.add_argument("checkpoint", help=common.MODEL)
    parser.add_argument(
        "-o",
        "--output",
        help="the file (default: the checkpoint's name with .pt, or with _metatrain.ckpt)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="DIR",
        help="folder of an adapter of this model, to merge into it; several, or the folder of a "
        "run with finetune.ensemble, are a committee, whose uncertainty is in the file",
    )
    common.add_options(parser, _EXPORT)
    parser.add_argument(
        "--author", action="append", default=[], help="for its metadata; may be repeated"
    )


def _export(arguments: argparse.Namespace) -> int:
    (source,) = common.check_models(arguments.checkpoint)
    common.check_folders(*arguments.adapter or ())
    from pet_finetune.api import export_model, export_table, show

    common.start_log()
    ending = "_metatrain.ckpt" if arguments.format == "metatrain" else ".pt"
    outcome = export_model(
        arguments.checkpoint,
        arguments.output or f"{source.stem}{ending}",
        adapter=arguments.adapter,
        authors=arguments.author,
        **common.given(arguments, _EXPORT),
    )
    show(export_table(outcome))
    return 0
