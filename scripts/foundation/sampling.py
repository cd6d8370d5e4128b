"""The kinds of structures of the foundation's data, each as a function of a random generator.

``reach`` says how far the single geometries are from the minimum, see :mod:`shapes`; the closeness
of clusters and collisions and the temperatures of dynamics are drawn, each from a range.
Every function gives a name (the molecule, or the composition of a cluster or box) and its labelled
structures. ``info`` holds ``kind``, ``name`` and, for dynamics, ``temperature``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from fragments import ELEMENTS, PARTNERS
from labels import MAX_FORCE, WALL_FORCE, label, tight_binding
from molecules import conformer, grow, read_smiles, to_atoms
from rdkit.Chem import Mol
from shapes import beside, boxed, rattled, rotated, stretched, thermal

__all__ = ["KINDS", "MANY", "box", "cluster", "collision", "dimers", "molecule", "shapes"]

TIMESTEP = 0.7  # fs
DISTANCES = np.concatenate([np.arange(0.6, 3.0, 0.1), np.arange(3.0, 6.01, 0.3)])
Labelled = tuple[str, list[Atoms]]


def molecule(rng: np.random.Generator, reach: float) -> Labelled:
    """One grown molecule: dynamics, normal modes, torsions, a rattled and a stretched geometry."""
    smiles = grow(rng)
    shape = conformer(smiles, rng)
    if shape is None:
        return smiles, []
    start = to_atoms(shape)
    frames = list(dynamics(start, temperature(rng), 40, 10, rng))
    frames += labelled(singles(shape, reach, rng))
    return smiles, named(frames, smiles)


def shapes(rng: np.random.Generator, reach: float) -> Labelled:
    """One grown molecule without dynamics, whose fifty steps cost more than eight geometries."""
    smiles = grow(rng)
    shape = conformer(smiles, rng)
    if shape is None:
        return smiles, []
    geometries = singles(shape, reach, rng)
    geometries += [("modes", thermal(shape, temperature(rng), 1.0, rng)) for _ in range(2)]
    geometries += [("torsion", thermal(rotated(shape, rng), temperature(rng), reach, rng))]
    return smiles, named(labelled(geometries), smiles)


def singles(shape: Mol, reach: float, rng: np.random.Generator) -> list[tuple[str, Atoms | None]]:
    """Geometries of one molecule worth a single point each."""
    return [
        ("modes", thermal(shape, temperature(rng), reach, rng)),
        ("modes", thermal(shape, temperature(rng), reach, rng)),
        ("torsion", thermal(rotated(shape, rng), 300.0, reach, rng)),
        ("rattled", rattled(to_atoms(shape), reach, rng)),
        ("stretched", stretched(shape, reach, rng)),
    ]


def cluster(rng: np.random.Generator, reach: float) -> Labelled:
    """Two to six small molecules in contact, or one grown molecule with one or two small ones."""
    if rng.random() < 0.4:
        smiles = [grow(rng, 8), *partners(int(rng.integers(1, 3)), rng)]
    else:
        smiles = partners(int(rng.integers(2, 7)), rng)
    return together(smiles, float(rng.uniform(0.75, 1.3)), rng, temperature(rng), "cluster")


def collision(rng: np.random.Generator, reach: float) -> Labelled:
    """Two small molecules pressed into each other and left to heat: walls and reactions."""
    smiles = partners(2, rng) if rng.random() < 0.6 else [grow(rng, 7), *partners(1, rng)]
    closeness = float(rng.uniform(0.35, 0.7))
    return together(smiles, closeness, rng, float(rng.uniform(800, 1500)), "collision")


def box(rng: np.random.Generator, reach: float) -> Labelled:
    """A small periodic box of a liquid or a mixture, or a cell of one or two molecules."""
    kinds = partners(int(rng.choice(3, p=(0, 0.7, 0.3))), rng)
    if rng.random() < 0.35:
        kinds = ["O"]
    per_kind = max(1, round(float(rng.uniform(8, 28)) / sum(size_of(s) for s in kinds)))
    smiles = [name for name in kinds for _ in range(per_kind)]
    name = "box " + ".".join(sorted(set(smiles)))
    shapes = [conformer(s, rng) for s in smiles]
    if any(shape is None for shape in shapes):
        return name, []
    start = boxed([to_atoms(s) for s in shapes], float(rng.uniform(0.7, 1.15)), rng)
    if start is None:
        return name, []
    # A single point in a cell costs as much as fifty without one, so few and close together.
    frames = list(dynamics(start, temperature(rng), 15, 5, rng))
    for frame in list(frames[-1:]):
        strained = rattled(frame, reach, rng)
        strain = 0.04 * reach * rng.normal(size=(3, 3))
        strained.set_cell(
            frame.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True
        )
        frames += labelled([("strained", strained)])
    return name, named(frames, name, "box")


def dimers() -> Labelled:
    """All pairs of elements from 0.6 to 6 Angstrom, and the atoms alone; the same at each call.

    Where the force stays below ``labels.WALL_FORCE``.
    """
    pairs = [(a, b) for i, a in enumerate(ELEMENTS) for b in ELEMENTS[i:]]
    shapes = [("atom", Atoms(symbol)) for symbol in ELEMENTS]
    shapes += [
        ("dimer", Atoms([a, b], [[0, 0, 0], [0, 0, distance]]))
        for a, b in pairs
        for distance in DISTANCES
    ]
    return "dimers", named(labelled(shapes, WALL_FORCE), "dimers")


def temperature(rng: np.random.Generator) -> float:
    """200 to 1500 K, as many below as above 550 K."""
    return float(np.exp(rng.uniform(np.log(200), np.log(1500))))


def partners(count: int, rng: np.random.Generator) -> list[str]:
    return [read_smiles(str(s)) for s in rng.choice(PARTNERS, size=count)]


def size_of(smiles: str) -> int:
    shape = conformer(smiles, np.random.default_rng(0))
    return 99 if shape is None else shape.GetNumAtoms()


def together(
    smiles: list[str], closeness: float, rng: np.random.Generator, kelvin: float, kind: str
) -> Labelled:
    name = ".".join(sorted(smiles))
    shapes = [conformer(s, rng) for s in smiles]
    if any(shape is None for shape in shapes):
        return name, []
    start = beside([to_atoms(shape) for shape in shapes], closeness, rng)
    if len(start) > 36:
        return name, []
    frames = labelled([("start", start)]) + list(dynamics(start, kelvin, 48, 12, rng))
    return name, named(frames, name, kind)


def dynamics(
    atoms: Atoms, kelvin: float, steps: int, every: int, rng: np.random.Generator
) -> Iterator[Atoms]:
    """Langevin dynamics with the labels' own method; what comes after a failure is left out."""
    moving = atoms.copy()
    if int(moving.numbers.sum()) % 2:
        moving.set_initial_magnetic_moments([1.0] + [0.0] * (len(moving) - 1))
    moving.calc = tight_binding()
    MaxwellBoltzmannDistribution(moving, temperature_K=kelvin, rng=rng)
    friction = 0.02 / units.fs
    run = Langevin(
        moving, TIMESTEP * units.fs, temperature_K=kelvin, friction=friction, fixcm=False, rng=rng
    )
    for _ in range(steps // every):
        try:
            run.run(every)
        except (CalculationFailed, RuntimeError):
            return
        if not np.isfinite(moving.positions).all() or np.abs(moving.get_forces()).max() > MAX_FORCE:
            return
        frame = label(moving, moving.calc)
        if frame is not None:
            frame.info |= {"sampling": "dynamics", "temperature": round(kelvin)}
            yield frame


def labelled(
    shapes: Iterable[tuple[str, Atoms | None]], max_force: float = MAX_FORCE
) -> list[Atoms]:
    done = []
    for how, atoms in shapes:
        frame = None if atoms is None else label(atoms, max_force=max_force)
        if frame is not None:
            frame.info["sampling"] = how
            done.append(frame)
    return done


def named(frames: list[Atoms], name: str, kind: str | None = None) -> list[Atoms]:
    for frame in frames:
        frame.info |= {"name": name, "kind": kind or ("dimers" if name == "dimers" else "molecule")}
    return frames


Kinds = tuple[tuple[float, Callable[[np.random.Generator, float], Labelled]], ...]
# How often each kind is drawn. A dimer is not drawn: all are made once, in the first chunk.
KINDS: Kinds = ((0.76, molecule), (0.14, cluster), (0.08, collision), (0.02, box))
# For more molecules in the same time.
MANY: Kinds = ((0.88, shapes), (0.08, cluster), (0.04, collision))
