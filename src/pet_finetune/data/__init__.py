"""Structures, neighbour lists and batches; ASE and files are met here and nowhere above."""

from __future__ import annotations

from pet_finetune.data.augment import random_rotations, rotate_batch
from pet_finetune.data.batch import Batch, batch_from_atoms, collate
from pet_finetune.data.files import read_frames
from pet_finetune.data.fingerprint import structures_fingerprint
from pet_finetune.data.loader import Loader
from pet_finetune.data.neighbors import (
    NeighborList,
    edge_vectors,
    neighbor_list,
    structure_neighbors,
)
from pet_finetune.data.readers import read_structures
from pet_finetune.data.species import check_species, find_species
from pet_finetune.data.splits import Splits, load_splits, make_splits
from pet_finetune.data.structure import Structure, atoms_to_structure

__all__ = [
    "Batch",
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
