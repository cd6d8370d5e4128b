"""Arguments of commands that read files of structures without an options file."""

from __future__ import annotations

import argparse
from typing import Any

from pet_finetune.elements import atomic_number, symbol_of

__all__ = ["add_reading_arguments", "systems_of"]


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
