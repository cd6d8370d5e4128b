"""Predictions and features as metatensor's tensor maps, named and laid out as metatrain does.

``energy`` and the other targets by their names: of structures, or of atoms where that is asked for.
``feature`` is what the read-outs see of each atom, ``mtt::aux::TARGET_last_layer_features`` what
the last layer of a target sees, and ``mtt::feature::PART`` the output of a part of the network:
``gnn_layers.N_node``, ``gnn_layers.N_edge``, ``node_backbone.N``, ``edge_backbone.N``,
``node_heads.TARGET.N``, ``edge_heads.TARGET.N``. Parts of edges have a row for each pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from metatensor.torch import Labels, TensorMap
from torch import Tensor

from pet_finetune.data.convert_sets import tensor_block
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.structure import Structure
from pet_finetune.device import plain_torch
from pet_finetune.errors import ConfigError, did_you_mean
from pet_finetune.graph import Batch, Neighborhood
from pet_finetune.keys import TargetSpec, base_name
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction
from pet_finetune.nn.gnn_layer import sum_over_edges

_ATOM, _SYSTEM = ["system", "atom"], ["system"]
_PAIR = ["system", "first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]
_FEATURE = "mtt::feature::"


def _last_layer(target: str) -> str:
    return f"mtt::aux::{target.replace('mtt::', '')}_last_layer_features"


def output_names(model: Potential) -> list[str]:
    """All outputs that a model can give as tensor maps."""
    layers, readouts = range(model.hypers.num_gnn_layers), range(model.network.num_readouts)
    parts = [f"gnn_layers.{index}_{kind}" for index in layers for kind in ("node", "edge")]
    kinds = ("node", "edge")
    parts += [f"{kind}_backbone.{index}" for index in readouts for kind in kinds]
    parts += [
        f"{kind}_heads.{target}.{index}"
        for target in model.targets
        for index in readouts
        for kind in kinds
    ]
    names = [*model.targets, "feature", *map(_last_layer, model.targets)]
    return names + [_FEATURE + part for part in parts]


@plain_torch()
def tensor_maps(
    model: Potential,
    structures: Sequence[Structure],
    outputs: Sequence[str] | Mapping[str, str] | None = None,
    *,
    batch_size: int = 32,
) -> dict[str, TensorMap]:
    """Predictions of a model as tensor maps.

    Args:
        model: the potential.
        structures: at least one.
        outputs: names as :func:`output_names` lists them; as a mapping, with ``system`` or ``atom``
            for each: targets of structures can be had of atoms, which sum to them. None: all.
        batch_size: structures at once.

    Returns:
        A tensor map of one block for each output, on the CPU. Energies of structures have the
        gradients ``positions``, minus the forces, and, where all structures are periodic in three
        directions, ``strain``, the symmetric part of the derivative (metatrain's has a small
        antisymmetric one, as PET learns rotational symmetry).

    Raises:
        ConfigError: no output has that name, or it is not of atoms.
    """
    wanted = _wanted(model, outputs)
    parts: dict[str, list[_Rows]] = {name: [] for name in wanted}
    strained = all(bool(structure.pbc.all()) for structure in structures)
    for start in range(0, len(structures), batch_size):
        some = structures[start : start + batch_size]
        pairs = [(structure, structure_neighbors(structure, model.cutoff)) for structure in some]
        graph = collate(pairs, model.dtype).graph.to(model.device)
        for name, rows in _of_batch(model, graph, some, wanted, strained):
            parts[name].append(rows.moved(start))
    return {name: _joined(rows) for name, rows in parts.items()}


def _wanted(
    model: Potential, outputs: Sequence[str] | Mapping[str, str] | None
) -> dict[str, str | None]:
    """Sample kind of each output: ``system``, ``atom``, or None for its own."""
    if outputs is None:
        outputs = list(model.targets)
    given: dict[str, str | None] = (
        dict(outputs) if isinstance(outputs, Mapping) else dict.fromkeys(outputs)
    )
    known = output_names(model)
    for name, kind in given.items():
        if name not in known:
            raise ConfigError(
                f"outputs: there is no '{name}'.{did_you_mean(name, known)} This model gives: "
                f"{', '.join(known)}."
            )
        if kind not in (None, "system", "atom"):
            raise ConfigError(f"outputs: '{name}' is asked for '{kind}', not 'system' or 'atom'.")
        spec = model.targets.get(name)
        if kind == "atom" and spec is not None and spec.per_volume:
            raise ConfigError(f"outputs: '{name}' is divided by the volume, so atoms have none.")
        if kind == "system" and (name.startswith(_FEATURE) or (spec and spec.per_atom)):
            raise ConfigError(f"outputs: '{name}' has no values of structures, only of its parts.")
    return given


@dataclass(frozen=True)
class _Rows:
    """The values of some structures, with what their rows, axes and columns are.

    Attributes:
        values: [n, 3..., k].
        names: of the columns of ``samples``.
        samples: [n, ...]; the first column is the structure.
        column: name of the last axis.
        gradients: of each kind, values and samples.
    """

    values: Tensor
    names: list[str]
    samples: Tensor
    column: str
    gradients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def moved(self, start: int) -> _Rows:
        """Tensor map with shifted structure numbers."""

        def later(samples: Tensor) -> Tensor:
            return torch.cat([samples[:, :1] + start, samples[:, 1:]], dim=1)

        gradients = {
            name: (values, later(samples)) for name, (values, samples) in self.gradients.items()
        }
        return _Rows(self.values, self.names, later(self.samples), self.column, gradients)


def _joined(parts: Sequence[_Rows]) -> TensorMap:
    """All rows as one tensor map."""
    first = parts[0]

    def joined(names: list[str], rows: Iterable[tuple[Tensor, Tensor]]) -> Any:
        values, samples = (torch.cat(some).detach().cpu() for some in zip(*rows, strict=True))
        return tensor_block(values, names, samples, first.column)

    block = joined(first.names, [(part.values, part.samples) for part in parts])
    for name in first.gradients:
        names = ["sample", "atom"] if name == "positions" else ["sample"]
        block.add_gradient(name, joined(names, [part.gradients[name] for part in parts]))
    return TensorMap(Labels.single(), [block])


def _of_batch(
    model: Potential,
    batch: Batch,
    structures: Sequence[Structure],
    wanted: Mapping[str, str | None],
    strained: bool,
) -> Iterator[tuple[str, _Rows]]:
    """The outputs of one batch."""
    sizes = batch.atoms_per_structure
    first = sizes.cumsum(0) - sizes
    places = torch.arange(batch.num_atoms, device=first.device) - first[batch.structure_index]
    atoms = torch.stack([batch.structure_index, places], dim=1)
    targets = {name: kind for name, kind in wanted.items() if name in model.targets}
    derive = {
        name: (model.targets[name].is_energy and kind != "atom",) * 2
        for name, kind in targets.items()
    }
    predicted = model.predict_targets(batch, derive) if targets else {}
    for name, kind in targets.items():
        spec, found = model.targets[name], predicted[name]
        if isinstance(found, Prediction):
            yield name, _energy(batch, found, spec, atoms, kind == "atom", strained)
            continue
        values = found.values
        if kind == "atom" and not spec.per_atom:
            raw = model.network(batch, [name])[name]
            atomic = replace(spec, per_atom=True)
            values = model._property(batch, atomic, raw, model._repulsion(batch), True).values
        values = values.reshape([-1, *[3] * spec.rank, spec.num_subtargets])
        if kind == "atom" or spec.per_atom:
            yield name, _Rows(values, _ATOM, atoms, _column(spec))
        else:
            systems = _of_systems(batch.num_structures, atoms)
            yield name, _Rows(values, _SYSTEM, systems, _column(spec))
    features = {name: kind for name, kind in wanted.items() if name not in model.targets}
    if features:
        with torch.no_grad():
            yield from _features(model, batch, structures, features, atoms)


def _column(spec: TargetSpec) -> str:
    return "energy" if spec.is_energy else base_name(spec.name).replace("mtt::", "")


def _of_systems(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device).unsqueeze(1)


def _energy(
    batch: Batch,
    found: Prediction,
    spec: TargetSpec,
    atoms: Tensor,
    of_atoms: bool,
    strained: bool,
) -> _Rows:
    if of_atoms:
        return _Rows(found.atom_energies.unsqueeze(1), _ATOM, atoms, _column(spec))
    systems = _of_systems(batch.num_structures, atoms)
    assert found.forces is not None
    gradients = {"positions": (-found.forces.double().unsqueeze(-1), atoms)}
    if strained:
        assert found.stress is not None
        virials = found.stress.double() * batch.volumes.double().view(-1, 1, 1)
        gradients["strain"] = (virials.unsqueeze(-1), systems)
    return _Rows(found.energy.unsqueeze(1), _SYSTEM, systems, _column(spec), gradients)


def _features(
    model: Potential,
    batch: Batch,
    structures: Sequence[Structure],
    wanted: Mapping[str, str | None],
    atoms: Tensor,
) -> Iterator[tuple[str, _Rows]]:
    """Outputs of parts of the network."""
    network = model.network
    neighborhood = network.neighborhood(batch)
    layers: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _given, out: layers.append(out))
        for layer in network.gnn_layers
    ]
    before: list[tuple[Tensor, Tensor]] = []  # the backbone's, where long-range features come after
    if network.long_range_featurizer is not None:
        hooks.append(
            network.long_range_featurizer.register_forward_hook(
                lambda _module, given, _out: before.extend(given[0])
            )
        )
    try:
        readouts = network.features(batch, neighborhood)
    finally:
        for hook in hooks:
            hook.remove()
    pairs: Tensor | None = None
    for name, kind in wanted.items():
        if name.startswith(_FEATURE):
            part = name.removeprefix(_FEATURE)
            values, of_edges = _part(network, part, layers, before or readouts, readouts)
            if of_edges and pairs is None:
                pairs = _pairs(batch, neighborhood, structures, atoms)
            if of_edges:
                assert pairs is not None
                yield name, _Rows(values, _PAIR, pairs, "_")
            else:
                yield name, _Rows(values, _ATOM, atoms, "_")
            continue
        values = _read_out(model, name, neighborhood, readouts, batch.num_atoms)
        if kind == "system":
            zeros = values.new_zeros(batch.num_structures, values.shape[1])
            values = zeros.index_add(0, batch.structure_index, values)
            yield name, _Rows(values, _SYSTEM, _of_systems(len(values), atoms), "feature")
        else:
            yield name, _Rows(values, _ATOM, atoms, "feature")


def _part(
    network: Any,
    part: str,
    layers: Sequence[Any],
    backbone: Sequence[tuple[Tensor, Tensor]],
    readouts: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, bool]:
    """The output of a part of the network, and whether its rows are edges."""
    layer = re.fullmatch(r"gnn_layers\.(\d+)_(node|edge)", part)
    if layer is not None:
        of_edges = layer[2] == "edge"
        return layers[int(layer[1])][of_edges], of_edges
    group, *middle, index = part.split(".")
    of_edges = group.startswith("edge")
    values = (readouts if middle else backbone)[int(index)][of_edges]
    if middle:
        values = getattr(network, group)[".".join(middle)][int(index)](values)
    return values, of_edges


def _read_out(
    model: Potential,
    name: str,
    neighborhood: Neighborhood,
    readouts: Sequence[tuple[Tensor, Tensor]],
    num_atoms: int,
) -> Tensor:
    """``feature``, or the features of a last layer, [n_atoms, k]."""
    network: Any = model.network
    if name == "feature":
        nodes = [nodes for nodes, _ in readouts]
        sums = [
            sum_over_edges(edges, neighborhood, _zeros(edges, num_atoms)) for _, edges in readouts
        ]
        return torch.cat(nodes + sums, dim=1)
    target = next(target for target in model.targets if _last_layer(target) == name)
    parts: list[Tensor] = []
    for index, (nodes_in, edges_in) in enumerate(readouts):
        parts.append(network.node_heads[target][index](nodes_in))
        on_edges = network.edge_heads[target][index](edges_in)
        parts.append(sum_over_edges(on_edges, neighborhood, _zeros(on_edges, num_atoms)))
    return torch.cat(parts, dim=1)


def _zeros(like: Tensor, num_atoms: int) -> Tensor:
    return like.new_zeros(num_atoms, like.size(1))


def _pairs(
    batch: Batch, neighborhood: Neighborhood, structures: Sequence[Structure], atoms: Tensor
) -> Tensor:
    """The labels of the edges, [n_edges, 6].

    Which cell a neighbour is in follows from the vector to it.
    """
    positions = torch.cat([s.positions for s in structures]).to(atoms.device)
    bounds = [0, *batch.atoms_per_structure.cumsum(0).tolist()]
    shifts = torch.zeros(len(neighborhood.centers), 3, dtype=torch.int64, device=atoms.device)
    across = neighborhood.geometry[:, :3].double() - (
        positions[neighborhood.neighbors] - positions[neighborhood.centers]
    )
    for structure, (low, high) in zip(structures, pairwise(bounds), strict=True):
        if bool(structure.pbc.any()):
            inside = (neighborhood.centers >= low) & (neighborhood.centers < high)
            inverse = torch.linalg.pinv(structure.cell.double()).to(atoms.device)
            shifts[inside] = (across[inside] @ inverse).round().long()
    first, second = atoms[neighborhood.centers], atoms[neighborhood.neighbors]
    return torch.cat([first, second[:, 1:], shifts], dim=1)
