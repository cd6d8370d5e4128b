"""``pet-finetune train`` and ``pretrain``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pet_finetune.errors import ConfigError, TrainingError

from . import common

_LAST = "last.ckpt"
_OF_TRAIN = """\
  pet-finetune train options.yaml -c best_model.ckpt     start from a checkpoint's weights
  pet-finetune train options.yaml -o model.pt            and export the model at the end
  pet-finetune train options.yaml --restart auto         go on with the newest run
  pet-finetune train options.yaml -r architecture.training.num_epochs=50
  pet-finetune train options.yaml --profile              a few steps only: where the time goes
  pet-finetune train --config finetune_configs.json --run-name ethanol_r8_dora
"""
_PROFILED_STEPS = 10
#: What -o ends with where it is the exported model, as in `mtt train -o model.pt`.
_MODELS = {".pt", ".ckpt"}


def add_train(commands: common.Commands) -> None:
    """Add ``train`` to the command line."""
    parser = common.add_command(
        commands,
        "train",
        _train,
        "fine-tune a checkpoint, or train from scratch",
        "Train as an options file says (metatrain's layout).",
        _OF_TRAIN,
    )
    parser.add_argument("options", nargs="?", help="the options file, YAML")
    parser.add_argument(
        "-c", "--checkpoint", help=f"start a new run from these weights: {common.MODEL}"
    )
    parser.add_argument(
        "--restart",
        metavar="auto|PATH",
        help="continue exactly where a run stopped: its last.ckpt or its folder; auto takes the"
        " newest, or starts a new run if there is none",
    )
    common.add_override(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder of the run (default: outputs/DATE/TIME), or with --config the folder above "
        f"those of the runs (default: {common.ROOT}); or a file to export the model to at the end: "
        "model.pt for engines, model.ckpt for metatrain",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=_steps,
        const=_PROFILED_STEPS,
        metavar="N",
        help="instead of training, time N steps of the run "
        f"(default: {_PROFILED_STEPS}) and say where the time goes",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not check the data before training (pet-finetune inspect shows the findings)",
    )
    common.add_named_runs(parser, several=True)


def _steps(text: str) -> int:
    """A number of steps."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no number of steps; give the options file before --profile"
        ) from None


def _train(arguments: argparse.Namespace) -> int:
    starts = {"-c": arguments.checkpoint, "--restart": arguments.restart,
             "--profile": arguments.profile}  # fmt: skip
    clash = [name for name, value in starts.items() if value is not None]
    if common.are_named_runs(arguments, arguments.options, clash):
        return _named(arguments)
    if arguments.options is None:
        raise ConfigError("train: name the options file: train options.yaml, or --config FILE.")
    from pet_finetune.config.load import load_options

    if arguments.checkpoint is not None and arguments.restart is not None:
        raise TrainingError(
            "-c starts a new run from a checkpoint and --restart goes on with an old one: "
            "give one of them."
        )
    if arguments.profile is not None and arguments.restart is not None:
        raise TrainingError(
            "--profile times the first steps of a new run, and a run that goes on takes the same "
            "time for each step: leave --restart out."
        )
    if arguments.profile is not None:
        # Torch reads it when it is imported; its profiler would write its own notes to stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    given_folder, output = _folder_or_model(arguments.output)
    if output is not None and arguments.profile is not None:
        raise TrainingError(f"--profile makes no model, so '{output}' has no place: leave -o out.")
    restart, notice = find_restart(arguments.restart, given_folder)
    loaded = load_options(
        arguments.options,
        arguments.override,
        arguments.checkpoint,
        require_start=restart is None,
    )
    standing = given_folder or Path()
    standing = next(path for path in (standing, *standing.absolute().parents) if path.exists())
    if standing.is_dir():  # else the run says first that it cannot write there
        common.check_sets(loaded.options.datasets())
        common.check_models(loaded.options.finetune.read_from)
    whole = loaded.options.is_committee
    folder = given_folder or (_run_of(restart, whole) if restart else None)

    from pet_finetune.api import profile, train

    if arguments.profile is not None:
        profile(
            loaded.options,
            folder,
            arguments.profile,
            notices=loaded.notices,
            source=arguments.options,
        )
        return 0
    outcome = train(
        loaded.options,
        folder,
        output=output,
        restart=restart,
        notices=[*notice, *loaded.notices],
        source=arguments.options,
        check=not arguments.no_check,
    )
    return 0 if outcome.result.finished else 130


def _folder_or_model(output: Path | None) -> tuple[Path | None, Path | None]:
    """The folder of the run that -o names, or the file of the exported model."""
    if output is not None and output.suffix in _MODELS and not output.is_dir():
        return None, output
    return output, None


def _run_of(restart: Path, ensemble: bool) -> Path:
    """The folder of the run that a ``last.ckpt`` belongs to."""
    member = ensemble and restart.parent.name.startswith("member_")
    return restart.parent.parent if member else restart.parent


