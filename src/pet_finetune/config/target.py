"""Targets, what is learned of a set, and their losses; short ways of writing them spelled out.

The functions that spell out take what the YAML file holds and never raise: what they do not
understand is returned as it stands, so that validation reports it at its own place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pet_finetune.errors import UnitError
from pet_finetune.keys import TargetSpec, direct_quantity
from pet_finetune.units import own_unit, to_own_unit

from .base import (
    Expects,
    NonNegativeFloat,
    OneOf,
    OptionalText,
    PositiveFloat,
    PositiveInt,
    Section,
    only,
)

_SWITCHES = {
    True: "on",
    False: "off",
    None: "off",
    "on": "on",
    "off": "off",
    "yes": "on",
    "no": "off",
    "true": "on",
    "false": "off",
    "auto": "auto",
}


def expand_gradient(value: Any) -> Any:
    """``on``, ``off``, ``auto`` or a path as the keys of a gradient section.

    A ``reader`` of null means that metatrain wrote the section (``options_restart.yaml``), also
    where the user had not asked for the label.
    """
    if value is None or isinstance(value, bool):
        return {"mode": _SWITCHES[value]}
    if isinstance(value, str):
        switch = _SWITCHES.get(value.casefold())
        return {"mode": switch} if switch else {"read_from": value}
    if isinstance(value, Mapping) and "mode" not in value and value.get("reader", "") is None:
        return {**value, "mode": "auto"}
    return value


def expand_switch(value: Any) -> Any:
    """``on``, ``off`` or a path as the keys of a section that has a ``mode`` and a file."""
    return expand_gradient(value) if isinstance(value, (bool, str)) else value


def _reader(value: Any) -> str | None:
    if value is None:
        return None
    if value == "ase":
        return "ase"
    if value == "metatensor" or isinstance(value, dict):
        raise ValueError(
            "Leave it out: files that ASE reads, and the zips and memory-mapped folders of "
            "metatrain, are told apart by what they are. Convert others (.mts) to extended xyz."
        )
    raise ValueError


#: What the units of the derivatives of an energy are units of.
GRADIENT_QUANTITIES = {"forces": "force", "stress": "pressure", "virial": "energy"}

Reader = Annotated[
    str | None,
    Expects("'ase'", _reader),
    Field(description="The library that reads the file; only ASE is used."),
]


class GradientOptions(Section):
    """Source of forces, stress or virial of an energy.

    In a file, ``on``, ``off``, a path, or these keys in braces. Without a unit, values are in the
    units of the energy and length of the same data set.
    """

    short_forms = ("string", "boolean")

    mode: Annotated[Literal["on", "off", "auto"], OneOf()] = "on"
    """`on`: must be in the file (frames without are masked), `off`: not used, `auto`: used if any
    frame has it."""
    read_from: OptionalText = ""
    """Path; empty means that of the target."""
    reader: Reader = None
    key: OptionalText = ""
    """Name in the file; empty means the option's name."""
    unit: OptionalText = ""
    """Unit in the file, such as `Hartree/Bohr` or `GPa`. Empty: energy / length for forces, energy
    / length^3 for a stress, energy for a virial."""
    weight_key: OptionalText = ""
    """Name in the file of additional weights in the loss: one for each structure, for forces also
    one for each atom. Empty: equal weights."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return expand_gradient(value)

    @property
    def wanted(self) -> bool:
        """Whether the label is read at all."""
        return self.mode != "off"

    @property
    def required(self) -> bool:
        """Whether it is an error when no frame has the label."""
        return self.mode == "on"


class CartesianType(Section):
    """Shape of a Cartesian target."""

    rank: PositiveInt
    """1 for a vector, 2 for a 3x3 tensor."""


class TargetType(Section):
    """Rotation behaviour of a target that is not a scalar."""

    cartesian: CartesianType
    """A vector or tensor in x, y, z components."""


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
        raise ValueError(
            "Spherical targets are not supported: give Cartesian components (a scalar, or "
            "cartesian of rank 1 or 2)."
        )
    raise ValueError


def _sample_kind(value: Any) -> str:
    if value in ("system", "atom"):
        return str(value)
    if value == "atom_pair":
        raise ValueError("Targets for pairs of atoms are not supported.")
    raise ValueError


class TargetOptions(Section):
    """A property to learn from a data set."""

    short_forms = ("string",)

    quantity: OptionalText = "energy"
    """The physical quantity; `energy` can have forces and stress. Default: `force` or `pressure`
    for targets named `non_conservative_...`, and as in metatrain `energy` for all others with one
    number for each structure (unless `unit` is not one of energy). Use any name, such as `gap` or
    `dipole`, for other properties."""
    read_from: OptionalText = ""
    """Path of the file; empty means that of the structures."""
    reader: Reader = None
    key: OptionalText = ""
    """Name in the file; empty means the target's name."""
    unit: OptionalText = ""
    """Unit in the file. An `energy`, `length`, `force` or `pressure` is converted to eV, A, eV/A or
    eV/A^3, which is also the default; other quantities are not converted."""
    sample_kind: Annotated[
        Literal["system", "atom"], Expects("'system' or 'atom'", _sample_kind)
    ] = "system"
    """One value for each structure (`system`) or for each atom."""
    type: Annotated[
        Literal["scalar"] | TargetType,
        Expects("'scalar', {cartesian: {rank: 1}} or {cartesian: {rank: 2}}", _target_type),
    ] = "scalar"
    """`scalar`, or `{cartesian: {rank: 1}}` for a vector (rank 2: a 3x3 tensor)."""
    num_subtargets: PositiveInt = 1
    """Number of scalars, vectors or tensors in a value."""
    weight_key: OptionalText = ""
    """Name in the file of the structures' weights in the loss, such as `config_weight`; also for
    forces and stress. A structure without one counts 1. Empty: equal weights."""
    description: OptionalText = ""
    """Free text kept in the checkpoint, e.g. the level of theory."""
    forces: GradientOptions = GradientOptions(mode="off")
    """Forces, the negative derivative of the energy by positions. `auto` for energies."""
    stress: GradientOptions = GradientOptions(mode="off")
    """Stress with ASE's sign: derivative of the energy by strain, over the volume. `auto` for
    energies."""
    virial: GradientOptions = GradientOptions(mode="off")
    """Virial, minus the stress times the volume; instead of `stress`."""

    @property
    def is_energy(self) -> bool:
        """Whether this is the energy of a structure, whose derivatives are forces and stress."""
        scalar = self.type == "scalar" and self.num_subtargets == 1
        return self.quantity == "energy" and scalar and not self.per_atom

    @property
    def per_atom(self) -> bool:
        """Whether there is one value for each atom."""
        return self.sample_kind == "atom"

    @property
    def rank(self) -> int:
        """Number of Cartesian axes of a value: 0 for a scalar."""
        return self.type.cartesian.rank if isinstance(self.type, TargetType) else 0

    @property
    def factor(self) -> float:
        """Factor from the file's unit to the package's.

        Raises:
            UnitError: see :meth:`unit_problem`.
        """
        return to_own_unit(self.quantity, self.unit)

    def gradient_factor(self, kind: Literal["forces", "stress", "virial"], length: float) -> float:
        """Factor from the file's unit to eV/Å (stress: eV/Å³, virial: eV).

        Args:
            kind: which derivative.
            length: Å in one unit of length of the file.

        Raises:
            UnitError: a unit of another quantity.
        """
        unit = getattr(self, kind).unit
        if unit:
            return to_own_unit(GRADIENT_QUANTITIES[kind], unit)
        return self.factor / length ** {"forces": 1, "stress": 3, "virial": 0}[kind]

    def unit_problem(self) -> str | None:
        """Problem of the unit, or None; only units of converted quantities are checked."""
        try:
            to_own_unit(self.quantity, self.unit)
        except UnitError as why:
            return str(why)
        return None

    def spec(self, name: str) -> TargetSpec:
        """Describe the target as the model keeps it.

        Energies, forces, pressures and lengths are in the package's own units, others as in the
        file.
        """
        kinds: tuple[Literal["scalar", "vector", "tensor"], ...] = ("scalar", "vector", "tensor")
        return TargetSpec(
            name=name,
            quantity=self.quantity,
            unit=own_unit(self.quantity, self.unit),
            kind=kinds[self.rank],
            per_atom=self.per_atom,
            num_outputs=self.num_subtargets * 3**self.rank,
            description=self.description,
            per_volume=direct_quantity(name) == "pressure",
        )


