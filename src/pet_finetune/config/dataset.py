"""Options of the data: ``training_set``, ``validation_set`` and ``test_set``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pet_finetune.config.base import (
    Expects,
    Fraction,
    Ignored,
    OneOf,
    OptionalText,
    PositiveInt,
    Section,
    Text,
    ignored_field,
)
from pet_finetune.config.shorthands import expand_dataset, expand_gradient
from pet_finetune.errors import UnitError, did_you_mean
from pet_finetune.keys import TargetSpec
from pet_finetune.units import LENGTH_UNITS, energy_to_ev, length_to_angstrom

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


def _reader(value: Any) -> str | None:
    if value is None:
        return None
    if value == "ase":
        return "ase"
    if value == "metatensor" or isinstance(value, dict):
        raise ValueError("Only files that ASE reads can be used; convert others to extended xyz.")
    raise ValueError


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


LengthUnit = Annotated[str, Expects("a unit of length", _length_unit)]
Reader = Annotated[str | None, Expects("'ase'", _reader)]
Indices = Annotated[
    tuple[int, ...] | str,
    Expects(
        "a list of distinct frame numbers (from 0) or the path of a text file with one a line",
        _indices,
    ),
]


class SystemsOptions(Section):
    """Where the structures come from."""

    read_from: Text = Field(description="Path of a file that ASE reads; may hold many frames.")
    reader: Reader = Field(
        default=None, description="The library that reads the file; only ASE is used."
    )
    length_unit: LengthUnit = Field(
        default="angstrom", description="Unit of positions and cells in the file."
    )


class GradientOptions(Section):
    """Where forces, stress or virial of an energy come from.

    In a file, ``on``, ``off``, a path, or these keys in braces. Values are in the units of the
    energy and length of the same data set.
    """

    mode: Annotated[Literal["on", "off", "auto"], OneOf()] = Field(
        default="on",
        description="`on`: must be in the file (frames without are masked), `off`: not used, "
        "`auto`: used if any frame has it.",
    )
    read_from: OptionalText = Field(default="", description="Path; empty means that of the target.")
    reader: Reader = Field(
        default=None, description="The library that reads the file; only ASE is used."
    )
    key: OptionalText = Field(
        default="", description="Name in the file; empty means the option's name."
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return expand_gradient(value)

    @property
    def wanted(self) -> bool:
        """Whether the label is to be looked for at all."""
        return self.mode != "off"

    @property
    def required(self) -> bool:
        """Whether it is an error when no frame has the label."""
        return self.mode == "on"


class CartesianType(Section):
    """Shape of a Cartesian target."""

    rank: PositiveInt = Field(description="1 for a vector, 2 for a 3x3 tensor.")


class TargetType(Section):
    """How a target turns with the structure, when it is no scalar."""

    cartesian: CartesianType = Field(description="A vector or tensor in x, y, z components.")


def _target_type(value: Any) -> str | TargetType:
    if value == "scalar":
        return "scalar"
    if isinstance(value, TargetType):
        return value
    if isinstance(value, Mapping) and set(value) == {"cartesian"}:
        cartesian = value["cartesian"]
        if isinstance(cartesian, Mapping) and cartesian in ({"rank": 1}, {"rank": 2}):
            return TargetType(cartesian=CartesianType(rank=cartesian["rank"]))
    if isinstance(value, Mapping) and "spherical" in value:
        raise ValueError("Spherical targets are not supported.")
    raise ValueError


def _sample_kind(value: Any) -> str:
    if value in ("system", "atom"):
        return str(value)
    if value == "atom_pair":
        raise ValueError("Targets for pairs of atoms are not supported.")
    raise ValueError


class TargetOptions(Section):
    """One property to learn from a data set."""

    quantity: OptionalText = Field(
        default="energy",
        description="The physical quantity; `energy` can have forces and stress. Left out, it is "
        "`energy` for targets named `energy` or `energy/...` and empty for others.",
    )
    read_from: OptionalText = Field(
        default="", description="Path of the file; empty means that of the structures."
    )
    reader: Reader = Field(
        default=None, description="The library that reads the file; only ASE is used."
    )
    key: OptionalText = Field(
        default="", description="Name in the file; empty means the target's name."
    )
    unit: OptionalText = Field(
        default="", description="Unit in the file. An energy without a unit is taken as eV."
    )
    sample_kind: Annotated[
        Literal["system", "atom"], Expects("'system' or 'atom'", _sample_kind)
    ] = Field(
        default="system", description="One value for each structure (`system`) or for each atom."
    )
    type: Annotated[
        Literal["scalar"] | TargetType,
        Expects("'scalar', {cartesian: {rank: 1}} or {cartesian: {rank: 2}}", _target_type),
    ] = Field(default="scalar", description="`scalar`, or `{cartesian: {rank: 1}}` for a vector.")
    num_subtargets: PositiveInt = Field(
        default=1, description="Number of values that make up the target."
    )
    description: OptionalText = Field(
        default="", description="Free text kept in the checkpoint, e.g. the level of theory."
    )
    forces: GradientOptions = Field(
        default=GradientOptions(mode="off"),
        description="Forces, the negative derivative of the energy by positions. "
        "`auto` for energies.",
    )
    stress: GradientOptions = Field(
        default=GradientOptions(mode="off"),
        description="Stress with ASE's sign: derivative of the energy by strain, over the volume. "
        "`auto` for energies.",
    )
    virial: GradientOptions = Field(
        default=GradientOptions(mode="off"),
        description="Virial, minus the stress times the volume; instead of `stress`.",
    )

    @property
    def is_energy(self) -> bool:
        """Whether forces and stress are derivatives of this target."""
        return self.quantity == "energy"

    @property
    def per_atom(self) -> bool:
        """Whether there is one value for each atom."""
        return self.sample_kind == "atom"

    def unit_problem(self) -> str | None:
        """What is wrong with the unit, or None. Only energies are converted and checked."""
        if not self.is_energy or not self.unit:
            return None
        try:
            energy_to_ev(self.unit)
        except UnitError as why:
            return str(why)
        return None

    def spec(self, name: str) -> TargetSpec:
        """Describe the target as the model keeps it: energies in eV, others as in the file."""
        kind: Literal["scalar", "vector", "tensor"] = "scalar"
        if isinstance(self.type, TargetType):
            kind = "vector" if self.type.cartesian.rank == 1 else "tensor"
        return TargetSpec(
            name=name,
            quantity=self.quantity,
            unit="eV" if self.is_energy else self.unit,
            kind=kind,
            per_atom=self.per_atom,
            num_outputs=self.num_subtargets,
            description=self.description,
        )


ExtraName = Annotated[Literal["charge", "spin_multiplicity"], OneOf()]


class ExtraDataOptions(Section):
    """Where the total charge or the spin multiplicity of the structures comes from."""

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
