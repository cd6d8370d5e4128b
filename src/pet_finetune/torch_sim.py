"""A model of torch-sim: many structures relaxed or simulated at once (extra ``torch-sim``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from pet_finetune.calculator import PETCalculator
from pet_finetune.committee.committee_files import Adapters
from pet_finetune.data.calculator_input import MovingAtoms
from pet_finetune.device import plain_torch
from pet_finetune.errors import PetFinetuneError
from pet_finetune.installation import missing_extra
from pet_finetune.keys import Compile
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential

_lacking = missing_extra("torch_sim", "torch-sim")
if _lacking is not None:
    raise PetFinetuneError(f"PETTorchSimModel {_lacking}")

from torch_sim import SimState  # noqa: E402
from torch_sim.models.interface import ModelInterface  # noqa: E402

_logger = get_logger(__name__)


class PETTorchSimModel(ModelInterface):
    """Energies, forces and stresses of a PET potential for torch-sim's batches of structures.

    All structures of a state go through the network together. Neighbour lists are made on the CPU
    with a margin, and used again until a pair of a structure may be missing.

    Args:
        model: a checkpoint, or a potential, as :class:`~pet_finetune.PETCalculator` takes it.
        adapter: an adapter folder to put on top of it.
        adapters: several, for a committee, whose mean is computed.
        target: the energy to use.
        device: ``auto``, ``cpu``, ``cuda``...
        dtype: as of torch-sim's states: ``float32``, ``float64``, or None for the model's own.
        compute_stress: whether stresses are computed, of structures that are periodic.
        skin: margin of the neighbour lists in Å; it changes speed, never results.
        compile: as for the calculator.

    Raises:
        PetFinetuneError: as the calculator; or torch-sim is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Potential,
        *,
        adapter: str | os.PathLike[str] | None = None,
        adapters: Adapters | None = None,
        target: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        compute_stress: bool = True,
        skin: float = 0.5,
        compile: Compile = "auto",
    ) -> None:
        super().__init__()
        self._calculator = PETCalculator(
            model, adapter=adapter, adapters=adapters, target=target, device=device, dtype=dtype,
            skin=skin, compile=compile,
        )  # fmt: skip
        self._device, self._dtype = self._calculator.device, self._calculator.dtype
        self._compute_stress, self._compute_forces = compute_stress, True
        self._moving: list[MovingAtoms] = []
        self._told = False
        if self._calculator.model.hypers.system_conditioning:
            _logger.warning(
                "The model reads charge and spin, which torch-sim does not hand on: all structures "
                "are computed as neutral singlets."
            )

    @plain_torch()
    def forward(self, state: Any, **unused: object) -> dict[str, Tensor]:
        """Compute the structures of a state.

        Args:
            state: torch-sim's, or a dictionary of its tensors: ``positions`` ``[n, 3]`` in Å,
                ``cell`` ``[b, 3, 3]``, ``atomic_numbers`` and ``system_idx`` ``[n]``, ``pbc``.
            unused: torch-sim's callers may pass more.

        Returns:
            ``energy`` ``[b]`` in eV, ``forces`` ``[n, 3]`` in eV/Å and, where asked for and
            periodic, ``stress`` ``[b, 3, 3]`` in eV/Å³ with ASE's sign.

        Raises:
            SpeciesError: elements that the model does not know.
            DataError: coordinates or a cell that cannot be.
        """
        if isinstance(state, Mapping):
            state = SimState(masses=torch.ones(len(state["positions"])), **state)
        frames = _frames(state)
        if not self._told and any(atoms.cell.rank == 3 and not atoms.pbc.any() for atoms in frames):
            self._told = True
            _logger.warning(
                "torch-sim says that structures with a cell are not periodic, as it does for slabs "
                "(pbc = [True, True, False]). Give slabs pbc = True and a vacuum."
            )
        while len(self._moving) < len(frames):
            self._moving.append(self._calculator.fresh_neighbors())
        prediction = self._calculator.predict_together(
            frames, self._moving[: len(frames)], stress=self._compute_stress
        )
        assert prediction.forces is not None
        results = {"energy": prediction.energy, "forces": prediction.forces}
        if prediction.stress is not None:
            results["stress"] = prediction.stress
        return {name: value.detach().to(self._dtype) for name, value in results.items()}


def _frames(state: Any) -> list[Atoms]:
    """The structures of a state, in its order."""
    counts = torch.bincount(state.system_idx, minlength=len(state.cell)).tolist()
    positions = state.positions.detach().to("cpu", torch.float64).split(counts)
    numbers = state.atomic_numbers.cpu().split(counts)
    # torch-sim keeps cell vectors as columns.
    cells = state.cell.detach().to("cpu", torch.float64).transpose(1, 2)
    pbc = torch.as_tensor(state.pbc).cpu().numpy()  # one of all, or one an axis in newer releases
    return [
        Atoms(z.numpy(), r.numpy(), cell=cell.numpy(), pbc=pbc)
        for z, r, cell in zip(numbers, positions, cells, strict=True)
    ]
