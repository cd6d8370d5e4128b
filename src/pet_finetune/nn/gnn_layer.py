"""Message-passing layers: edge tokens from geometry and messages; long-range features.

Of the long-range features each channel of the centre tokens is made into a charge, and the
potential of these charges, those within the cutoff smoothly left out, into features. Periodic
structures take Ewald's sum in training and P3M otherwise, others the sum over all pairs; all three
are torch-pme's. Parameter names, and what is computed when, are those of metatrain's
``long_range_featurizer``.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pet_finetune.backends.instructions import CannotRecord, Part, Recorder, Rows
from pet_finetune.backends.reference import join
from pet_finetune.errors import DataError, PetFinetuneError
from pet_finetune.graph import Batch, Layout, Neighborhood
from pet_finetune.installation import LONG_RANGE, missing_extra

from .block import Block
from .primitives import SiLU, table_of
from .projection import Chain, Memory, record_chain, weights_of
from .recompute import recomputed


class BlockStack(nn.Module):
    """Blocks in a row; a module of its own because checkpoints name it ``trans.layers``."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(
        self, nodes: Tensor, edges: Tensor, layout: Layout, bias: Tensor, memory: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run every block; shapes as in :class:`Block`, ``memory`` as in :class:`GNNLayer`."""
        if not torch.jit.is_scripting():
            if memory == Memory.RECOMPUTE:
                return self._again(nodes, edges, layout, bias)
        for block in self.layers:
            nodes, edges = block(nodes, edges, layout, bias, memory)
        return nodes, edges

    def _again(
        self, nodes: Tensor, edges: Tensor, layout: Layout, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        for block in self.layers:

            def run(
                nodes: Tensor, edges: Tensor, bias: Tensor, block: nn.Module = block
            ) -> tuple[Tensor, ...]:
                out: tuple[Tensor, Tensor] = block(nodes, edges, layout, bias)
                return out

            nodes, edges = recomputed(run, (nodes, edges, bias), [block])
        return nodes, edges


class GNNLayer(nn.Module):
    """Edge geometry, neighbour species (from the second layer on) and messages become tokens.

    Args:
        d_pet: width of the edge tokens.
        num_species: number of species the model knows.
        num_blocks: transformer blocks in this layer.
        make_block: builds one block.
        first: the first layer gets the neighbour species as its message, and no second time.
    """

    def __init__(
        self,
        d_pet: int,
        num_species: int,
        num_blocks: int,
        make_block: Callable[[], Block],
        first: bool,
    ) -> None:
        super().__init__()
        self.trans = BlockStack([make_block() for _ in range(num_blocks)])
        self.edge_embedder = nn.Linear(4, d_pet)
        self.compress = Chain(
            nn.Linear((2 if first else 3) * d_pet, d_pet), SiLU(), nn.Linear(d_pet, d_pet)
        )
        self.neighbor_embedder = None if first else nn.Embedding(num_species, d_pet)

    def forward(
        self,
        nodes: Tensor,
        messages: Tensor,
        neighbor_species: Tensor,
        neighborhood: Neighborhood,
        bias: Tensor,
        memory: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Update centre tokens [n_atoms, d_node] and edge tokens [n_edges, d_pet].

        Args:
            nodes: [n_atoms, d_node].
            messages: [n_edges, d_pet], what arrives along each edge.
            neighbor_species: [n_edges] species indices.
            neighborhood: the batch's neighbourhoods.
            bias: from :func:`~.block.weigh_keys`.
            memory: one of :class:`~.projection.Memory`.
        """
        edges = self.make_edges(neighborhood, messages, neighbor_species, memory)
        out: tuple[Tensor, Tensor] = self.trans(nodes, edges, neighborhood.layout, bias, memory)
        return out

    def make_edges(
        self, neighborhood: Neighborhood, messages: Tensor, neighbor_species: Tensor, memory: int
    ) -> Tensor:
        """The edge tokens before the blocks, [n_edges, d_pet]."""
        if not torch.jit.is_scripting():
            if memory == Memory.RECOMPUTE:
                return self._edges_again(neighborhood, messages, neighbor_species)
        parts = [self.edge_embedder(neighborhood.geometry)]
        if self.neighbor_embedder is not None:
            parts.append(self.neighbor_embedder(neighbor_species))
        parts.append(messages)
        out: Tensor = self.compress(join(parts, 1))
        return out

    def _edges_again(
        self, neighborhood: Neighborhood, messages: Tensor, neighbor_species: Tensor
    ) -> Tensor:
        def run(geometry: Tensor, messages: Tensor) -> tuple[Tensor, ...]:
            own = neighborhood._replace(geometry=geometry)
            return (self.make_edges(own, messages, neighbor_species, Memory.KEEP),)

        modules = (self.edge_embedder, self.neighbor_embedder, self.compress)
        (edges,) = recomputed(run, (neighborhood.geometry, messages), modules)
        return edges

    def record(self, to: Recorder, nodes: Rows, messages: Rows) -> tuple[Rows, Rows]:
        """:meth:`forward` as instructions."""
        width = messages.width
        weight, bias = weights_of(self.edge_embedder)
        if bias is None:
            raise CannotRecord("a layer without a bias")
        parts = 2 if self.neighbor_embedder is None else 3
        joined = to.buffer(Part.EDGES, parts * width)
        to.embed(joined, 0, weight, bias)
        if self.neighbor_embedder is not None:
            to.look_up(joined, width, table_of(self.neighbor_embedder))
        to.take(messages, joined, (parts - 1) * width)
        edges = record_chain(to, self.compress, joined)
        for block in self.trans.layers:
            nodes, edges = cast("Block", block).record(to, nodes, edges)
        return nodes, edges


