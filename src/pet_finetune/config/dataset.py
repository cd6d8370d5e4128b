"""Options of the data: ``training_set``, ``validation_set`` and ``test_set``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pet_finetune.elements import atomic_number, symbol_of
from pet_finetune.errors import UnitError, did_you_mean
from pet_finetune.units import LENGTH_UNITS, length_to_angstrom

from .base import Expects, Fraction, Ignored, OneOf, OptionalText, Section, ignored_field
from .shorthands import expand_dataset
from .target import CartesianType, GradientOptions, Reader, TargetOptions, TargetType

__all__ = [
    "CartesianType",
    "DatasetOptions",
    "ExtraDataOptions",
    "GradientOptions",
    "IndexedSet",
    "SetOptions",
    "SystemsOptions",
    "TargetOptions",
    "TargetType",
]


def _length_unit(value: Any) -> str:
    if value is None or value == "":
        return "angstrom"
    if not isinstance(value, str):
        raise ValueError
    try:
        length_to_angstrom(value)
    except UnitError:
        guess = did_you_mean(value, LENGTH_UNITS).lstrip()
        allowed = f"Allowed (case does not matter): {', '.join(LENGTH_UNITS)}."
        raise ValueError(f"{guess} {allowed}".lstrip()) from None
    return value


def _indices(value: Any) -> tuple[int, ...] | str:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
        raise ValueError
    if len(set(value)) != len(value):
        repeated = sorted({i for i in value if list(value).count(i) > 1})
        raise ValueError(f"Given more than once: {repeated}.")
    return tuple(value)


def _one_file(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        raise ValueError(
            "Several files are several data sets: `training_set: [{systems: a.xyz, targets: ...}, "
            "{systems: b.xyz, targets: ...}]`."
        )
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


LengthUnit = Annotated[str, Expects("a unit of length", _length_unit)]
Indices = Annotated[
    tuple[int, ...] | str,
    Expects(
        "a list of distinct frame numbers (from 0) or the path of a text file with one a line",
        _indices,
    ),
]


def _types(value: Any) -> dict[int, str]:
    if not isinstance(value, Mapping):
        raise ValueError
    types = {}
    for number, name in value.items():
        if isinstance(number, bool) or not str(number).isdecimal() or not int(number):
            raise ValueError
        types[int(number)] = symbol_of(atomic_number(name))
    return types


Types = Annotated[
    dict[int, str],
    Expects("elements by number of the type, for instance {1: O, 2: H}", _types),
]


class SystemsOptions(Section):
    """Where the structures come from."""

    short_forms = ("string",)

    read_from: Annotated[str, Expects("the path of one file", _one_file, {"type": "string"})] = (
        Field(description="Path of a file that ASE reads; may hold many frames.")
    )
    reader: Reader = Field(
        default=None, description="The library that reads the file; only ASE is used."
    )
    length_unit: LengthUnit = Field(
        default="angstrom", description="Unit of positions and cells in the file."
    )
    format: OptionalText = Field(
        default="",
        description="ASE's name of the file's format (`ase info --formats` lists them), where the "
        "name of the file does not tell; empty means that it is guessed from name and content.",
    )
    types: Types = Field(
        default={},
        description="Elements by number of the type of atom, for LAMMPS files that do not say "
        "them: `{1: O, 2: H}`.",
    )
    unconverged: Annotated[Literal["drop", "error", "keep"], OneOf()] = Field(
        default="drop",
        description="Frames whose self-consistent field did not converge, as the output of the "
        "code says: `drop`: left out, and named in the log; `error`: the run stops; `keep`: "
        "trained on like all others.",
    )
    isolated_atoms: Annotated[Literal["leave_out", "train"], OneOf()] = Field(
        default="leave_out",
        description="Frames of a single atom without neighbours in a file of larger structures, "
        "such as those of `config_type=IsolatedAtom`: `leave_out`: they are in no set, and the log "
        "offers their energies for the `atomic_baseline` of a model from scratch; so are files of "
        "nothing else beside others; `train`: trained on like all others.",
    )


ExtraName = Annotated[Literal["charge", "spin_multiplicity"], OneOf()]


class ExtraDataOptions(Section):
    """Where the total charge or the spin multiplicity of the structures comes from."""

    short_forms = ("string",)

    read_from: OptionalText = Field(
        default="", description="Path of the file; empty means that of the structures."
    )
    key: OptionalText = Field(
        default="", description="Name in the file; empty means the option's name."
    )
    reader: Reader = Field(
        default=None, description="The library that reads the file; only ASE is used."
    )
    quantity: Ignored = ignored_field("charges and spins are plain integers.")
    unit: Ignored = ignored_field("charges and spins are plain integers.")
    sample_kind: Ignored = ignored_field("there is one value for each structure.")
    type: Ignored = ignored_field("charges and spins are scalars.")
    num_subtargets: Ignored = ignored_field("there is one value for each structure.")
    description: Ignored = ignored_field("it is not kept.")


class DatasetOptions(Section):
    """One data set: structures, what to learn from them, and which frames.

    In a file also just a path, which means structures with a target ``energy``.
    """

    short_forms = ("string",)

    systems: SystemsOptions = Field(description="The structures: a path, or the keys below.")
    targets: dict[str, TargetOptions] = Field(
        description="What to learn, by name: a path, or the keys below."
    )
    extra_data: dict[ExtraName, ExtraDataOptions] = Field(
        default={},
        description="`charge` and `spin_multiplicity` of the structures, for models conditioned "
        "on them: a path, or the keys below.",
    )
    indices: Indices | None = Field(default=None, description="Use only these frames of the file.")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return expand_dataset(value)


class IndexedSet(Section):
    """A validation or test set made of frames of the training file."""

    indices: Indices = Field(
        description="Frame numbers in the training file, from 0, or a file holding them."
    )


def _kind_of_set(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "#fraction"
    if isinstance(value, IndexedSet) or (isinstance(value, Mapping) and set(value) == {"indices"}):
        return "#indices"
    return "#datasets"


#: A fraction of the training data, frames of the training file, or data sets of their own.
SetOptions = Annotated[
    Annotated[Fraction, Tag("#fraction")]
    | Annotated[IndexedSet, Tag("#indices")]
    | Annotated[tuple[DatasetOptions, ...], Tag("#datasets")],
    Discriminator(_kind_of_set),
]
