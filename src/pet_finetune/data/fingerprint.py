"""A short name for the exact content of a set of structures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

from .structure import Structure

__all__ = ["structures_fingerprint"]


def structures_fingerprint(structures: Iterable[Structure]) -> str:
    """SHA-256 over elements, geometry, charge, spin and labels, in order, as 64 hex digits.

    File names and frame numbers do not count: the same data under another name are the same.
    """
    digest = hashlib.sha256()
    for structure in structures:
        digest.update(
            f"structure {structure.num_atoms} {structure.charge} {structure.spin};".encode()
        )
        for tensor in (structure.numbers, structure.positions, structure.cell, structure.pbc):
            digest.update(_bytes(tensor))
        for name in sorted(structure.labels):
            digest.update(f"label {name};".encode())
            digest.update(_bytes(structure.labels[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """Type, shape and content."""
    array = tensor.detach().cpu().contiguous().numpy()
    return f"{array.dtype.str}{array.shape};".encode() + array.tobytes()