def _named(arguments: argparse.Namespace) -> int:
    """Train runs that a file names, or show what they are."""
    _, model = _folder_or_model(arguments.output)
    if model is not None:
        raise ConfigError(
            f"-o: with --config it is the folder above those of the runs, but '{model}' is a file. "
            "Each run has its best_model.ckpt; `pet-finetune export` writes it for engines."
        )
    runs = common.read_runs(arguments, str(arguments.output or common.ROOT))
    if arguments.show_options:
        from pet_finetune.config.load import to_yaml
        from pet_finetune.config.options_reference import schema_line

        for entry in runs:
            print(schema_line(), end="")
            print(f"# {entry.name}: pet-finetune train options.yaml -o {entry.folder}")
            print(to_yaml(entry.raw))
        return 0
    from pet_finetune.api import train_named

    return train_named(
        runs, arguments.config, alone=not arguments.all, check=not arguments.no_check
    )


def find_restart(wanted: str | None, output: Path | None) -> tuple[Path | None, list[str]]:
    """The ``last.ckpt`` to continue from (a member's for an ensemble), and its notice.

    ``auto`` without a run to go on with starts a new one, as metatrain does: the first job of a
    chain has the same command as those that follow.

    Raises:
        TrainingError: there is no such file.
        RunError: several runs may be the last one.
    """
    if wanted is None:
        return None, []
    if wanted != "auto":
        return _last_of(Path(wanted)), []
    from pet_finetune.runs import OUTPUTS, newest_run

    root = output or OUTPUTS
    found = newest_run(root, _LAST)
    if found is None:
        theirs = max(root.glob("**/options_restart.yaml"), default=None)
        remark = (
            f" '{theirs.parent}' is a run of metatrain, which is not gone on with: to start from "
            "its weights, give its checkpoint with -c."
            if theirs
            else ""
        )
        return None, [
            f"--restart auto: there is no run below '{root}' yet; a new one is started.{remark}"
        ]
    return _last_of(found), [f"--restart auto: going on with '{found}'."]


def _last_of(path: Path) -> Path:
    """The ``last.ckpt`` that is meant by a path to it, to its run, or to an ensemble.

    Raises:
        TrainingError: there is none.
    """
    if path.is_dir():
        members = sorted(path.glob(f"member_*/{_LAST}"))
        path = path / _LAST if (path / _LAST).exists() or not members else members[-1]
    if not path.exists():
        raise TrainingError(f"--restart: there is no file '{path}'.")
    return path


_OF_PRETRAIN = """\
  pet-finetune pretrain structures.xyz -c foundation.ckpt -o pretrained.ckpt
  pet-finetune pretrain structures.xyz -c foundation.ckpt --teacher larger.ckpt -n 1000 -o pretrained.ckpt
  pet-finetune pretrain structures.xyz -c foundation.ckpt --teacher my_module:my_calculator -o pretrained.ckpt
  pet-finetune train options.yaml -c pretrained.ckpt     then fine-tune from it
The same command goes on where it was stopped.
"""  # noqa: E501
#: Settings of ``pretrain`` by the name of their argument.
_PRETRAINING: dict[str, common.Option] = {
    "n": (int, "N", "frames that the teacher labels (default: 2000)"),
    "epochs": (int, "N", "passes over them (default: 10)"),
    "batch_size": (int, "N", "structures in a batch of the training (default: 10)"),
    "learning_rate": (float, "X", "of the training (default: 2e-4)"),
    "max_force": (float, "X", "drop frames with larger forces, in eV/A (default: 20)"),
    "max_energy": (
        float,
        "X",
        "drop frames with energies this much above their start, in eV/atom (default: 1)",
    ),
    "seed": (int, "N", "of dynamics, displacements and training (default: 0)"),
}


def add_pretrain(commands: common.Commands) -> None:
    """Add ``pretrain`` to the command line."""
    parser = common.add_command(
        commands,
        "pretrain",
        _pretrain,
        "train the foundation on your system with cheap labels, before fine-tuning",
        "Explore structures like yours with the foundation, label them with a cheap teacher and"
        " train on them. See docs/pretraining.md for when this helps.",
        _OF_PRETRAIN,
    )
    parser.add_argument("structures", help="any file ASE reads; its labels are not used")
    parser.add_argument("-c", "--checkpoint", required=True, help=f"the foundation: {common.MODEL}")
    parser.add_argument("-o", "--output", required=True, help="the checkpoint to write")
    parser.add_argument(
        "--teacher", metavar="NAME",
        help="gfn2 (default) or gfn1, which need tblite; an ASE calculator as module:name; or a "
        "checkpoint",
    )  # fmt: skip
    common.add_options(parser, _PRETRAINING)
    parser.add_argument(
        "--temperatures", type=float, nargs="+", metavar="K",
        help="of the molecular dynamics (default: 300 600 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--work", metavar="DIR", help="folder of the stages (default: OUTPUT with .work)"
    )
    target: common.Option = (str, None, "the energy to use, if the foundation has several")
    common.add_options(parser, {**common.OF_SYSTEMS, "target": target, "device": common.DEVICE})


def _pretrain(arguments: argparse.Namespace) -> int:
    common.check_data(arguments.structures)
    common.check_models(arguments.checkpoint)
    from pet_finetune.api import pretrain

    common.start_log()
    settings = common.given(arguments, (*_PRETRAINING, "teacher", "target", "device", "work"))
    if arguments.temperatures is not None:
        settings["temperatures"] = tuple(arguments.temperatures)
    pretrain(
        arguments.checkpoint,
        arguments.structures,
        output=arguments.output,
        systems=common.systems_of(arguments),
        **settings,
    )
    return 0
