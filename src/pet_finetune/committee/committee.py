"""Committees: several adapters of one base, evaluated in one pass.

The structures are given to the network once for each member, all together. What members share is
held once, and multiplied once with the rows of all of them; a linear layer that differs between
members holds one weight for each, its adapter merged, and multiplies each member's rows with its
own. That costs the products of the members evaluated one by one and no more, while all else
(neighbour lists, launches of operations, reading of weights) is done once. The GNN layers before
the first one in which members differ see the structures once, see
:mod:`pet_finetune.model.shared_layers`.

Low-rank updates beside one product with the base's weight would take less memory and more
arithmetic: r (in + out) for each row beside in * out, an eighth more at rank 8 and width 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor, nn

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.errors import AdapterError
from pet_finetune.graph import Batch, repeat_batch
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, autograd_possible, forces_of, stress_of
from pet_finetune.model.shared_layers import SharedLayers, Tokens
from pet_finetune.nn.primitives import MemberRows

from .members import differing_layers, gather, join, restore

# Edges of all members that are evaluated together. On a CPU more of them leave its caches, which
# costs what one pass gains; on a GPU only memory sets a limit.
_MOST_EDGES = {"cpu": 8192, "cuda": 1_000_000}
# Edges of all members from which on shared layers are computed once. For fewer, going back through
# them for one member after the other takes longer than what it saves. On a GPU, where that is a
# matter of launches, the number is a guess.
_FEWEST_EDGES = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True)
class Calibration:
    """Factors that turn the spread of the members into an uncertainty."""

    energy: float = 1.0
    forces: float = 1.0
    stress: float = 1.0


@dataclass(frozen=True)
class CommitteePrediction(Prediction):
    """Mean of a committee, and the predictions of its members.

    Attributes:
        members: the same quantities with an axis of the members in front; forces and stress are
            None where only their mean was asked for.
        calibration: of the spread.
    """

    members: Prediction = field(kw_only=True)
    calibration: Calibration = field(kw_only=True)

    def knows(self, kind: str) -> bool:
        """Whether there is an uncertainty of ``energy``, ``forces`` or ``stress``."""
        return getattr(self.members, kind) is not None

    def spread(self, kind: str) -> Tensor:
        """Standard deviation of each number over the members, a sample (n - 1)."""
        values: Tensor = getattr(self.members, kind)
        return values.std(0)

    def uncertainty(self, kind: str) -> Tensor:
        """The spread of ``energy``, ``forces`` or ``stress``, calibrated: the error to expect."""
        factor: float = getattr(self.calibration, kind)
        return factor * self.spread(kind)


class Committee(nn.Module):
    """Several potentials that differ in some of their weights and predict the same energy.

    Where the differences lie in linear layers, as those of every adapter do unless it trains
    embeddings or norms as well, all members are evaluated in one pass, or in a few where structures
    are large; else one after the other, with the same results.

    Args:
        models: plain potentials on one device, in one floating type, that share architecture and
            species; they are given up to the committee.
        target: the energy to predict.
        calibration: of the spread.

    Raises:
        AdapterError: fewer than two members, or members of different make.
    """

    def __init__(
        self, models: Iterable[Potential], target: str, calibration: Calibration | None = None
    ) -> None:
        super().__init__()
        first, members = gather(models, target)
        self.target = first.energy_target(target)
        self.size = len(members)
        self.calibration = calibration or Calibration()
        self._rows = MemberRows()
        paths = differing_layers(first, members)
        self.one_pass = paths is not None
        if paths is None:
            others = (restore(first, member, target) for member in members[1:])
            self.parts = nn.ModuleList([first, *others])
        else:
            join(first, members, paths, self._rows)
            self.parts = nn.ModuleList([first])
        self.eval().requires_grad_(False)

    @property
    def _first(self) -> Potential:
        first = self.parts[0]
        assert isinstance(first, Potential)
        return first

    @property
    def hypers(self) -> ModelOptions:
        """The architecture's hyperparameters."""
        return self._first.hypers

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that the members know."""
        return self._first.species

    @property
    def cutoff(self) -> float:
        """Longest edge the members need, Angstrom."""
        return self._first.cutoff

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the networks."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self._first.device

    def energy_target(self, wanted: str | None = None) -> str:
        """The energy that the members are for, which is the only one that can be wanted."""
        if wanted not in (None, self.target):
            raise AdapterError(
                f"target: the adapters of this committee are for '{self.target}', not '{wanted}'."
            )
        return self.target

    def predict(
        self,
        batch: Batch,
        target: str,
        *,
        forces: bool = True,
        stress: bool = False,
        spread: bool = True,
    ) -> CommitteePrediction:
        """Means and members' values of energies and, on request, forces and stresses.

        Args:
            batch: as for :meth:`Potential.predict`.
            target: the committee's.
            forces: whether forces are derived.
            stress: whether the stress is derived.
            spread: False where the mean of the derivatives is enough. Those of the members are
                then left out if they cost extra, which they do behind layers that all share.
        """
        self.energy_target(target)
        with autograd_possible(self, batch) as recordable:
            return self._predict(recordable, target, forces, stress, spread)

    def _predict(
        self, batch: Batch, target: str, forces: bool, stress: bool, spread: bool
    ) -> CommitteePrediction:
        shared = None
        if self.one_pass:
            # So many that the features of all edges together stay within bounds.
            most = _limit(_MOST_EDGES, batch) // max(1, batch.num_edges)
            at_once = max(1, min(self.size, most))
            with self._shared(batch, together=not spread) as layers:
                parts = [
                    self._predict_joined(batch, slice(start, start + at_once), forces, stress)
                    for start in range(0, self.size, at_once)
                ]
                shared = None if layers is None else layers.gradient()
            members = _map(lambda *values: torch.cat(values), *parts)
        else:
            models = [part for part in self.parts if isinstance(part, Potential)]
            each = [m.predict(batch, target, forces=forces, stress=stress) for m in models]
            members = _map(lambda *values: torch.stack(values), *each)
        mean = _map(lambda values: values.mean(0), members)
        if shared is not None:  # the rest of the energy's gradient on the edge vectors
            rest, forces_now, stress_now = [shared / self.size], mean.forces, mean.stress
            mean = replace(
                mean,
                forces=None if forces_now is None else forces_now + forces_of(batch, rest),
                stress=None if stress_now is None else stress_now + stress_of(batch, rest),
            )
            members = replace(members, forces=None, stress=None)
        return CommitteePrediction(**vars(mean), members=members, calibration=self.calibration)

    @contextmanager
    def _shared(self, batch: Batch, together: bool) -> Iterator[SharedLayers | None]:
        """Context in which layers shared by the members are computed once."""
        network = self._first.network
        layers = network.shared_layers
        enough = together or batch.num_edges * self.size >= _limit(_FEWEST_EDGES, batch)
        if layers is None or not enough:
            yield None
            return

        def run(batch: Batch, memory: int) -> Tokens:
            neighborhood = network.neighborhood(batch)
            return network.advance(batch, neighborhood, stop=layers.count, memory=memory)

        with layers.sharing(batch, run, together):
            yield layers

    def _predict_joined(
        self, batch: Batch, members: slice, forces: bool, stress: bool
    ) -> Prediction:
        """Some of the members in one pass, with an axis of theirs in front."""
        count = len(range(self.size)[members])
        self._rows.atoms, self._rows.members = batch.num_atoms, members
        joint = repeat_batch(batch, count)
        found = self._first.predict(joint, self.target, forces=forces, stress=stress)
        return _map(lambda values: values.unflatten(0, (count, -1)), found)

    def predict_many(
        self, batch: Batch, wanted: Mapping[str, tuple[bool, bool]]
    ) -> dict[str, CommitteePrediction]:
        """:meth:`Potential.predict_many` for the committee's energy."""
        return {
            name: self.predict(batch, name, forces=forces, stress=stress)
            for name, (forces, stress) in wanted.items()
        }


