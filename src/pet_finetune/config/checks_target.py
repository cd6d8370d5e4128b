"""Contradictions within one target."""

from __future__ import annotations

from collections.abc import Iterator

from pet_finetune.errors import UnitError
from pet_finetune.keys import direct_quantity
from pet_finetune.units import to_own_unit

from .options import Options
from .problems import Path, Problem
from .target import GRADIENT_QUANTITIES, TargetOptions

__all__ = ["check_committee", "check_fixed_baselines", "check_target"]


def check_target(path: Path, name: str, target: TargetOptions) -> Iterator[Problem]:
    """Yield everything about one target that cannot be meant.

    Args:
        path: where the target stands.
        name: what it is called, which says much of a direct force or stress.
        target: its options.
    """
    wrong_form = list(_check_direct(path, name, target))
    yield from wrong_form
    problem = None if wrong_form else target.unit_problem()
    if problem:
        yield Problem((*path, "unit"), problem)
    for label, quantity in GRADIENT_QUANTITIES.items():
        try:
            to_own_unit(quantity, getattr(target, label).unit)
        except UnitError as why:
            yield Problem((*path, label, "unit"), str(why))
    if target.stress.required and target.virial.required:
        yield Problem(
            (*path, "virial"),
            "stress and virial are the same quantity in two forms. Set one of them to off.",
        )
    wanted = [label for label in ("forces", "stress", "virial") if getattr(target, label).wanted]
    if wanted and target.quantity != "energy":
        yield Problem(
            (*path, wanted[0]),
            "only an energy has forces, stress or virial; this target's quantity is "
            f"{target.quantity or 'not given'}. Set `quantity: energy`, or remove it.",
        )
    elif wanted and not target.is_energy:
        yield Problem(
            (*path, wanted[0]),
            "forces, stress and virial need one energy for each structure. Set "
            f"`{wanted[0]}: off`, or `sample_kind: system`, `type: scalar`, `num_subtargets: 1`.",
        )


def _check_direct(path: Path, name: str, target: TargetOptions) -> Iterator[Problem]:
    """A direct force or stress has the form its name says."""
    quantity = direct_quantity(name)
    if quantity is None:
        return
    kind, rank = ("atom", 1) if quantity == "force" else ("system", 2)
    what = "a vector for each atom" if quantity == "force" else "a 3x3 tensor for each structure"
    expected = {
        "quantity": (target.quantity == quantity, quantity),
        "sample_kind": (target.sample_kind == kind, kind),
        "type": (target.rank == rank, f"{{cartesian: {{rank: {rank}}}}}"),
        "num_subtargets": (target.num_subtargets == 1, "1"),
    }
    for key, (right, wanted) in expected.items():
        if not right:
            yield Problem(
                (*path, key),
                f"a target named {name} is {what}: remove it, or set `{key}: {wanted}`. For "
                "another property choose another name.",
            )


def check_fixed_baselines(options: Options) -> Iterator[Problem]:
    """Yield the targets that are given a baseline and can have none."""
    specs = options.target_specs()
    for name in options.training.atomic_baseline:
        if name in specs and specs[name].rank > 0:
            yield Problem(
                ("architecture", "training", "atomic_baseline", name),
                f"the target is {specs[name].form}, and only scalars have a baseline per element: "
                "a vector or tensor that the element alone decides would not turn with the "
                "structure. Remove it.",
                also=(("training_set",),),
            )


def check_committee(options: Options) -> Iterator[Problem]:
    """Yield an ensemble of something else than an energy."""
    others = [name for name, spec in options.target_specs().items() if not spec.is_energy]
    if options.finetune.ensemble and others:
        yield Problem(
            ("architecture", "training", "finetune", "ensemble"),
            f"a committee predicts an energy, but {others[0]} is none. Remove one of them.",
            also=(("training_set",),),
        )
