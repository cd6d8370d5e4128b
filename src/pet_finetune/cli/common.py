"""Arguments shared by commands, and checks of files before torch is imported."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pet_finetune.errors import AdapterError, ConfigError
from pet_finetune.files import check_file

if TYPE_CHECKING:  # pydantic takes longer to import than --help may take
    from pet_finetune.config.dataset import DatasetOptions
    from pet_finetune.config.named_run_options import NamedRun

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Arguments: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"
#: An option with a value: how that is read or what it can be, its placeholder (None: the name or
#: what it can be), what it does.
Option: TypeAlias = "tuple[Callable[[str], Any] | tuple[str, ...], str | None, str]"

#: How a model is given, for help texts.
MODEL = "a file of ours or metatrain's, an address (https://, hf://) or a name such as pet-mad-s"
DEVICE: Option = (str, None, "auto, cpu or cuda (default: auto)")
COMPILE: Option = (
    ("auto", "on", "off"),
    None,
    "compiled predictions: on compiles a graph, once for a kind of model, in a minute or two; "
    "auto (default) uses an existing one, on a GPU",
)
#: What ends with these is an options file.
YAML = {".yaml", ".yml"}
#: What can be said of a model that moves atoms, beside its adapters.
OF_MODEL: Mapping[str, Option] = {
    "target": (str, None, "the energy to use, if the model has several"),
    "device": DEVICE,
    "dtype": (str, None, "float32 or float64 (default: the model's)"),
    "orientations": (
        int,
        "N",
        "mean over 2, 4, 12 or 24 orientations, in N times the time (default: 1)",
    ),
    "compile": COMPILE,
}
#: The folder above those of named runs.
ROOT = "lora_adapters"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    description: str,
    examples: str = "",
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: of the command line.
        name: of the command.
        run: carries it out and gives the exit status.
        help: for the list of commands.
        description: for its own help.
        examples: a line each.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=raw if examples else argparse.HelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_options(parser: Arguments, options: Mapping[str, Option]) -> None:
    """Add options with a value, by the names of their attributes; None where not given."""
    for name, (kind, shown, words) in options.items():
        flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
        form: dict[str, Any] = {"choices" if isinstance(kind, tuple) else "type": kind}
        parser.add_argument(flag, metavar=shown, help=words, **form)


def add_override(parser: Arguments, when: str = "") -> None:
    """Add ``-r``."""
    parser.add_argument(
        "-r", "--override", action="append", default=[], metavar="KEY=VALUE",
        help=f"{when}change an option; may be repeated",
    )  # fmt: skip


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Given options by name."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def start_log(notices: Iterable[str] = (), level: str = "INFO") -> logging.Logger:
    """The log of a command, which begins with remarks on its options."""
    from pet_finetune.log import get_logger, setup_logging

    setup_logging(level)
    for notice in notices:
        get_logger(__name__).warning(notice)
    return get_logger(__name__)


def add_model_arguments(parser: Arguments, of_committee: str) -> None:
    """Add ``--adapter`` and :data:`OF_MODEL`.

    ``of_committee`` says what becomes of the uncertainty of several adapters.
    """
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="DIR",
        help="adapter of this checkpoint; several, or the folder of a run with finetune.ensemble, "
        f"are a committee, {of_committee}",
    )  # fmt: skip
    add_options(parser, OF_MODEL)


def model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as attributes of ``ModelChoice``."""
    adapters = {"adapters": tuple(arguments.adapter)} if arguments.adapter else {}
    return given(arguments, OF_MODEL) | adapters


