"""Targets of a model: their descriptions and the names of their labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

#: Names under which metatrain's models predict forces without a derivative, the newer one first.
DIRECT_FORCES = ("non_conservative_force", "non_conservative_forces")
#: The same for the stress.
DIRECT_STRESS = ("non_conservative_stress",)

#: Whether something is computed by a graph that torch's compiler made.
Compile = Literal["auto", "on", "off"]

_RANKS: Mapping[str, int] = {"scalar": 0, "vector": 1, "tensor": 2}


@dataclass(frozen=True)
class LabelKind:
    """Sample kind of a label and its behaviour under rotation."""

    #: True when there is one row for each atom, False when one for each structure.
    per_atom: bool = False
    #: Number of Cartesian axes behind the row: 0 stays as it is, 1 is a vector, 2 a tensor.
    rank: int = 0


@dataclass(frozen=True)
class TargetSpec:
    """A property that a model learns and predicts.

    Values are kept in the package's units (eV for an energy); ``unit`` says which.
    """

    #: The name used in options, checkpoints and parameter names, e.g. ``"energy"``.
    name: str
    #: The physical quantity, e.g. ``"energy"`` or ``"force"``; may be empty.
    quantity: str = "energy"
    #: The unit of the stored values.
    unit: str = "eV"
    #: How the values turn with the structure.
    kind: Literal["scalar", "vector", "tensor"] = "scalar"
    #: True when there is one value for each atom, False when one for each structure.
    per_atom: bool = False
    #: How many numbers make up one value, Cartesian components included: 3 for a vector.
    num_outputs: int = 1
    #: Free text, e.g. the level of theory.
    description: str = ""
    #: The key of the target's last layer in metatrain's naming; see :attr:`block_key`.
    block: str | None = None
    #: True when the atoms' sum is divided by the volume and made symmetric, as a stress is.
    per_volume: bool = False
    #: True when a value for a structure does not grow with the number of its atoms, so that its
    #: errors are not divided by that number.
    intensive: bool = False

    @property
    def is_energy(self) -> bool:
        """Whether this is the energy of a structure, whose derivatives are forces and stress."""
        scalar = self.kind == "scalar" and self.num_outputs == 1
        return self.quantity == "energy" and scalar and not self.per_atom

    @property
    def rank(self) -> int:
        """Number of Cartesian axes of a value."""
        return _RANKS[self.kind]

    @property
    def num_subtargets(self) -> int:
        """Number of scalars, vectors or tensors in one value."""
        return self.num_outputs // 3**self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value: Cartesian axes, then the subtargets where there are several."""
        several = (self.num_subtargets,) if self.num_subtargets > 1 else ()
        return (3,) * self.rank + several

    @property
    def label_kind(self) -> LabelKind:
        """Kind of a label of this target."""
        return LabelKind(self.per_atom, self.rank)

    @property
    def form(self) -> str:
        """The target in words, e.g. ``"a vector for each atom"``."""
        many = (
            f"{self.num_subtargets} {self.kind}s" if self.num_subtargets > 1 else f"a {self.kind}"
        )
        return f"{many} for each {'atom' if self.per_atom else 'structure'}"

    @property
    def block_key(self) -> str:
        """The key of the last layer that predicts this target, as metatrain names it.

        metatrain joins the target's name with each (name, value) pair of its metatensor block
        label. A scalar has the one label ``_ = 0``, hence three underscores and a zero; so have
        vectors and tensors in Cartesian components.
        """
        return self.block if self.block is not None else f"{self.name}___0"


def main_energy(energies: Collection[str]) -> str | None:
    """Default energy: the only one, else ``energy``, if any."""
    if len(energies) == 1:
        return next(iter(energies))
    return "energy" if "energy" in energies else None


def base_name(target: str) -> str:
    """A target's name without its variant: ``energy`` of ``energy/pbe``."""
    return target.split("/", 1)[0]


def direct_quantity(target: str) -> Literal["force", "pressure"] | None:
    """Quantity of a target with the name of a direct force or stress."""
    base = base_name(target)
    if base in DIRECT_FORCES:
        return "force"
    return "pressure" if base in DIRECT_STRESS else None


def output_name(spec: TargetSpec) -> str:
    """Metatomic's name of a target: a standard one, or one in metatrain's domain ``mtt``.

    Energies and direct forces and stresses have standard names, with their variants
    (https://docs.metatensor.org/metatomic/latest/quantities/). No engine knows what others are.
    """
    base, slash, variant = spec.name.partition("/")
    if base in DIRECT_FORCES and spec.per_atom and spec.shape == (3,):
        return DIRECT_FORCES[0] + slash + variant
    direct_stress = base in DIRECT_STRESS and spec.per_volume and spec.shape == (3, 3)
    if direct_stress or (base == "energy" and spec.is_energy) or "::" in spec.name:
        return spec.name
    return f"mtt::{spec.name}"


def forces_key(target: str) -> str:
    """Name of the label holding the forces of energy ``target``, shape ``[n_atoms, 3]``, eV/Å."""
    return f"{target}/forces"


def stress_key(target: str) -> str:
    """Name of the label holding the stress of energy ``target``, shape ``[3, 3]``, eV/Å³."""
    return f"{target}/stress"


def weights_key(label: str) -> str:
    """Name of the weights of a label in the loss: one for each of its rows."""
    return f"{label}/weights"


def uncertainty_key(target: str) -> str:
    """Name under which predictions hold the uncertainty of energy ``target``, eV."""
    return f"{target}_uncertainty"


def label_kind(label: str, kinds: Mapping[str, LabelKind]) -> LabelKind:
    """Kind of a label: from ``kinds``, else by its name, else one number per structure."""
    if label in kinds:
        return kinds[label]
    if label.endswith(weights_key("")):
        return LabelKind(label_kind(label.removesuffix(weights_key("")), kinds).per_atom)
    if label.endswith(forces_key("")):
        return LabelKind(per_atom=True, rank=1)
    return LabelKind(rank=2) if label.endswith(stress_key("")) else LabelKind()
