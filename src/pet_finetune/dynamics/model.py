"""The model of a simulation: a checkpoint, with an adapter, or a committee of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pet_finetune.calculator import PETCalculator
from pet_finetune.committee.files import COMMITTEE_FILE
from pet_finetune.hub import find_model

__all__ = ["ModelChoice"]


@dataclass(frozen=True)
class ModelChoice:
    """Which model moves the atoms.

    Attributes:
        checkpoint: ours or metatrain's.
        adapters: none; one to put on top; several, or the folder of a run with
            ``finetune.ensemble``, for a committee.
        target: the energy, where the model has several.
        device: as in the options.
        dtype: ``float32`` or ``float64``; None for the model's own.
        orientations: as in the calculator.
    """

    checkpoint: str
    adapters: tuple[str, ...] = ()
    target: str | None = None
    device: str = "auto"
    dtype: str | None = None
    orientations: int = 1

    @property
    def is_committee(self) -> bool:
        """Whether it is a committee of adapters."""
        one = len(self.adapters) == 1 and (Path(self.adapters[0]) / COMMITTEE_FILE).exists()
        return one or len(self.adapters) > 1

    def open(self, spread_of_forces: bool = False) -> PETCalculator:
        """The calculator.

        Args:
            spread_of_forces: whether the forces of the members of a last layer are derived at every
                step, as those of a committee are anyhow.

        Raises:
            PetFinetuneError: checkpoint, adapters, target, device or precision are wrong.
        """
        which: dict[str, Any] = {}
        if self.is_committee:
            several = len(self.adapters) > 1
            which["adapters"] = list(self.adapters) if several else self.adapters[0]
        elif self.adapters:
            which["adapter"] = self.adapters[0]
        return PETCalculator(
            self.checkpoint,
            target=self.target,
            device=self.device,
            dtype=self.dtype,
            orientations=self.orientations,
            spread="always" if spread_of_forces else None,
            **which,
        )

    def absolute(self) -> ModelChoice:
        """The same, to be found from any folder."""
        return replace(
            self,
            checkpoint=str(find_model(self.checkpoint).resolve()),
            adapters=tuple(str(Path(folder).resolve()) for folder in self.adapters),
        )
