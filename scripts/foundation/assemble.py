"""Put the chunks together: no frame twice, none extreme, three files split by molecule.

    python scripts/foundation/assemble.py WORK

Writes ``train.xyz``, ``validation.xyz``, ``test.xyz`` and ``summary.json`` into WORK.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

PARTS = ("train", "validation", "test")
CLOSEST = 0.6  # Angstrom; closer pairs only among the dimers
MAX_FORCE = 15.0  # eV/Angstrom, any component; larger ones only among the dimers


def fingerprint(atoms: Atoms) -> tuple:
    """The same for frames that differ by a translation, a rotation or the order of atoms.

    Sorted distances to the centre, to 0.01 Angstrom, with the elements; a cell counts by volume.
    """
    away = np.linalg.norm(atoms.positions - atoms.positions.mean(0), axis=1).round(2)
    volume = round(atoms.get_volume(), 1) if atoms.pbc.any() else 0.0
    return (volume, *sorted(zip(atoms.numbers.tolist(), away.tolist(), strict=True)))


def extreme(atoms: Atoms) -> bool:
    """Whether atoms are closer, or forces larger, than anybody needs; dimers are all kept."""
    if len(atoms) == 1 or atoms.info["kind"] == "dimers":
        return False
    if np.abs(atoms.get_forces()).max() > MAX_FORCE:
        return True
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    return bool(distances[np.triu_indices(len(atoms), 1)].min() < CLOSEST)


def kept(chunks: list[Path]) -> dict[str, list[Atoms]]:
    """All structures by part. A molecule may have been drawn more than once, a frame not."""
    parts: dict[str, list[Atoms]] = {part: [] for part in PARTS}
    seen: set[tuple] = set()
    left = collections.Counter()
    for path in chunks:
        for atoms in ase.io.iread(path):
            mark = fingerprint(atoms)
            if mark in seen:
                left["seen before"] += 1
            elif extreme(atoms):
                left["extreme"] += 1
            else:
                seen.add(mark)
                parts[str(atoms.info["part"])].append(atoms)
    print("left out:", dict(left))
    return parts


def summary(parts: dict[str, list[Atoms]]) -> dict:
    """Counts by part, kind and element."""
    table = {}
    for part, frames in parts.items():
        kinds = collections.Counter(str(f.info["kind"]) for f in frames)
        elements = collections.Counter(s for f in frames for s in f.get_chemical_symbols())
        table[part] = {
            "structures": len(frames),
            "atoms": sum(len(f) for f in frames),
            "names": len({str(f.info["name"]) for f in frames}),
            "kinds": dict(kinds),
            "atoms_of_element": dict(elements),
            "force_rms": float(
                np.sqrt(np.mean(np.concatenate([f.get_forces() for f in frames]) ** 2))
            ),
        }
    return table


def main() -> None:
    """Read, choose, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    parts = kept(sorted(work.glob("chunks/*.xyz")))
    names = {part: {str(f.info["name"]) for f in frames} for part, frames in parts.items()}
    assert not names["train"] & (names["validation"] | names["test"]), "a molecule in two parts"
    for part, frames in parts.items():
        ase.io.write(work / f"{part}.xyz", frames, format="extxyz")
    text = json.dumps(summary(parts), indent=2)
    (work / "summary.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
