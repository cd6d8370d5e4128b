"""Which outputs an exported model has, and what metatomic calls them."""

from __future__ import annotations

from collections.abc import Collection

from pet_finetune.keys import DIRECT_FORCES, DIRECT_STRESS, TargetSpec, base_name
from pet_finetune.model import Potential

__all__ = ["choose_outputs", "output_name"]


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


def choose_outputs(
    potential: Potential, energy: str | None, only: Collection[str] | None = None
) -> dict[str, str]:
    """The outputs of a model, each with the target that it is.

    Engines ask for ``energy`` unless they are told of a variant. That name goes to the energy
    chosen, whatever the target is called, and those of its direct forces and stress go with it.

    Args:
        potential: the model.
        energy: the target that is to be ``energy``; None for none beside the one of that name.
        only: targets to take; None for all.
    """
    taken = [spec for spec in potential.targets.values() if only is None or spec.name in only]
    outputs = {output_name(spec): spec.name for spec in taken}
    if energy is None:
        return outputs
    chosen = output_name(potential.target(energy))
    variant = chosen.removeprefix(base_name(chosen))
    partners = (DIRECT_FORCES[0], *DIRECT_STRESS)
    plain = {base: outputs[base + variant] for base in partners if base + variant in outputs}
    if energy == outputs.get("energy"):
        return outputs
    return {**outputs, **plain, "energy": energy}
