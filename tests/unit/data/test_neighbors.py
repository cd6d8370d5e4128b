"""Neighbour lists against ASE's, and the exactness of the reverse index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, graphene, molecule
from ase.neighborlist import neighbor_list as ase_neighbor_list

from pet_finetune.data import neighbors
from pet_finetune.data.neighbors import edge_vectors, find_pairs, structure_neighbors
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import DataError


def rattled(atoms: Atoms, seed: int = 0) -> Atoms:
    atoms.rattle(0.1, seed=seed)
    return atoms


def triclinic(pbc=True) -> Atoms:
    rng = np.random.default_rng(5)
    cell = [[3.1, 0, 0], [1.9, 2.7, 0], [-1.1, 2.2, 3.4]]
    return Atoms("LiOFNaCl", scaled_positions=rng.random((5, 3)), cell=cell, pbc=pbc)


def outside_the_cell() -> Atoms:
    atoms = triclinic()
    atoms.positions += np.random.default_rng(1).normal(scale=10, size=(5, 3))
    return atoms


CASES = {
    "molecule": (molecule("CH3CH2OH"), 3.0),
    "tiny cell, many images": (bulk("Cu"), 9.0),
    "tiny skewed cell": (Atoms("H", cell=[[1, 0, 0], [0.9, 0.5, 0], [0.2, 0.7, 1.1]], pbc=True), 3),
    "rattled crystal": (rattled(bulk("NaCl", "rocksalt", a=5.6, cubic=True)), 5.0),
    "slab": (rattled(fcc111("Al", (2, 2, 3), vacuum=6.0)), 4.5),
    "slab with a far cell vector": (rattled(fcc111("Al", (2, 1, 2), vacuum=1.0)), 4.5),
    "graphene": (graphene(size=(2, 2, 1), vacuum=None), 4.0),
    "wire": (Atoms("C2", positions=[[0, 0, 0], [1, 0.5, 0]], cell=[0, 0, 2], pbc=[0, 0, 1]), 5),
    "periodic along a and c": (triclinic((True, False, True)), 4.0),
    "triclinic": (triclinic(), 6.0),
    "outside the cell": (outside_the_cell(), 4.0),
    "isolated atom": (Atoms("He"), 5.0),
    "no pairs": (Atoms("He2", positions=[[0, 0, 0], [0, 0, 9]]), 5.0),
    "alone in a big box": (Atoms("He", cell=[20, 20, 20], pbc=True), 5.0),
}


@pytest.mark.parametrize(("atoms", "cutoff"), CASES.values(), ids=CASES.keys())
def test_agrees_with_ase_and_reverses_exactly(atoms, cutoff):
    structure = atoms_to_structure(atoms)
    pairs = structure_neighbors(structure, cutoff)
    vectors = edge_vectors(structure.positions, structure.cell, pairs).numpy()

    i, j, d, vector, s = ase_neighbor_list("ijdDS", atoms, float(cutoff))
    order = np.lexsort((s[:, 2], s[:, 1], s[:, 0], j, i))
    ours = [pairs.centers.numpy(), pairs.neighbors.numpy(), pairs.shifts.numpy()]
    np.testing.assert_array_equal(ours[0], i[order])
    np.testing.assert_array_equal(ours[1], j[order])
    np.testing.assert_array_equal(ours[2], s[order])
    np.testing.assert_allclose(vectors, vector[order], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), d[order], atol=1e-12)

    back = pairs.reverse.numpy()
    np.testing.assert_array_equal(ours[0][back], ours[1])
    np.testing.assert_array_equal(ours[1][back], ours[0])
    np.testing.assert_array_equal(ours[2][back], -ours[2])
    np.testing.assert_array_equal(back[back], np.arange(len(back)))


def test_the_cases_cover_what_they_say():
    edges = {name: len(ase_neighbor_list("i", a, float(c))) for name, (a, c) in CASES.items()}
    assert edges["isolated atom"] == edges["no pairs"] == edges["alone in a big box"] == 0
    assert edges["tiny cell, many images"] > 200
    assert min(n for n in edges.values() if n) > 5


def test_empty_lists_have_shapes_and_types():
    pairs = structure_neighbors(atoms_to_structure(Atoms("He")), 5.0)
    assert pairs.num_edges == 0
    assert pairs.shifts.shape == (0, 3)
    for tensor in (pairs.centers, pairs.neighbors, pairs.shifts, pairs.reverse):
        assert tensor.dtype == torch.int64


def test_pairs_at_the_cutoff_keep_their_reverse():
    # 4 x 4 x 4 simple cubic: many distances equal the cutoff up to rounding.
    atoms = bulk("Po", "sc", a=3.3).repeat(4)
    atoms.positions += 0.1 / 3
    structure = atoms_to_structure(atoms)
    pairs = structure_neighbors(structure, 3.3)
    assert torch.equal(pairs.centers[pairs.reverse], pairs.neighbors)
    assert torch.equal(pairs.shifts[pairs.reverse], -pairs.shifts)


def test_edge_vectors_are_differentiable():
    structure = atoms_to_structure(triclinic())
    pairs = structure_neighbors(structure, 4.0)
    positions = structure.positions.clone().requires_grad_()
    cell = structure.cell.clone().requires_grad_()
    edge_vectors(positions, cell, pairs).square().sum().backward()
    step = torch.zeros_like(cell)
    step[1, 2] = 1e-6

    def total(c):
        return edge_vectors(structure.positions, c, pairs).square().sum()

    numeric = (total(structure.cell + step) - total(structure.cell - step)) / 2e-6
    assert cell.grad[1, 2].item() == pytest.approx(numeric.item(), rel=1e-6)
    assert positions.grad.abs().max() > 0


def points_in(cell, pbc, positions, cutoff=7.5):
    return find_pairs(
        np.array(positions, float), np.array(cell, float), np.array(pbc, bool), cutoff, "ij",
        full=False, where="frame 5 of data.xyz",
    )  # fmt: skip


NO_CELL, CUBE = np.zeros((3, 3)), 10.0 * np.eye(3)
OUT = [False] * 3
REFUSED = {
    "one atom far away": (NO_CELL, OUT, [[0, 0, 0], [1, 0, 0], [1e7, 0, 0]], "atom 2 lies 1e.07 A"),
    "far outside of its cell": (CUBE, [1, 1, 1], [[0, 0, 0], [0, -1e12, 0]], "atom 1 .* cells out"),
    "far above a slab": (np.diag([3, 3, 0]), [1, 1, 0], [[0, 0, 0], [1, 1, 0], [0, 0, 1e6]],
                         "atom 2 lies"),
    "a huge cell": (np.diag([9e6, 5, 5]), [1, 1, 1], [[0, 0, 0]], "cell vector is 9e.06 A long"),
    "a position that is NaN": (NO_CELL, OUT, [[0, 0, 0], [0, 0, np.nan]], "atom 1 is NaN"),
    "an infinite position": (CUBE, [1, 1, 1], [[np.inf, 0, 0]], "atom 0 is NaN or infinite"),
    "a cell without volume": (np.diag([3, 3, 0]), [1, 1, 1], [[0, 0, 0]], "linearly dependent"),
    "lengths in nm": (CUBE / 10, [1, 1, 1], np.random.default_rng(0).random((60, 3)), "in nm need"),
    "a tiny cell": (CUBE / 1e4, [1, 1, 1], [[0, 0, 0]], "so dense"),
    "a flat cell": (np.diag([1e-4, 9, 9]), [1, 1, 1], [[0, 0, 0]], "so dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_the_native_code_dies_of_is_refused_and_named(case):
    cell, pbc, positions, message = case
    with pytest.raises(DataError, match=f"frame 5 of data.xyz: .*{message}"):
        points_in(cell, pbc, positions)


def test_more_pairs_than_memory_are_refused(monkeypatch):
    monkeypatch.setattr(neighbors, "_memory", lambda: 1e6)
    grid = np.stack(np.meshgrid(*[np.arange(10.0)] * 3), axis=-1).reshape(-1, 3)
    with pytest.raises(DataError, match="1000 atoms have about .* do not fit into the memory"):
        points_in(CUBE, [1, 1, 1], grid)


@pytest.mark.parametrize("spread", [1e3, 9e4], ids=["near", "far"])
def test_sparse_atoms_in_a_plane_keep_their_pairs(spread):
    """More than 1e5 cells, and one along z: vesin divides by zero there."""
    rng = np.random.default_rng(0)
    centers = rng.random((400, 3)) * [spread, spread, 0.0]
    pairs = np.concatenate([centers, centers + [0.9, 0.0, 0.0]])
    first, second = points_in(NO_CELL, OUT, pairs, cutoff=1.45)
    found = {tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    assert found >= {(k, k + 400) for k in range(400)}
    vectors = pairs[list(first)] - pairs[list(second)]
    assert (np.linalg.norm(vectors, axis=1) < 1.45).all()


def test_a_pair_in_a_wide_flat_cell_is_found():
    first, _ = points_in(np.diag([9e4, 9e4, 20]), [1, 1, 1], [[0, 0, 0], [0, 8.9999e4, 1]])
    assert len(first) == 1


def test_atoms_far_outside_of_their_cell_keep_the_order():
    atoms = Atoms("H3", positions=[[0, 0, 0], [5e4, 1, 0], [0, 0, -9e4]], cell=[1, 1, 1], pbc=True)
    pairs = structure_neighbors(atoms_to_structure(atoms), 1.2)
    rows = np.stack([pairs.centers, pairs.neighbors, *pairs.shifts.T])
    assert (np.lexsort(rows[::-1]) == np.arange(pairs.num_edges)).all()
    assert torch.equal(pairs.centers[pairs.reverse], pairs.neighbors)
