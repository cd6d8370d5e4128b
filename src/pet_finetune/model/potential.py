"""The whole potential: network times scale, plus baseline, plus repulsion, and its derivatives.

    E = scale * sum_i PET_i + sum_i baseline(species_i) + ZBL        (eV)
    F = -dE/dr (eV/Angstrom),  stress = dE/dstrain / V (eV/Angstrom^3, ASE's sign)

Both derivatives come from one gradient, with respect to the edge vectors: the energy depends on
positions and cell through them alone, but for long-range features. That, and targets that
are no energies: see :mod:`.prediction`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pet_finetune.errors import ConfigError, PetFinetuneError, did_you_mean
from pet_finetune.graph import Batch
from pet_finetune.keys import TargetSpec, main_energy
from pet_finetune.nn.projection import together
from pet_finetune.nn.quantized import num_quantized
from pet_finetune.profiling import stage

from .pet import HEAD_GROUPS, PET
from .prediction import (
    LastLayer,
    Prediction,
    Property,
    autograd_possible,
    features_key,
    forces_of,
    property_of,
    stress_of,
    with_leaves,
)
from .terms import ZBL, Composition, Scale, covalent_radii, sources_of, with_more, without

if TYPE_CHECKING:
    from pet_finetune.config.run_options import ModelOptions


class Potential(nn.Module):
    """A PET with everything around it that makes energies in eV.

    Args:
        hypers: the architecture's hyperparameters.
        species: atomic numbers the model knows.
        targets: what it predicts.
    """

    def __init__(
        self, hypers: ModelOptions, species: Sequence[int], targets: Iterable[TargetSpec]
    ) -> None:
        super().__init__()
        self.hypers = hypers
        self.species = tuple(sorted(int(z) for z in species))
        self.targets: dict[str, TargetSpec] = {}
        self.network = PET(hypers, self.species, ())
        self.composition = Composition(self.species)
        self.scale = Scale()
        self.zbl = ZBL(self.species, covalent_radii(self.species)) if hypers.zbl else None
        #: What :func:`pet_finetune.adapters.inject` put in, if anything.
        self.adapter: object | None = None
        #: Last-layer uncertainties by target; those that hold: ``committee.llpr.fresh``.
        self.uncertainties = nn.ModuleDict()
        for target in targets:
            self.add_target(target)

    def add_target(self, target: TargetSpec, inherit_from: str | None = None) -> None:
        """Add heads for a target, fresh or copied (with baseline and scale) from another.

        Raises:
            PetFinetuneError: the target exists already, or the one to inherit from does not
                or has another shape.
        """
        if target.name in self.targets:
            raise PetFinetuneError(f"The model has a target '{target.name}' already.")
        if inherit_from is not None:
            source = self.target(inherit_from)
            if (source.form, source.per_volume) != (target.form, target.per_volume):
                raise PetFinetuneError(
                    f"Target '{target.name}' is {target.form} and cannot inherit the heads of "
                    f"'{inherit_from}', which is {source.form}"
                    f"{' over the volume' if source.per_volume else ''}."
                )
        self.network.add_target(target)
        self.targets[target.name] = target
        reference = next(self.network.gnn_layers.parameters())
        for module in self.network.head_modules(target.name).values():
            module.to(device=reference.device, dtype=reference.dtype)
        if inherit_from is not None:
            self._copy_target(inherit_from, target.name)

    def _copy_target(self, source: str, destination: str) -> None:
        old = self.network.head_modules(source).values()
        new = self.network.head_modules(destination).values()
        with torch.no_grad():
            for old_module, new_module in zip(old, new, strict=True):
                pairs = zip(old_module.parameters(), new_module.parameters(), strict=True)
                for old_weight, new_weight in pairs:
                    new_weight.copy_(old_weight)
        self.composition.set(destination, self.composition.get(source))
        self.scale.set(destination, self.scale.get(source))
        self.scale.set_relative(destination, self.scale.relative(source))

    def remove_target(self, name: str) -> None:
        """Forget a target and its heads."""
        self.target(name)
        del self.targets[name]
        if name in self.uncertainties:
            del self.uncertainties[name]
        for group in HEAD_GROUPS:
            del getattr(self.network, group)[name]
        self.composition._buffers.pop(f"weights_{name}", None)
        self.scale._buffers.pop(f"factor_{name}", None)
        self.scale.set_relative(name, None)

    def set_uncertainty(self, target: str, layer: LastLayer) -> None:
        """Give a target an uncertainty.

        Raises:
            ValueError: it is of another number of features than the target's last layer sees.
        """
        width = self.network.last_layer_width
        if layer.width != width:
            raise ValueError(f"it is of {layer.width} features, and the last layer sees {width}")
        self.uncertainties[self.target(target).name] = layer.to(self.device)

    def uncertainty_of(self, target: str) -> LastLayer | None:
        """The last-layer uncertainty of a target, whichever weights it was made for."""
        layer = self.uncertainties[target] if target in self.uncertainties else None  # noqa: SIM401
        assert layer is None or isinstance(layer, LastLayer)
        return layer

    def add_species(
        self, numbers: Iterable[int], like: Mapping[int, int] | None = None
    ) -> tuple[int, ...]:
        """Add elements to the model; predictions for others do not change, bit for bit.

        Every embedding gets a row, every baseline an entry, and the repulsion a covalent radius
        for each. Rows are ordered by atomic number, so those of known elements may move.

        Args:
            numbers: atomic numbers, none of which the model knows.
            like: for some of them, the known element whose embeddings and baselines they start
                with. Others start with random embeddings, which scatter about the mean of the
                known ones as these do, and with their mean baseline.

        Returns:
            The new elements, ascending.

        Raises:
            PetFinetuneError: an element is known already, the one to start from is not, or the
                model carries an adapter.
        """
        new, like = tuple(sorted(set(numbers))), dict(like or {})
        if self.adapter is not None:
            raise PetFinetuneError("Species are added to a model before its adapter.")
        self._set_species(with_more(self.species, new, like), like)
        return new

    def remove_species(self, numbers: Iterable[int]) -> None:
        """Forget elements: the opposite of :meth:`add_species`.

        Raises:
            PetFinetuneError: the model does not know one, or would know none.
        """
        self._set_species(without(self.species, numbers), {})

    def _set_species(self, species: Sequence[int], like: Mapping[int, int]) -> None:
        """Know other species: those known today keep what belongs to them."""
        if tuple(species) == self.species:
            return
        sources = sources_of(self.species, species, like)
        self.network.rearrange_species(species, sources)
        self.composition.rearrange_species(species, sources)
        self.scale.rearrange_species(sources)
        if self.zbl is not None:
            self.zbl = self.zbl.rearranged(species)
        self.species = tuple(species)

    def target(self, name: str) -> TargetSpec:
        """The description of a target; an unknown name is an error that lists the known ones."""
        if name not in self.targets:
            raise PetFinetuneError(
                f"The model has no target '{name}'.{did_you_mean(name, self.targets)} "
                f"It predicts: {', '.join(self.targets) or 'nothing'}."
            )
        return self.targets[name]

    def energy_target(self, wanted: str | None = None, of_adapter: Collection[str] = ()) -> str:
        """The energy meant: the one named, else the only one there is, else ``energy``.

        Args:
            wanted: the one named, if any.
            of_adapter: the targets of an adapter in the model, which alone count where none is
                named: heads that it did not train do not fit its features.

        Raises:
            ConfigError: there are several and none is named, or the one named is no energy of
                whole structures.
            PetFinetuneError: no target has that name.
        """
        energies = [name for name, spec in self.targets.items() if spec.is_energy]
        if wanted is None:
            meant = [name for name in energies if not of_adapter or name in of_adapter]
            wanted = main_energy(meant)
            if wanted is None:
                raise ConfigError(
                    f"target: the {'adapter' if of_adapter else 'model'} predicts "
                    f"{len(meant)} energies ({', '.join(meant) or 'none'}); name the one to use."
                )
        if not self.target(wanted).is_energy:
            raise ConfigError(
                f"target: '{wanted}' is a {self.target(wanted).quantity or 'property'}, not an "
                f"energy. Energies of this model: {', '.join(energies) or 'none'}."
            )
        return wanted

    @property
    def cutoff(self) -> float:
        """Longest edge the potential needs, Angstrom."""
        return max(self.hypers.cutoff, self.zbl.cutoff if self.zbl is not None else 0.0)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the network."""
        return self.network.edge_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.edge_embedder.weight.device

    def num_parameters(self) -> int:
        """Number of parameters of the network, with adapters."""
        floats = sum(parameter.numel() for parameter in self.network.parameters())
        return floats + num_quantized(self.network)

    def predict(
        self,
        batch: Batch,
        target: str = "energy",
        *,
        forces: bool = True,
        stress: bool = False,
        create_graph: bool = False,
    ) -> Prediction:
        """Energies of a batch and, on request, forces and stresses.

        Args:
            batch: edges up to at least :attr:`cutoff`, on the model's device and dtype.
            target: which energy.
            forces: whether forces are derived.
            stress: whether the stress is derived.
            create_graph: keep the graph of the derivatives, for training on them.
        """
        wanted = {target: (forces, stress)}
        return self.predict_many(batch, wanted, create_graph=create_graph)[target]

    def predict_many(
        self,
        batch: Batch,
        wanted: Mapping[str, tuple[bool, bool]],
        *,
        create_graph: bool = False,
    ) -> dict[str, Prediction]:
        """Several energies from one pass through the network's body.

        Args:
            batch: as for :meth:`predict`.
            wanted: for each target, whether its forces and its stress are wanted.
            create_graph: as for :meth:`predict`.

        Raises:
            PetFinetuneError: a target is no energy of structures.
        """
        others = [name for name in wanted if not self.target(name).is_energy]
        if others:
            raise PetFinetuneError(
                f"Target '{others[0]}' is no energy of structures but {self.target(others[0]).form}"
                ": ask for it with predict_targets or predict_property."
            )
        found = self.predict_targets(batch, wanted, create_graph=create_graph)
        return {name: value for name, value in found.items() if isinstance(value, Prediction)}

    def predict_property(self, batch: Batch, target: str) -> Tensor:
        """Values of a target that is no energy; shape and unit as in :class:`Property`.

        Raises:
            PetFinetuneError: the target is an energy of structures.
        """
        found = self.predict_targets(batch, {target: (False, False)})[target]
        if not isinstance(found, Property):
            raise PetFinetuneError(f"Target '{target}' is an energy: ask for it with predict.")
        return found.values

    def predict_targets(
        self,
        batch: Batch,
        wanted: Mapping[str, tuple[bool, bool]],
        *,
        create_graph: bool = False,
        features_of: Collection[str] = (),
    ) -> dict[str, Prediction | Property]:
        """Any targets from one pass through the network's body.

        Args:
            batch: as for :meth:`predict`.
            wanted: for each target, whether forces and stress are to be derived from it; targets
                that are no energies have none.
            create_graph: as for :meth:`predict`.
            features_of: those whose predictions bring along what the last layer sees, as numbers.
        """
        with autograd_possible(self, batch) as batch:
            energies = {n: both for n, both in wanted.items() if self.target(n).is_energy}
            derive = any(forces or stress for forces, stress in energies.values())
            # Whatever trains, the one derivative taken of this graph is that by the geometry.
            predicts = derive and not create_graph
            with torch.set_grad_enabled(derive or torch.is_grad_enabled()), together(self.network):
                leafy, leaves = with_leaves(batch, self.hypers.long_range.enable, derive)
                outputs = self.network(leafy, list(wanted), predicts, list(features_of) or None)
                repulsion = self._repulsion(leafy)
                keep = create_graph or not derive
                results: dict[str, Prediction | Property] = {
                    name: self._property(batch, self.targets[name], outputs[name], repulsion, keep)
                    for name in wanted
                    if name not in energies
                }
                for index, (name, (forces, stress)) in enumerate(energies.items()):
                    learned = outputs[name].squeeze(-1) * self.scale.get(name).to(outputs[name])
                    if repulsion is not None:
                        learned = learned + repulsion
                    gradients = None
                    if forces or stress:
                        with stage("derivatives"):
                            gradients = torch.autograd.grad(
                                learned.sum(),
                                leaves,
                                create_graph=create_graph,
                                retain_graph=create_graph or index + 1 < len(energies),
                                materialize_grads=True,
                            )
                    if derive and not create_graph:
                        learned = learned.detach()  # its graph went with the derivative
                    results[name] = self._prediction(
                        batch, name, learned, gradients, forces, stress
                    )
            for name in features_of:
                seen = outputs[features_key(name)].detach()
                results[name] = replace(results[name], features=seen)
            return {name: results[name] for name in wanted}

    def _property(
        self, batch: Batch, spec: TargetSpec, raw: Tensor, repulsion: Tensor | None, keep: bool
    ) -> Property:
        """Compute one property; its graph is kept unless a derivative consumes it."""
        scale, baseline = self.scale.get(spec.name), None
        relative = self.scale.relative(spec.name)
        if relative is not None:
            scale = scale * relative[self.composition.species_index[batch.numbers]]
        if spec.rank == 0:
            baseline = self.composition(batch.numbers, spec.name)
            if spec.num_subtargets > 1 and baseline.dim() == 1:
                baseline = baseline.unsqueeze(1).expand(-1, spec.num_subtargets)
        if spec.quantity == "energy" and spec.shape == () and repulsion is not None:
            baseline = repulsion if baseline is None else baseline + repulsion
        if not keep:
            raw = raw.detach()
            baseline = None if baseline is None else baseline.detach()
        return property_of(batch, spec, raw, scale, baseline)

    def _prediction(
        self,
        batch: Batch,
        target: str,
        learned: Tensor,
        gradients: Sequence[Tensor] | None,
        forces: bool,
        stress: bool,
    ) -> Prediction:
        atoms = learned.to(torch.float64) + self.composition(batch.numbers, target)
        return Prediction(
            energy=atoms.new_zeros(batch.num_structures).index_add(0, batch.structure_index, atoms),
            atom_energies=atoms,
            forces=forces_of(batch, gradients) if forces and gradients is not None else None,
            stress=stress_of(batch, gradients) if stress and gradients is not None else None,
        )

    def _repulsion(self, batch: Batch) -> Tensor | None:
        """ZBL energy of each atom, [n_atoms], or None without it."""
        if self.zbl is None:
            return None
        distances = torch.linalg.vector_norm(batch.edge_vectors, dim=-1)
        pairs = self.zbl(batch.numbers[batch.centers], batch.numbers[batch.neighbors], distances)
        zeros: Tensor = pairs.new_zeros(batch.num_atoms)
        return zeros.index_add(0, batch.centers, pairs)
