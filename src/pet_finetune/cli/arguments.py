"""Arguments that name files: looked at before torch is imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pet_finetune.errors import AdapterError
from pet_finetune.files import check_file

if TYPE_CHECKING:  # pydantic takes longer to import than --help may take
    from pet_finetune.config.dataset import DatasetOptions

#: How a model is given, for help texts.
MODEL = "a file of ours or metatrain's, an address (https://, hf://) or a name such as pet-mad-s"


#: What can be said of a model that moves atoms, beside its adapters.
OF_MODEL = ("target", "device", "dtype", "orientations", "compile")


def add_model_arguments(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, of_committee: str
) -> None:
    """Add ``--adapter`` and :data:`OF_MODEL`.

    Args:
        parser: of a command that moves atoms.
        of_committee: what becomes of the uncertainty of several adapters.
    """
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="DIR",
        help="adapter of this checkpoint; several, or the folder of a run with finetune.ensemble, "
        f"are a committee, {of_committee}",
    )  # fmt: skip
    parser.add_argument("--target", help="which energy, where the model has several")
    parser.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", help="float32 or float64 (default: the model's)")
    parser.add_argument(
        "--orientations", type=int, metavar="N",
        help="forces as a mean over 2, 4, 12 or 24 orientations, for N times the time (default: 1)",
    )  # fmt: skip
    add_compile(parser)


def add_compile(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--compile``."""
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"),
        help="predictions by a graph of torch's compiler: on makes it, once for a kind of model, "
        "in a minute or two; auto (default) uses one that is there, on a GPU",
    )  # fmt: skip


def model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say, as attributes of ``ModelChoice``."""
    given = {name: getattr(arguments, name) for name in OF_MODEL}
    given["adapters"] = tuple(arguments.adapter) or None
    return {name: value for name, value in given.items() if value is not None}


def add_reading_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--format`` and ``--types``."""
    parser.add_argument(
        "--format", metavar="NAME",
        help="ASE's name of the format, where file names do not tell (see `ase info --formats`)",
    )  # fmt: skip
    parser.add_argument(
        "--types", type=_types, metavar="1=O,2=H",
        help="elements by type of atom, for LAMMPS files that do not say them",
    )  # fmt: skip


def systems_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say, as options of ``systems``."""
    given = {"format": arguments.format, "types": arguments.types}
    return {name: value for name, value in given.items() if value is not None}


def _types(text: str) -> dict[int, str]:
    from pet_finetune.elements import atomic_number, symbol_of

    types = {}
    for part in text.replace(",", " ").split():
        number, equals, name = part.partition("=")
        try:
            types[int(number)] = symbol_of(atomic_number(name))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r}: {error}") from None
        if not equals or int(number) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form 1=O")
    return types


def check_models(*checkpoints: str | Path | None) -> list[Path]:
    """The files of checkpoints, which are fetched where they are given by address or name.

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


def check_data(*files: str | Path) -> None:
    """Refuse files of structures that are not there.

    Raises:
        DataError: the first of them.
    """
    for path in map(Path, files):
        if not (path / "ns.npy").exists() and not (path / "na.npy").exists():  # metatrain's folders
            check_file(path, "data file")


def check_sets(datasets: Iterable[DatasetOptions]) -> None:
    """Refuse files of data sets that are not there.

    Raises:
        DataError: the first of them.
    """
    for dataset in datasets:
        targets = dataset.targets.values()
        check_data(dataset.systems.read_from, *(t.read_from for t in targets if t.read_from))
