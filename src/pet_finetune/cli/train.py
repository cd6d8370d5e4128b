"""``pet-finetune train``: fine-tune a checkpoint, or train from scratch."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

from pet_finetune.errors import ConfigError, TrainingError

from . import named
from .paths import check_models, check_sets

_OUTPUTS = Path("outputs")
_EXAMPLES = """\
examples:
  pet-finetune train options.yaml -c best_model.ckpt     start from a checkpoint's weights
  pet-finetune train options.yaml --restart auto         go on with the newest run
  pet-finetune train options.yaml -r architecture.training.num_epochs=50
  pet-finetune train options.yaml --profile              a few steps only: where the time goes
  pet-finetune train --config finetune_configs.json --run-name ethanol_r8_dora
"""
_PROFILED_STEPS = 10


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a checkpoint, or train from scratch",
        description="Train as an options file says (metatrain's layout).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("options", nargs="?", help="the options file, YAML")
    parser.add_argument(
        "-c", "--checkpoint", help="start a new run from the weights of this checkpoint"
    )
    parser.add_argument(
        "--restart",
        metavar="auto|PATH",
        help="go on exactly where a run stopped: its last.ckpt or its folder; "
        "auto takes the newest",
    )
    parser.add_argument(
        "-r",
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change an option; may be repeated",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder of the run (default: outputs/DATE/TIME), or with --config the folder above "
        f"those of the runs (default: {named.ROOT})",
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
        help="do not look at the data before training (pet-finetune inspect shows what is found)",
    )
    named.add_arguments(parser, several=True)
    parser.set_defaults(run=run)


def _steps(text: str) -> int:
    """A number of steps."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no number of steps; give the options file before --profile"
        ) from None


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    given = {"-c": arguments.checkpoint, "--restart": arguments.restart,
             "--profile": arguments.profile}  # fmt: skip
    clash = [name for name, value in given.items() if value is not None]
    if named.check_arguments(arguments, arguments.options, clash):
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
    loaded = load_options(
        arguments.options,
        arguments.override,
        arguments.checkpoint,
        require_start=arguments.restart is None,
    )
    output = arguments.output or _OUTPUTS
    standing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if standing.is_dir():  # else the run says first that it cannot write there
        check_sets(loaded.options.datasets())
        check_models(loaded.options.finetune.read_from)
    restart = None
    if arguments.restart is not None:
        restart = find_restart(arguments.restart, arguments.output)
    finetune = loaded.options.finetune
    whole = finetune.ensemble is not None and finetune.member is None
    folder = arguments.output or (_run_of(restart, whole) if restart else new_folder())

    from pet_finetune.workflows import profile_run, train

    if arguments.profile is not None:
        profile_run(
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
        restart=restart,
        notices=loaded.notices,
        source=arguments.options,
        check=not arguments.no_check,
    )
    return 0 if outcome.result.finished else 130


def _run_of(restart: Path, ensemble: bool) -> Path:
    """The folder of the run that a ``last.ckpt`` belongs to."""
    member = ensemble and restart.parent.name.startswith("member_")
    return restart.parent.parent if member else restart.parent


def _named(arguments: argparse.Namespace) -> int:
    """Train runs that a file names, or show what they are."""
    runs = named.read_runs(arguments, str(arguments.output or named.ROOT))
    if arguments.show_options:
        from pet_finetune.config.yaml_file import to_yaml

        for entry in runs:
            print(f"# {entry.name}: pet-finetune train options.yaml -o {entry.folder}")
            print(to_yaml(entry.raw))
        return 0
    from pet_finetune.workflows.named_runs import train_named

    return train_named(
        runs, arguments.config, alone=not arguments.all, check=not arguments.no_check
    )


def new_folder() -> Path:
    """``outputs/DATE/TIME``, as metatrain names them."""
    return _OUTPUTS / datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S")


def find_restart(wanted: str, output: Path | None) -> Path:
    """The ``last.ckpt`` to go on from; of an ensemble, that of a member.

    Raises:
        TrainingError: there is none.
    """
    if wanted != "auto":
        path = Path(wanted)
        if path.is_dir():
            members = sorted(path.glob("member_*/last.ckpt"))
            path = (
                path / "last.ckpt" if (path / "last.ckpt").exists() or not members else members[-1]
            )
        if not path.exists():
            raise TrainingError(f"--restart: there is no file '{path}'.")
        return path
    root = output or _OUTPUTS
    found = sorted(root.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise TrainingError(
            f"--restart auto: no last.ckpt below '{root}'. Start a new run without --restart, or "
            "name the folder of the run: --restart FOLDER."
        )
    return found[-1]
