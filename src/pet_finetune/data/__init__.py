"""Structures, neighbour lists and batches; ASE and files are met here and nowhere above."""

from __future__ import annotations

from .epochs import random_rotations, rotate_batch
from .frame_files import read_frames
from .labelled_batch import LabelledBatch, batch_from_atoms, collate
from .loader import Loader
from .neighbors import NeighborList, edge_vectors, neighbor_list, structure_neighbors
from .readers import read_structures
from .splits import Splits, load_splits, make_splits
from .structure import Structure, atoms_to_structure, structures_fingerprint
from .structure_sets import check_species, find_species

__all__ = [
    "LabelledBatch",
    "Loader",
    "NeighborList",
    "Splits",
    "Structure",
    "atoms_to_structure",
    "batch_from_atoms",
    "check_species",
    "collate",
    "edge_vectors",
    "find_species",
    "load_splits",
    "make_splits",
    "neighbor_list",
    "random_rotations",
    "read_frames",
    "read_structures",
    "rotate_batch",
    "structure_neighbors",
    "structures_fingerprint",
]
