"""``pet-finetune md`` and ``relax``: a model moves atoms."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pet_finetune.errors import ConfigError, DynamicsError

from . import common

_STATE = "state.npz"
_EXAMPLES = """\
  pet-finetune md best_model.ckpt molecule.xyz --ensemble nve --steps 2000
  pet-finetune md best_model.ckpt box.xyz --ensemble npt --pressure 0.1 --minimize 200
  pet-finetune md foundation.ckpt box.xyz --adapter a0/ --adapter a1/ --adapter a2/
  pet-finetune md --restart auto                      go on with the newest simulation
"""
#: Settings of a simulation by the name of their argument.
_OF_MD: dict[str, common.Option] = {
    "ensemble": (str, "nve|nvt|npt", "what is kept constant (default: nvt)"),
    "temperature": (float, "K", "in K; of nve that of the first velocities (default: 300)"),
    "steps": (int, "N", "in all (default: 10000); with --restart more than before"),
    "timestep": (float, "FS", "in fs (default: 0.5)"),
    "every": (int, "N", "steps between two frames and lines of the log (default: 10)"),
    "seed": (int, "N", "of velocities and thermostat (default: drawn, and kept in md.json)"),
    "minimize": (int, "N", "relax the start first, with at most N steps of FIRE"),
    "stop_uncertainty": (
        float,
        "X",
        "with a committee or a last-layer ensemble (LLPR): stop when the force on an atom is "
        "uncertain by more than X eV/A",
    ),
    "max_temperature": (
        float,
        "K",
        "stop the run above it (default: ten times --temperature, at least 2000)",
    ),
    "thermostat": (str, "NAME", "of nvt: langevin (default), bussi or nose-hoover"),
    "friction": (float, "X", "of langevin, in 1/ps (default: 10)"),
    "thermostat_time": (float, "FS", "of the other thermostats and npt, in fs (default: 100)"),
    "pressure": (float, "GPA", "of npt, in GPa; 1 bar is 0.0001 (default: 0)"),
    "barostat": (str, "NAME", "of npt: isotropic keeps the cell's shape (default), full does not"),
    "barostat_time": (float, "FS", "of npt, in fs (default: 1000)"),
}


#: Settings of a relaxation.
_OF_RELAX: dict[str, common.Option] = {
    "fmax": (float, "EV/A", "largest force on an atom at the end (default: 0.05)"),
    "steps": (int, "N", "the most for one structure (default: 500)"),
    "optimizer": (str, "NAME", "fire (default), lbfgs or bfgs"),
    "pressure": (float, "GPA", "external pressure, with --cell (default: 0)"),
}


def add_md(commands: common.Commands) -> None:
    """Add ``md`` to the command line."""
    parser = common.add_command(
        commands,
        "md",
        _md,
        "run and check molecular dynamics with a model",
        "Simulate a structure with ASE's integrators. Writes a trajectory, a log and a plot of "
        "energy and temperature, and stops with a message when the simulation fails.",
        _EXAMPLES,
    )
    parser.add_argument("checkpoint", nargs="?", help=common.MODEL)
    parser.add_argument("structure", nargs="?", help="any file ASE reads")
    parser.add_argument("--index", type=int, help="frame of the file, from 0 (default: the last)")
    common.add_options(parser, common.OF_SYSTEMS)
    parser.add_argument(
        "--restart",
        metavar="auto|FOLDER",
        help="continue a stopped simulation exactly; auto takes the newest, or starts MODEL "
        "STRUCTURE if there is none",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder of the run (default: outputs/DATE/TIME)"
    )
    common.add_options(parser, _OF_MD)
    velocities = parser.add_mutually_exclusive_group()
    velocities.add_argument(
        "--keep-velocities", dest="velocities", action="store_const", const="keep",
        help="keep those of the file, which must have them (default: if it has them)",
    )  # fmt: skip
    velocities.add_argument(
        "--new-velocities", dest="velocities", action="store_const", const="new",
        help="draw them even if the file has some",
    )  # fmt: skip
    common.add_model_arguments(parser, "whose uncertainty goes into the log")


def _md(arguments: argparse.Namespace) -> int:
    settings, model = common.given(arguments, (*_OF_MD, "velocities")), common.model_of(arguments)
    start = arguments.checkpoint is not None and arguments.structure is not None
    found = None
    if arguments.restart == "auto":
        found = _newest(arguments.output, or_none=start)
    elif arguments.restart is not None:
        found = Path(arguments.restart)
        if not found.is_dir():
            raise DynamicsError(
                f"--restart: there is no folder '{found}'. Name the output folder of a run of "
                "`pet-finetune md`."
            )
    if found is not None:
        return _restart(arguments, found, settings, model)
    if arguments.checkpoint is None or arguments.structure is None:
        raise ConfigError(
            "md: name a model and a structure: md MODEL STRUCTURE, or go on with --restart FOLDER."
        )
    common.check_models(arguments.checkpoint)
    common.check_folders(*arguments.adapter)
    common.check_data(arguments.structure)
    from pet_finetune.api import MDSettings, ModelChoice, run_md

    log = common.start_log()
    if arguments.restart is not None:
        log.info("--restart auto: there is no simulation yet; one is started.")
    result = run_md(
        ModelChoice(arguments.checkpoint, **model),
        arguments.structure,
        MDSettings(**settings),
        arguments.output,
        index=arguments.index,
        **common.systems_of(arguments),
    )
    return 130 if result.outcome.reason == "interrupted" else 0


def _restart(
    arguments: argparse.Namespace, folder: Path, settings: dict[str, Any], model: dict[str, Any]
) -> int:
    """Continue a simulation; only its length and the path of its model may change."""
    steps = settings.pop("steps", None)
    unused = [f"--{name.replace('_', '-')}" for name in settings if name != "velocities"]
    # What makes other forces of the same weights would not go on with the run either.
    unused += [f"--{name}" for name in common.OF_MODEL if name in model and name != "device"]
    unused += ["--keep-velocities or --new-velocities"] if "velocities" in settings else []
    unused += ["the structure"] if arguments.structure is not None else []
    unused += ["--index"] if arguments.index is not None else []
    unused += [f"--{name}" for name in common.systems_of(arguments)]
    auto = arguments.restart == "auto"
    unused += ["-o"] if arguments.output is not None and not auto else []
    # The same command as at first, in the next job of a chain: its own settings are the run's.
    same = auto and None not in (arguments.checkpoint, arguments.structure)
    if unused and not same:
        raise ConfigError(
            f"md --restart goes on with the run's own settings: leave {', '.join(unused)} out, or "
            "start a new run from its last frame. Only --steps, the checkpoint, --adapter and "
            "--device can be given."
        )
    from pet_finetune.api import restart_md

    log = common.start_log()
    if same:
        words = "--restart auto: going on with '%s' by its own settings; not read again: %s."
        log.info(words, folder, ", ".join(unused))
    if arguments.checkpoint is not None:
        model["checkpoint"] = arguments.checkpoint
    result = restart_md(folder, model=model, steps=steps)
    return 130 if result.outcome.reason == "interrupted" else 0


def _newest(root: Path | None, or_none: bool) -> Path | None:
    """Folder below ``root`` with the most recently started or continued simulation.

    Raises:
        DynamicsError: there is none, and that is no answer.
        RunError: several may be the last.
    """
    from pet_finetune.runs import OUTPUTS, newest_run

    found = newest_run(root or OUTPUTS, _STATE)
    if found is None and not or_none:
        raise DynamicsError(
            f"--restart auto: no simulation below '{root or OUTPUTS}'. Name the model and the "
            "structure that a new one starts with, or its folder: --restart FOLDER."
        )
    return found


def add_relax(commands: common.Commands) -> None:
    """Add ``relax`` to the command line."""
    parser = common.add_command(
        commands,
        "relax",
        _relax,
        "relax structures with a model",
        "Relax each structure of a file to the nearest minimum of the model's energy with ASE's"
        " optimisers, optionally with its cell. Many are computed at once.",
    )
    parser.add_argument("checkpoint", help=common.MODEL)
    parser.add_argument("structures", help="any file ASE reads; all of its frames are relaxed")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("relaxed.xyz"),
        help="extended XYZ to write (default: relaxed.xyz)",
    )  # fmt: skip
    parser.add_argument("--index", type=int, help="one frame of the file, from 0 (default: all)")
    common.add_options(parser, {**common.OF_SYSTEMS, **_OF_RELAX})
    parser.add_argument("--cell", action="store_true", help="relax the cell with the atoms")
    common.add_model_arguments(parser, "whose mean moves the atoms")


def _relax(arguments: argparse.Namespace) -> int:
    common.check_models(arguments.checkpoint)
    common.check_folders(*arguments.adapter)
    common.check_data(arguments.structures)
    from pet_finetune.api import ModelChoice, RelaxSettings, relax_structures

    common.start_log()
    relax_structures(
        ModelChoice(arguments.checkpoint, **common.model_of(arguments)),
        arguments.structures,
        arguments.output,
        RelaxSettings(**common.given(arguments, (*_OF_RELAX, "cell"))),
        index=arguments.index,
        **common.systems_of(arguments),
    )
    return 0