def systems_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Values of :data:`OF_SYSTEMS` as options of ``systems``."""
    return given(arguments, OF_SYSTEMS)


def _types(text: str) -> dict[int, str]:
    from pet_finetune.config.base import element

    types = {}
    for part in text.replace(",", " ").split():
        number, equals, name = part.partition("=")
        try:
            types[int(number)] = element(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r}: {error}") from None
        if not equals or int(number) < 0:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form 1=O")
    return types


#: How files are read.
OF_SYSTEMS: Mapping[str, Option] = {
    "format": (
        str,
        "NAME",
        "ASE's name of the format, if the file name does not show it (see `ase info --formats`)",
    ),
    "types": (
        _types,
        "1=O,2=H",
        "elements by type of atom, for files of LAMMPS and MLIP without elements",
    ),
}


def check_models(*checkpoints: str | Path | None) -> list[Path]:
    """Files of checkpoints, fetched if given by address or name.

    Raises:
        CheckpointError: one is not there.
    """
    from pet_finetune.hub import find_model
    from pet_finetune.log import get_logger, setup_logging

    if not get_logger().handlers:
        setup_logging()  # of what is fetched
    return [find_model(checkpoint) for checkpoint in checkpoints if checkpoint is not None]


def check_folders(*folders: str | Path | None) -> None:
    """Refuse folders of adapters that are not there.

    Raises:
        AdapterError: the first of them.
    """
    for folder in folders:
        if folder is not None and not Path(folder).is_dir():
            raise AdapterError(
                f"There is no adapter in '{folder}': there is no such folder, with an "
                "adapter_config.json in it."
            )


#: What folders of metatrain and of DeePMD-kit hold.
_FOLDERS = ("ns.npy", "na.npy", "set.*/coord.npy", "*/set.*/coord.npy")


def check_data(*files: str | Path) -> None:
    """Refuse files of structures that are not there.

    Raises:
        DataError: the first of them.
    """
    for path in map(Path, files):
        if not any(next(path.glob(mark), None) for mark in _FOLDERS):
            check_file(path, "data file")


def check_sets(datasets: Iterable[DatasetOptions]) -> None:
    """Refuse files of data sets that are not there.

    Raises:
        DataError: the first of them.
    """
    for dataset in datasets:
        targets = dataset.targets.values()
        check_data(dataset.systems.read_from, *(t.read_from for t in targets if t.read_from))


def add_named_runs(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Add ``--config`` and ``--run-name``, and ``--all`` where ``several`` runs can be meant."""
    group = parser.add_argument_group("named runs")
    group.add_argument(
        "--config", metavar="FILE", help="instead of OPTIONS: a JSON or YAML file of named runs"
    )
    group.add_argument("--run-name", metavar="NAME", help="the run of that file")
    if several:
        group.add_argument(
            "--all", action="store_true", help="all runs of that file, one after the other"
        )
        group.add_argument(
            "--show-options", action="store_true", help="only show the options file of the run"
        )


def are_named_runs(arguments: argparse.Namespace, first: str | None, clash: Sequence[str]) -> bool:
    """Whether named runs are meant.

    Args:
        arguments: of the command line.
        first: the options file that was given, if any.
        clash: options of the command line that named runs leave no room for, where given.

    Raises:
        ConfigError: arguments that do not go together.
    """
    every = getattr(arguments, "all", False)
    if arguments.config is None:
        shown = getattr(arguments, "show_options", False)
        asked = {"--run-name": arguments.run_name, "--all": every, "--show-options": shown}
        for name, given in asked.items():
            if given:
                raise ConfigError(f"{name} needs the file that names the runs: --config FILE.")
        return False
    if first is not None:
        raise ConfigError(
            f"--config {arguments.config} and {first} contradict each other: give one of them."
        )
    if clash:
        raise ConfigError(
            f"{clash[0]} does not go with --config: the file says where a run starts, and an "
            "interrupted run goes on by itself. Leave it out."
        )
    if every and arguments.run_name is not None:
        raise ConfigError("--run-name means one run and --all means all: give one of them.")
    return True


def read_runs(arguments: argparse.Namespace, root: str) -> list[NamedRun]:
    """The runs that are meant.

    Raises:
        ConfigError: as ``read_named_runs``, or none is named.
    """
    from pet_finetune.config.named_run_options import read_named_runs, run_names

    if arguments.run_name is None and not getattr(arguments, "all", False):
        names = ", ".join(run_names(arguments.config))
        raise ConfigError(
            f"--config {arguments.config}: which run? Give --run-name NAME"
            f"{', or --all' if hasattr(arguments, 'all') else ''}. Runs: {names}."
        )
    wanted = None if arguments.run_name is None else [arguments.run_name]
    return read_named_runs(arguments.config, wanted, arguments.override, root)
