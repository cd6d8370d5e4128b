"""``pet-finetune eval``: errors of a model on labelled structures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pet_finetune.errors import ConfigError

from . import common

if TYPE_CHECKING:
    from pet_finetune.api import LabelNames

_EXAMPLES = """\
  pet-finetune eval options.yaml -c best_model.ckpt      the sets that the options name
  pet-finetune eval best_model.ckpt structures.xyz       whole files, in eV and Angstrom
  pet-finetune eval best_model.ckpt structures.xyz --energy-key REF_energy -o predicted.xyz
  pet-finetune eval best_model.ckpt eval.yaml            an options file of `mtt eval`
  pet-finetune eval --config finetune_configs.json --run-name ethanol_r8_dora [structures.xyz]
"""
#: Arguments that say how files are read; options files say it themselves.
_OF_FILES = {
    "--energy-key": "key",
    "--forces-key": "forces_key",
    "--stress-key": "stress_key",
    "--virial-key": "virial_key",
    "--energy-unit": "energy_unit",
    "--length-unit": "length_unit",
    "--format": "format",
    "--types": "types",
}


def add_eval(commands: common.Commands) -> None:
    """Add ``eval`` to the command line."""
    parser = common.add_command(
        commands,
        "eval",
        _eval,
        "errors of a model on labelled structures, and its predictions",
        "Compare a model's energies, forces, stresses and other targets with labels, "
        "and write what it predicts.",
        _EXAMPLES,
    )
    parser.add_argument(
        "first", nargs="?", metavar="OPTIONS|CHECKPOINT", help="an options file or a model"
    )
    parser.add_argument(
        "files", nargs="*", help="with a model: files of structures, or one options file"
    )
    parser.add_argument(
        "-c", "--checkpoint", help=f"with an options file: the model, {common.MODEL}"
    )
    parser.add_argument("--adapter", help="folder of an adapter of this model")
    parser.add_argument(
        "--target",
        help=(
            "the target to use (default: the only one, that of the adapter, or all of the options)"
        ),
    )
    parser.add_argument(
        "--rotations",
        type=int,
        default=0,
        metavar="N",
        help="also compare predictions in N random orientations with each other",
    )
    parser.add_argument(
        "-b", "--batch-size", type=int, default=32, metavar="N",
        help="structures predicted at once (default: 32)",
    )  # fmt: skip
    parser.add_argument("--device", help="auto, cpu or cuda (default: auto, or the options')")
    common.add_options(parser, {"compile": common.COMPILE})
    common.add_override(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="write the structures with the predictions to a file (.xyz, .extxyz, .db) or, with a "
        "slash behind (predictions/), as metatrain's memory-mapped arrays; with --config the "
        f"folder above those of the runs (default: {common.ROOT})",
    )
    _add_names(parser)
    common.add_named_runs(parser, several=False)


def _add_names(parser: argparse.ArgumentParser) -> None:
    """Arguments for names and units of labels."""
    group = parser.add_argument_group(
        "labels of files", "names and units in files of structures (options files have their own)"
    )
    group.add_argument(
        "--energy-key", "--key", dest="key", metavar="NAME",
        help="the energies, or the values of another --target (default: energy, or its name)",
    )  # fmt: skip
    keys: dict[str, common.Option] = {
        f"{kind}_key": (str, "NAME", f"the {kind}") for kind in ("forces", "stress", "virial")
    }
    common.add_options(group, keys)
    group.add_argument(
        "--energy-unit", "--unit", dest="energy_unit", metavar="UNIT",
        help="of the energies, or of the values of another --target (default: eV, or its own)",
    )  # fmt: skip
    group.add_argument(
        "--length-unit", metavar="UNIT",
        help="of positions and cells; forces and stresses are in the units that this and the "
        "energy's make (default: angstrom)",
    )  # fmt: skip
    common.add_options(group, common.OF_SYSTEMS)


def _eval(arguments: argparse.Namespace) -> int:
    given = {"-c": arguments.checkpoint, "--adapter": arguments.adapter}
    clash = [name for name, value in given.items() if value is not None]
    first = arguments.first
    if arguments.config is not None and first is not None and Path(first).suffix not in common.YAML:
        first = None  # the first of the files to evaluate on
    if common.are_named_runs(arguments, first, clash):
        return _named(arguments)
    if arguments.first is None:
        raise ConfigError("eval: name a model and files: eval MODEL FILE..., or --config FILE.")
    files = arguments.files
    if len(files) == 1 and Path(files[0]).suffix in common.YAML and arguments.checkpoint is None:
        # As `mtt eval model.pt eval.yaml`.
        arguments.first, arguments.checkpoint, arguments.files = files[0], arguments.first, []
    if Path(arguments.first).suffix in common.YAML:
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
    common.check_models(arguments.first)
    common.check_folders(arguments.adapter)
    common.check_data(*arguments.files)
    from pet_finetune.api import evaluate_files

    common.start_log()
    evaluate_files(arguments.first, arguments.files, labels=_labels(arguments), **_how(arguments))
    return 0


def _labels(arguments: argparse.Namespace) -> LabelNames:
    from pet_finetune.api import LabelNames

    return LabelNames(
        key=arguments.key,
        forces=arguments.forces_key,
        stress=arguments.stress_key,
        virial=arguments.virial_key,
        energy_unit=arguments.energy_unit,
        length_unit=arguments.length_unit,
        systems=common.systems_of(arguments),
    )


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    from pet_finetune.api import EvaluationSettings

    # With --config, -o is the folder of the runs.
    output = arguments.output if arguments.config is None else None
    settings = EvaluationSettings(
        arguments.rotations, output, arguments.batch_size, compile=arguments.compile or "auto"
    )
    return common.given(arguments, ("adapter", "target", "device")) | {"how": settings}


def _no_names(arguments: argparse.Namespace, source: str) -> None:
    """Refuse names and units of labels if another argument defines them."""
    for name, attribute in _OF_FILES.items():
        if getattr(arguments, attribute) is not None:
            raise ConfigError(
                f"eval: {name} says how files of structures are read, but {source} says that of "
                "its sets. Change it there, or with -r KEY=VALUE."
            )


def _named(arguments: argparse.Namespace) -> int:
    """Evaluate a run by its name: on files, or on its own validation and test sets."""
    (entry,) = common.read_runs(arguments, arguments.output or common.ROOT)
    files = [arguments.first, *arguments.files] if arguments.first is not None else []
    if not files:
        _no_names(arguments, f"the run '{entry.name}'")
    from pet_finetune.api import evaluate_named

    common.start_log()
    evaluate_named(entry, files, labels=_labels(arguments), **_how(arguments))
    return 0


def _with_options(arguments: argparse.Namespace) -> int:
    """Evaluate on the sets of an options file: of a run, or of ``mtt eval``."""
    from pet_finetune.config.load import is_evaluation, load_evaluation, load_options

    if arguments.checkpoint is None:
        raise ConfigError("eval: name the model: eval options.yaml -c MODEL")
    if arguments.files:
        raise ConfigError(
            f"eval: the options file names the structures, so '{arguments.files[0]}' is one file "
            "too many. Write: eval options.yaml -c MODEL, or: eval MODEL FILE..."
        )
    _no_names(arguments, arguments.first)
    common.check_models(arguments.checkpoint)
    common.check_folders(arguments.adapter)
    if is_evaluation(arguments.first):
        sets, notices = load_evaluation(arguments.first, arguments.override)
        common.check_sets(sets)
        from pet_finetune.api import evaluate_datasets

        common.start_log(notices)
        evaluate_datasets(sets, arguments.checkpoint, **_how(arguments))
        return 0
    loaded = load_options(arguments.first, arguments.override, require_start=False)
    common.check_sets(loaded.options.datasets())
    from pet_finetune.api import evaluate_options

    common.start_log(loaded.notices)
    evaluate_options(loaded.options, arguments.checkpoint, **_how(arguments))
    return 0
