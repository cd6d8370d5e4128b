"""Whether a model that is told charge and spin knows those of a set of structures."""

from __future__ import annotations

from collections.abc import Sequence

from pet_finetune.errors import DataError

from .structure import Structure

__all__ = ["check_charges"]


def check_charges(structures: Sequence[Structure], max_charge: int, max_spin: int) -> None:
    """Refuse structures whose total charge or multiplicity the model has no embedding for.

    Args:
        structures: what is to be predicted or trained on.
        max_charge: largest absolute charge the model knows.
        max_spin: largest multiplicity 2S+1 the model knows.

    Raises:
        DataError: names the first such structure and how many there are.
    """
    for name, values, low, high in (
        ("total charge", [s.charge for s in structures], -max_charge, max_charge),
        ("spin multiplicity (2S+1)", [s.spin for s in structures], 1, max_spin),
    ):
        wrong = [index for index, value in enumerate(values) if not low <= value <= high]
        if wrong:
            raise DataError(
                f"{structures[wrong[0]].where}: the {name} is {values[wrong[0]]}, and the model "
                f"knows those from {low} to {high} ({len(wrong)} of {len(structures)} structures "
                "are outside). Remove these structures; a model trained from scratch takes its "
                "limits from max_charge and max_spin_multiplicity in architecture.model."
            )
