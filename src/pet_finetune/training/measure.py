"""How errors of properties are counted and shown."""

from __future__ import annotations

from torch import Tensor

from pet_finetune.keys import TargetSpec

# Units that are shown a thousand times smaller.
_IN_MILLI = frozenset({"eV", "eV/A", "eV/A^3"})


def counted(spec: TargetSpec, errors: Tensor, atoms: Tensor, volumes: Tensor) -> Tensor:
    """Errors of a property as the loss counts them.

    Those of a structure are divided by its number of atoms, as metatrain does, unless the target
    is intensive. Those of a direct stress count as a virial per atom, as a derived stress does.

    Args:
        spec: the target.
        errors: [n_structures, ...] or [n_atoms, ...].
        atoms: [n_structures] numbers of atoms.
        volumes: [n_structures], A^3.
    """
    if spec.per_volume:
        return errors * _rows(volumes / atoms, errors)
    return shown(spec, errors, atoms)


def shown(spec: TargetSpec, errors: Tensor, atoms: Tensor) -> Tensor:
    """Errors of a property as tables show them, in :func:`shown_unit`; arguments as above."""
    return errors / _rows(atoms, errors) if _divided(spec) else errors


def shown_unit(spec: TargetSpec) -> tuple[float, str]:
    """Factor and unit in which errors of a property are shown."""
    factor, unit = (1000.0, f"m{spec.unit}") if spec.unit in _IN_MILLI else (1.0, spec.unit)
    return factor, f"{unit or '1'}/atom" if _divided(spec) else unit


def _divided(spec: TargetSpec) -> bool:
    return not (spec.per_atom or spec.per_volume or spec.intensive)


def _rows(factors: Tensor, values: Tensor) -> Tensor:
    """One factor a row, in the dtype of the values."""
    return factors.to(values).view(-1, *(1,) * (values.dim() - 1))
