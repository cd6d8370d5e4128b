"""The ASE calculator: energies, forces and stress of any checkpoint the package reads."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes, equal

from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.backends.choice import Arena, choose_backend, use_backend
from pet_finetune.checkpoint.opening import open_adapted, open_committee
from pet_finetune.committee.committee import COMMITTEE_PROPERTIES, OF_MEMBERS, Committee, results_of
from pet_finetune.committee.committee_files import Adapters
from pet_finetune.committee.llpr import fresh, no_property, properties_of, with_uncertainty
from pet_finetune.data.calculator_input import (
    Contacts,
    MovingAtoms,
    Origin,
    charge_and_spin,
    check_atoms,
    unread_charge_and_spin,
)
from pet_finetune.device import check_forked, choose_device, choose_dtype, plain_torch
from pet_finetune.errors import AdapterError, ConfigError, DataError
from pet_finetune.graph import Batch, join_graphs
from pet_finetune.keys import Compile
from pet_finetune.log import get_logger
from pet_finetune.model import inference
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import LastLayer, Prediction, Property
from pet_finetune.nn.neighborhood import SteadyEdges

_logger = get_logger(__name__)


class PETCalculator(Calculator):
    """Energy, forces and stress from a PET potential, for everything ASE does with them.

    One evaluation gives all properties, so another property of the same atoms costs nothing.
    Results are in eV, eV/Å and eV/Å³. Only the sum of ``energies`` has a physical meaning.

    Args:
        model: a checkpoint of pet-finetune or metatrain, or a potential, which is copied.
        adapter: an adapter folder, merged into the weights. More can be loaded and switched to
            while the calculator is in use.
        adapters: several adapter folders, or the folder of a run with ``finetune.ensemble``: a
            committee. All properties are its mean, with the additional ones of
            :data:`COMMITTEE_PROPERTIES`.
        spread: ``"always"`` computes uncertainties and the members' predictions every time,
            ``"on_demand"`` on request. None: always of a committee; of a last layer (LLPR) the
            energy's uncertainty always, the members' forces and stress on request.
        target: the energy to use. Default: the only one of the adapter, or else of the model, else
            ``energy``.
        non_conservative: True for forces and stress from the model's direct heads
            (``non_conservative_...``) instead of derivatives of the energy, ``"forces"`` or
            ``"stress"`` for one of them: faster, and energies are no longer conserved.
        device: ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda``, ``cuda:1``...
        dtype: ``float32``, ``float64``, or None for the model's own.
        skin: margin of the neighbour list in Å; it changes speed, never results.
        orientations: 2 for the mean over the structure and its inversion, 4, 12 or 24 for a group
            of as many rotations: a smaller error of the learned symmetry, at N evaluations.
        compile: ``on`` computes energy and derivatives with one compiled graph, made once for a
            kind of model in a minute or two; ``off`` never; ``auto`` uses an existing one, on a
            GPU. Committees, direct heads and features are not compiled.

    Attributes:
        model: the potential, adapter merged, or the committee; frozen, in evaluation mode.
        target: the energy that is computed.
        device: where the potential is evaluated.

    Raises:
        PetFinetuneError: a problem of checkpoint, adapter, target, device or dtype; also for
            structures that cannot be computed.
    """

    # ASE declares both of these as attributes that instances may change.
    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012
    # The potential does not read them, so setting them costs no evaluation.
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012
    name = "pet"

    @plain_torch()
    def __init__(
        self,
        model: str | os.PathLike[str] | Potential | AdaptedPotential,
        *,
        adapter: str | os.PathLike[str] | None = None,
        adapters: Adapters | None = None,
        spread: Literal["always", "on_demand", "asked"] | None = None,
        target: str | None = None,
        non_conservative: inference.NonConservative = False,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        skin: float = 0.5,
        orientations: int = 1,
        compile: Compile = "auto",
    ) -> None:
        super().__init__()
        self._lock = threading.RLock()
        if not skin >= 0.0:
            raise ConfigError(f"skin: the margin is a length of 0 Å or more, got {skin}.")
        self._rotations = inference.orientations(orientations)
        self._wanted_device = str(device)
        self.device = choose_device(self._wanted_device)
        floating = choose_dtype(dtype)
        if adapter is not None and adapters is not None:
            raise ConfigError(
                "adapter and adapters: give one of them, a single adapter or those of a committee."
            )
        if spread == "asked":
            warnings.warn('spread="asked" is now "on_demand"', DeprecationWarning, stacklevel=2)
            spread = "on_demand"
        for option, value, allowed in (
            ("compile", compile, ("auto", "on", "off")),
            ("spread", spread or "always", ("always", "on_demand")),
        ):
            if value not in allowed:
                raise ConfigError(f"{option}: '{value}' is not one of {', '.join(allowed)}.")
        self._spread = spread
        self._wanted_target = target
        self._wanted_direct: inference.NonConservative = non_conservative
        self._adapted: AdaptedPotential | None = None
        potential: Potential | Committee
        if adapters is not None:
            potential = open_committee(model, adapters, target)
        else:
            self._adapted = open_adapted(model, adapter)
            potential = self._adapted.potential
        potential.to(device=self.device, dtype=floating)
        use_backend(potential, choose_backend(self.device))
        if self._adapted is not None:
            self._adapted.merge()
        self.model: Potential | Committee = potential.eval().requires_grad_(False)
        self._moving = MovingAtoms(potential.cutoff, float(skin))
        self._steady = self._steady_edges()
        self._compile = compile
        self._choose()
        self._arena, self._told = Arena(), False

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the evaluation; sums of energies are float64 always."""
        return self.model.dtype

    def load_adapter(self, directory: str | os.PathLike[str], name: str) -> None:
        """Load one more adapter folder; the first one becomes active.

        Raises:
            AdapterError: it cannot be read, belongs to another base, or the name is taken.
        """
        self._switch(lambda adapted: adapted.load_adapter(os.fspath(directory), name))

    def set_adapter(self, name: str) -> None:
        """Switch to another adapter, also during a simulation; nothing of the last one is left.

        Raises:
            AdapterError: no adapter of this name was loaded.
        """
        self._switch(lambda adapted: adapted.set_adapter(name))

    def disable_adapters(self) -> None:
        """Switch to the base without adapters."""
        self._switch(AdaptedPotential.disable_adapters)

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter in use; None without one, and for a committee."""
        return None if self._adapted is None else self._adapted.active_adapter

    def contacts(self) -> Contacts:
        """The closest two atoms of the structure computed last, and those out of all others' reach.

        Raises:
            DataError: nothing was computed yet.
        """
        found = None if self.atoms is None else self._moving.contacts(self.atoms)
        if found is None:
            raise DataError("There is no structure yet: compute one.")
        return found

    @property
    def neighbor_origin(self) -> Origin | None:
        """Positions, cell and pbc for which the neighbour list in use was built; None before one.

        Set to what another calculator had here, this one goes on to the same last bit.
        """
        return self._moving.origin

    @neighbor_origin.setter
    def neighbor_origin(self, origin: Origin) -> None:
        self._moving.rebuild(origin)
        self.reset()

    @plain_torch()
    def _switch(self, change: Callable[[AdaptedPotential], None]) -> None:
        """Change the adapter in use; what was computed is of another model then."""
        if self._adapted is None:
            raise AdapterError(
                "This calculator is a committee, whose members are chosen when it is made. Make "
                "another one with `adapter`."
            )
        change(self._adapted)
        self.reset()
        self._choose()

    def _choose(self) -> None:
        """Find in the model, with its adapter, what is computed and which properties there are."""
        self._frozen: inference.FrozenEnergy | None = None
        self._direct: inference.DirectTargets | None = None
        self._last_layer: LastLayer | None = None
        more: Sequence[str] = COMMITTEE_PROPERTIES
        model = self.model
        if isinstance(model, Committee):
            self.target = model.energy_target(self._wanted_target)
            if self._wanted_direct is not False:
                raise ConfigError(
                    "non_conservative: a committee is of one energy, and has no direct heads. Use "
                    "non_conservative=False, or one of its adapters."
                )
        else:
            own = () if self._adapted is None else self._adapted.targets
            self.target = model.energy_target(self._wanted_target, own)
            # Direct heads of the base do not fit the adapter's features.
            targets = {name: model.targets[name] for name in own or model.targets}
            self._direct = inference.direct_targets(targets, self.target, self._wanted_direct)
            self._last_layer = fresh(model).get(self.target)
            more = properties_of(self._last_layer, self._direct is not None)
        self.implemented_properties = [*type(self).implemented_properties, *more]

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """ASE's ``get_property``, with the reason if an uncertainty is not available.

        Raises:
            PropertyNotImplementedError: the model has no such property.
        """
        if name in COMMITTEE_PROPERTIES and name not in self.implemented_properties:
            why = no_property(self._last_layer, self.target)
            raise PropertyNotImplementedError(f"{name}: {why}")
        with self._lock:  # a thread's results are not those of another one's structure
            return super().get_property(name, atoms, allow_calculation)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Changes since the last calculation, with charge and spin if the model uses them."""
        known = self.atoms
        if (
            known is not None
            and self.ignored_changes >= PETCalculator.ignored_changes
            and np.array_equal(known.numbers, atoms.numbers)
            and np.array_equal(known.cell.array, atoms.cell.array)
            and np.array_equal(known.pbc, atoms.pbc)
        ):  # the usual case in a simulation, which asks several times a step
            same = np.array_equal(known.positions, atoms.positions)
            same = same or equal(known.positions, atoms.positions, atol=tol)
            changes = [] if same else ["positions"]
        else:
            changes = super().check_state(atoms, tol=tol)
        if not changes and known is not None:
            now, then = (charge_and_spin(one, self.model.hypers) for one in (atoms, known))
            changes = [] if now == then else ["info"]
        return changes

    @plain_torch()
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] | None = None,
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute all properties of a structure; ASE calls this when one is asked for.

        Raises:
            PropertyNotImplementedError: a stress of a structure that is not periodic everywhere.
            SpeciesError: elements the model does not know.
            DataError: no atoms, or coordinates, a cell, a charge or a spin that cannot be.
            ConfigError: on a GPU, in a process that was forked from one that used it.
        """
        atoms = self.atoms if atoms is None else atoms
        if atoms is None:
            raise DataError("There is no structure to calculate: pass one.")
        periodic = bool(atoms.pbc.all())
        if not periodic and any(name.startswith("stress") for name in properties or ()):
            raise PropertyNotImplementedError(
                "The stress needs a structure that is periodic in three directions, and this one "
                f"has pbc = {atoms.pbc.tolist()}: its volume is not defined."
            )
        self.reset()  # nothing of the last structure is left should this one be refused
        check_forked(self.device)
        predict = partial(self._predict, stress=periodic, asked=frozenset(properties or ()))
        batch, slack, holds = self._batch(atoms, self._moving), None, False
        while not holds:
            chosen = batch
            if self._steady is not None:
                chosen, slack = self._steady.choose(batch)
            with self._arena.reused():
                prediction = inference.predict_mean(chosen, self._rotations, predict)
            results, left = results_of(prediction, slack)
            holds = self._steady is None or self._steady.hold(left)
        super().calculate(atoms, properties, system_changes)
        self.results = results

    @plain_torch()
    def predict_together(
        self, structures: Sequence[Atoms], neighbors: Sequence[MovingAtoms], *, stress: bool = True
    ) -> Prediction:
        """Energies and forces of several structures in one batch, without uncertainties.

        Each has ``neighbors`` of :meth:`fresh_neighbors`, for its next call too. Stresses are zero
        where it is not periodic.
        """
        check_forked(self.device)
        batch = join_graphs(list(map(self._batch, structures, neighbors)))
        stress = stress and any(bool(atoms.pbc.all()) for atoms in structures)
        model, mean = self.model, self._energy
        if isinstance(model, Committee):
            mean = partial(model.predict, target=self.target, spread=False)
        with self._arena.reused():
            return inference.predict_mean(batch, self._rotations, partial(mean, stress=stress))

    def fresh_neighbors(self) -> MovingAtoms:
        """A neighbour list for one structure, to be used again while its atoms move."""
        return self._moving.fresh()

    def _batch(self, atoms: Atoms, neighbors: MovingAtoms) -> Batch:
        """A structure as the model's input; its edges reach as far as the skin."""
        check_atoms(atoms, self.model.species)
        charge, spin = charge_and_spin(atoms, self.model.hypers)
        if not self._told and (unread := unread_charge_and_spin(atoms, self.model.hypers)):
            self._told = True
            _logger.warning("%s", unread)
        return neighbors.batch(atoms, charge, spin, self.device, self.model.dtype)

    def _predict(self, batch: Batch, stress: bool, asked: frozenset[str]) -> Prediction:
        members = not OF_MEMBERS.isdisjoint(asked) or self._spread == "always"
        if isinstance(self.model, Committee):
            spread = members or self._spread is None
            return self.model.predict(batch, self.target, stress=stress, spread=spread)
        layer = self._last_layer
        if self._spread == "on_demand" and asked.isdisjoint(COMMITTEE_PROPERTIES):
            layer = None
        model, target, features = self.model, self.target, layer is not None
        prediction: Prediction | Property
        if self._direct is not None:
            prediction = inference.predict_direct(
                model, batch, target, self._direct, stress, features
            )
        elif layer is None:
            return self._energy(batch, stress)
        else:
            wanted = {target: (True, stress)}
            prediction = model.predict_targets(batch, wanted, features_of=[target])[target]
        assert isinstance(prediction, Prediction)
        if layer is None:
            return prediction
        members = members and self._direct is None
        return with_uncertainty(model, batch, prediction, target, layer, members)

    def _energy(self, batch: Batch, stress: bool) -> Prediction:
        """The energy of one model, frozen at first use."""
        assert isinstance(self.model, Potential)
        if self._frozen is None:
            self._frozen = inference.FrozenEnergy(self.model, self.target, self._compile)
        return self._frozen.predict(batch, stress=stress)

    def __getstate__(self) -> dict[str, Any]:
        """Without the neighbour list, and with the model on the CPU: any machine can open it."""
        state = self.__dict__.copy()
        del state["_lock"]
        state["_moving"] = self._moving.fresh()
        state["_frozen"] = state["_steady"] = None
        if self.device.type != "cpu":
            memo: dict[int, Any] = {}
            state["model"] = copy.deepcopy(self.model, memo).to("cpu")
            state["_adapted"] = copy.deepcopy(self._adapted, memo)
        return state

    @plain_torch()
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self.device = choose_device(self._wanted_device)
        self.model.to(self.device)
        self._steady = self._steady_edges()

    def _steady_edges(self) -> SteadyEdges | None:
        """Edges chosen ahead for several steps, because each read from a GPU takes time."""
        model = self.model
        if self.device.type == "cpu" or isinstance(model, Committee) or len(self._rotations) > 1:
            return None
        return SteadyEdges(model.network.neighborhood)