def make_head(width: int, d_head: int) -> Chain:
    """Linear-SiLU-Linear-SiLU from ``width`` to ``d_head``."""
    return Chain(nn.Linear(width, d_head), SiLU(), nn.Linear(d_head, d_head), SiLU())


def sum_over_edges(values: Tensor, neighborhood: Neighborhood, onto: Tensor) -> Tensor:
    """Cutoff-weighted sum of [n_edges, k] over the edges of each atom, onto [n_atoms, k]."""
    weighted = values * neighborhood.factors.unsqueeze(-1)
    return onto.to(weighted.dtype).index_add(0, neighborhood.centers, weighted)


#: Message for callers that know which structure it is.
PARTLY_PERIODIC = (
    "A structure is periodic in one or two directions, and long-range features are made for "
    "structures that are periodic in all three or in none. Use a cell with a layer of vacuum and "
    "pbc = True in all directions, or a model without long-range features."
)


class LongRangeFeaturizer(nn.Module):
    """Adds long-range features to the read-outs of a network.

    Args:
        width: of the centre tokens.
        cutoff: of the network, Angstrom.
        options: ``smearing``, the width of the Gaussians by which the sum is split in two, and
            ``kspace_resolution``, of the grid in reciprocal space, both in Angstrom, and P3M's
            ``interpolation_nodes``, 1 to 5.

    Raises:
        PetFinetuneError: torch-pme is not installed.
    """

    def __init__(self, width: int, cutoff: float, options: Mapping[str, Any]) -> None:
        super().__init__()
        lacking = missing_extra(*LONG_RANGE)
        if lacking is not None:
            raise PetFinetuneError(f"A model with long-range features {lacking}")
        from torchpme import Calculator, CoulombPotential, EwaldCalculator, P3MCalculator

        smearing, resolution = options["smearing"], options["kspace_resolution"]
        self.ewald_calculator = EwaldCalculator(
            CoulombPotential(smearing, exclusion_radius=cutoff),
            lr_wavelength=resolution,
            full_neighbor_list=True,
        )
        self.p3m_calculator = P3MCalculator(
            CoulombPotential(smearing, exclusion_radius=cutoff),
            mesh_spacing=resolution,
            interpolation_nodes=options["interpolation_nodes"],
            full_neighbor_list=True,
        )
        self.direct_calculator = Calculator(CoulombPotential(exclusion_radius=cutoff))
        for module in self.modules():  # they follow from the options, and are in no file of ours
            module._non_persistent_buffers_set.update(module._buffers)
        self.refusal = PARTLY_PERIODIC  # TorchScript reads no globals
        self.charges_map = nn.Linear(width, width)
        self.out_projection = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(
        self, readouts: list[tuple[Tensor, Tensor]], batch: Batch
    ) -> list[tuple[Tensor, Tensor]]:
        """The read-outs with long-range features in their centre tokens.

        Args:
            readouts: centre and edge features, [n_atoms, width] and [n_edges, d_pet].
            batch: the structures; gradients go to its edge vectors, positions and cells.

        Raises:
            DataError: a structure is periodic in one or two directions.
        """
        nodes = torch.stack([nodes for nodes, _ in readouts]).sum(0) * len(readouts) ** -0.5
        charges = self.charges_map(nodes)
        if torch.jit.is_scripting():
            potentials = self.potentials(charges, batch)
        else:
            with torch.autocast(charges.device.type, enabled=False):
                potentials = self.potentials(charges.to(batch.positions.dtype), batch)
            self._let_go()
        far = self.out_projection(potentials)
        return [((nodes + far) * 0.5**0.5, edges) for nodes, edges in readouts]

    def potentials(self, charges: Tensor, batch: Batch) -> Tensor:
        """The potential at each atom of each channel's charges, [n_atoms, width]."""
        structures = batch.cells.size(0)
        ends = torch.bincount(batch.structure_index, minlength=structures).cumsum(0)
        last_edges: list[int] = torch.searchsorted(batch.centers.contiguous(), ends).tolist()
        last_atoms: list[int] = ends.tolist()
        periodic: list[int] = batch.cells.ne(0.0).any(2).sum(1).tolist()
        pairs = torch.stack([batch.centers, batch.neighbors], dim=1)
        distances = torch.linalg.vector_norm(batch.edge_vectors, dim=1)
        found = [charges[:0]]
        atom, edge = 0, 0
        for index in range(structures):
            last, last_edge = last_atoms[index], last_edges[index]
            own, positions = charges[atom:last], batch.positions[atom:last]
            cell = batch.cells[index]
            if periodic[index] == 0:
                potential = self.of_molecule(own, positions)
            elif periodic[index] == 3:
                own_pairs, lengths = pairs[edge:last_edge] - atom, distances[edge:last_edge]
                if self.training:
                    potential = self.ewald_calculator(own, cell, positions, own_pairs, lengths)
                else:
                    # In float32 its filter's derivatives by the cell overflow to NaN.
                    exact = self.p3m_calculator(
                        own.double(), cell.double(), positions.double(), own_pairs, lengths.double()
                    )
                    potential = exact.to(own.dtype)
            else:
                raise DataError(self.refusal)
            found.append(potential)
            atom, edge = last, last_edge
        return torch.cat(found)

    def of_molecule(self, charges: Tensor, positions: Tensor) -> Tensor:
        """Direct sum over all pairs, without a row of charges for each."""
        atoms = torch.arange(charges.size(0), device=charges.device)
        one, other = torch.combinations(atoms).unbind(1)
        lengths = torch.linalg.vector_norm(positions[other] - positions[one], dim=1)
        coulomb = self.direct_calculator.potential
        values = coulomb.from_dist(lengths) * (1.0 - coulomb.f_cutoff(lengths))
        matrix = values.new_zeros(len(atoms), len(atoms)).index_put((one, other), values)
        return (matrix + matrix.T) @ charges / 2.0

    def _let_go(self) -> None:
        """Forget the graph of the last structure, which torch-pme's mesh holds on to.

        A module that holds tensors with a graph can be neither copied nor saved.
        """
        mesh = self.p3m_calculator
        for module in (mesh.mesh_interpolator, mesh.kspace_filter):
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    setattr(module, name, value.detach())