def _limit(limits: Mapping[str, int], batch: Batch) -> int:
    """The one of the device that the batch is on."""
    return limits.get(batch.edge_vectors.device.type, limits["cuda"])


def _map(function: Callable[..., Tensor], *predictions: Prediction) -> Prediction:
    """Apply a function to each quantity."""
    values: dict[str, Any] = {}
    for name in vars(predictions[0]):
        parts = [getattr(prediction, name) for prediction in predictions]
        values[name] = None if parts[0] is None else function(*(p.detach() for p in parts))
    return Prediction(**values)


#: What a committee computes beside the properties of ASE.
COMMITTEE_PROPERTIES = (
    *("energy_uncertainty", "forces_uncertainty", "stress_uncertainty"),
    *("energy_ensemble", "forces_ensemble", "stress_ensemble"),
)
#: Those that take the derivatives of each member.
OF_MEMBERS = frozenset(COMMITTEE_PROPERTIES) - {"energy_uncertainty", "energy_ensemble"}


def results_of(
    prediction: Prediction, number: Tensor | None = None
) -> tuple[dict[str, Any], float]:
    """ASE's results of one structure, and a number, for which a GPU is waited for once.

    Those of :data:`COMMITTEE_PROPERTIES` that there are, are among them.
    """
    assert prediction.forces is not None
    parts = [prediction.energy, prediction.atom_energies, prediction.forces]
    parts += [part for part in (prediction.stress, number) if part is not None]
    count = len(prediction.forces)
    numbers = to_numpy(torch.cat([part.detach().to(torch.float64).flatten() for part in parts]))
    energy = float(numbers[0])
    results: dict[str, Any] = {
        "energy": energy,
        "free_energy": energy,
        "energies": numbers[1 : 1 + count],
        "forces": numbers[1 + count : 1 + 4 * count].reshape(count, 3),
    }
    if prediction.stress is not None:
        stress = numbers[1 + 4 * count : 10 + 4 * count].reshape(3, 3)
        results["stress"] = full_3x3_to_voigt_6_stress(stress)
    if isinstance(prediction, CommitteePrediction):
        results |= _of_members(prediction)
    return results, float(numbers[-1])


def _of_members(prediction: CommitteePrediction) -> dict[str, Any]:
    """Values of :data:`COMMITTEE_PROPERTIES`."""
    members = prediction.members
    results: dict[str, Any] = {"energy_uncertainty": float(prediction.uncertainty("energy")[0])}
    if len(members.energy):  # a last layer has an uncertainty without members, too
        results["energy_ensemble"] = to_numpy(members.energy[:, 0])
    if members.forces is not None:
        # Of an atom, the root mean square over the components: the error to expect of each.
        forces = prediction.uncertainty("forces").square().mean(-1).sqrt()
        results["forces_uncertainty"] = to_numpy(forces)
        results["forces_ensemble"] = to_numpy(members.forces)
    if members.stress is not None:
        uncertainty = to_numpy(prediction.uncertainty("stress")[0])
        results["stress_uncertainty"] = full_3x3_to_voigt_6_stress(uncertainty)
        results["stress_ensemble"] = full_3x3_to_voigt_6_stress(to_numpy(members.stress[:, 0]))
    return results


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers in double precision, as calculators hand them on."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float64).numpy()
    return array