LossType = Literal["mse", "mae", "huber"]


class LossTerm(Section):
    """The loss of one quantity. In a file also just its type."""

    short_forms, short_for = ("string",), "type"

    type: Annotated[LossType, OneOf()] = "mse"
    """Mean squared error, mean absolute error, or Huber's mixture of both."""
    weight: NonNegativeFloat = 1.0
    """Factor in the total loss."""
    delta: PositiveFloat = 1.0
    """Huber: the error at which squared becomes absolute, in units of the scaled target."""
    reduction: Annotated[
        Literal["mean"],
        Expects("'mean'", only("mean", "The loss is always a mean; change `weight` to scale it.")),
    ] = "mean"
    """How the values of a batch are combined; only `mean`."""


class GradientLosses(Section):
    """Losses of the derivatives of an energy, by metatrain's names."""

    positions: LossTerm | None = None
    """Loss of the forces."""
    strain: LossTerm | None = None
    """Loss of the stress."""


class TargetLoss(LossTerm):
    """The loss of one target and of its forces and stress."""

    forces: LossTerm | None = None
    """Loss of the forces: a type, or these keys."""
    stress: LossTerm | None = None
    """Loss of the stress: a type, or these keys."""
    virial: LossTerm | None = None
    """Another name of `stress`."""
    gradients: GradientLosses = GradientLosses()
    """Another place for the losses of forces and stress."""

    def forces_term(self) -> LossTerm:
        """Loss of the forces, wherever it was given; mean squared error otherwise."""
        return self.forces or self.gradients.positions or LossTerm()

    def stress_term(self) -> LossTerm:
        """Loss of the stress, wherever it was given; mean squared error otherwise."""
        return self.stress or self.virial or self.gradients.strain or LossTerm()

    @property
    def has_gradients(self) -> bool:
        """Whether a loss of forces or stress is given."""
        given = (self.forces, self.stress, self.virial, self.gradients.positions)
        return any(term is not None for term in (*given, self.gradients.strain))

    def repeated(self) -> list[tuple[str, ...]]:
        """Groups of keys that set the same loss, where more than one of them is given."""
        groups = {
            "forces": (("forces", self.forces), ("gradients.positions", self.gradients.positions)),
            "stress": (
                ("stress", self.stress),
                ("virial", self.virial),
                ("gradients.strain", self.gradients.strain),
            ),
        }
        given = [tuple(key for key, term in group if term) for group in groups.values()]
        return [keys for keys in given if len(keys) > 1]


def _kind_of_loss(value: Any) -> str:
    return "#each" if isinstance(value, Mapping) else "#all"


#: One type for everything, or a loss for each target.
LossOptions = Annotated[
    Annotated[Annotated[LossType, OneOf()], Tag("#all")]
    | Annotated[dict[str, TargetLoss], Tag("#each")],
    Discriminator(_kind_of_loss),
]
