"""What a model predicts: the description of a target and the names its labels go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TargetSpec", "forces_key", "stress_key"]


@dataclass(frozen=True)
class TargetSpec:
    """One property a model learns and predicts.

    Values are kept in the package's units (eV for an energy); ``unit`` says which.
    """

    #: The name used in options, checkpoints and parameter names, e.g. ``"energy"``.
    name: str
    #: The physical quantity; only ``"energy"`` has forces and a stress.
    quantity: str = "energy"
    #: The unit of the stored values.
    unit: str = "eV"
    #: How the values turn with the structure.
    kind: Literal["scalar", "vector", "tensor"] = "scalar"
    #: True when there is one value for each atom, False when one for each structure.
    per_atom: bool = False
    #: How many values make up the target.
    num_outputs: int = 1
    #: Free text, e.g. the level of theory.
    description: str = ""
    #: The key of the target's last layer in metatrain's naming; see :attr:`block_key`.
    block: str | None = None

    @property
    def is_energy(self) -> bool:
        """Whether forces and stress are derivatives of this target."""
        return self.quantity == "energy"

    @property
    def block_key(self) -> str:
        """The key of the last layer that predicts this target, as metatrain names it.

        metatrain joins the target's name with each (name, value) pair of its metatensor block
        label. A scalar has the one label ``_ = 0``, hence three underscores and a zero.
        """
        return self.block if self.block is not None else f"{self.name}___0"


def forces_key(target: str) -> str:
    """Name of the label holding the forces of energy ``target``, shape ``[n_atoms, 3]``, eV/Å."""
    return f"{target}/forces"


def stress_key(target: str) -> str:
    """Name of the label holding the stress of energy ``target``, shape ``[3, 3]``, eV/Å³."""
    return f"{target}/stress"
