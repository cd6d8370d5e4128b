"""Make the small PBE0/def2-SVP data set of gas-phase molecules in ``datasets/``.

Three stages, each of which picks up what an interrupted run left in ``--workdir``:

1. sample: independent GFN2-xTB Langevin trajectories at 500 K (tblite), one file per trajectory;
2. label:  PBE0/def2-SVP energy and analytic gradient (PySCF), one file per frame;
3. export: ``molecules_pbe0_{train,val,test}.xyz`` and ``SHA256SUMS`` in ``--out``.

A trajectory belongs to exactly one split, so no two splits share frames that are correlated in
time. Energies are in eV and forces in eV/Angstrom.

Usage: ``OMP_NUM_THREADS=1 python make_molecules_pbe0.py --out datasets --workdir build/pbe0``
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.units import Bohr, Hartree, fs
from pyscf import dft, gto
from tblite.ase import TBLite

log = logging.getLogger("make_molecules_pbe0")

TEMPERATURE_K = 500.0
TIMESTEP_FS = 0.5
FRICTION_PER_FS = 0.01
EQUILIBRATION_FS = 1000.0
SPACING_FS = 250.0
# RMS difference of sorted interatomic distances below which two frames count as the same.
DUPLICATE_RMS_ANGSTROM = 0.02

XC = "pbe0"
BASIS = "def2-svp"
AUXILIARY_BASIS = "def2-svp-jkfit"
GRID_LEVEL = 3
SCF_TOLERANCE_HARTREE = 1e-10
SCF_GRADIENT_TOLERANCE = 1e-6

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Species:
    """A molecule, its name in ASE's G2 collection, and the trajectories of each split.

    ``trajectories`` maps a split to (number of trajectories, frames taken from each).
    """

    name: str
    g2_name: str
    trajectories: dict[str, tuple[int, int]]


SPECIES = (
    Species("ethanol", "CH3CH2OH", {"train": (4, 23), "val": (2, 11), "test": (2, 18)}),
    Species("acetaldehyde", "CH3CHO", {"train": (2, 15), "val": (1, 8), "test": (1, 12)}),
    Species("methylamine", "H3CNH2", {"train": (2, 15), "val": (1, 8), "test": (1, 12)}),
)


@dataclass(frozen=True)
class Trajectory:
    """One MD run: its number within the molecule, its random stream and its share of frames."""

    species: Species
    number: int
    split: str
    n_frames: int
    entropy: tuple[int, int, int]

    @property
    def label(self) -> str:
        """Name of the trajectory's file."""
        return f"{self.species.name}_t{self.number}"


def plan_trajectories(seed: int) -> list[Trajectory]:
    """All trajectories of the data set, each with a random stream of its own."""
    plan = []
    for species_index, species in enumerate(SPECIES):
        number = 0
        for split in SPLITS:
            n_trajectories, n_frames = species.trajectories[split]
            for _ in range(n_trajectories):
                entropy = (seed, species_index, number)
                plan.append(Trajectory(species, number, split, n_frames, entropy))
                number += 1
    return plan


def write_atomically(path: Path, frames: Atoms | Sequence[Atoms]) -> None:
    """Write extended XYZ such that ``path`` is either complete or absent."""
    partial = path.with_name(path.name + ".partial")
    ase.io.write(partial, frames, format="extxyz")
    os.replace(partial, path)


def fingerprint(atoms: Atoms) -> np.ndarray:
    """Interatomic distances sorted within each pair of elements.

    Unchanged by rotation, reflection and the exchange of equal atoms, such as the turn of a
    methyl group by 120 degrees.
    """
    rows, columns = np.triu_indices(len(atoms), k=1)
    distances = atoms.get_all_distances()[rows, columns]
    pairs = np.sort(np.stack([atoms.numbers[rows], atoms.numbers[columns]]), axis=0)
    return distances[np.lexsort((distances, pairs[1], pairs[0]))]


def is_duplicate(candidate: np.ndarray, accepted: Sequence[np.ndarray]) -> bool:
    """Whether ``candidate`` lies within the duplicate threshold of an accepted fingerprint."""
    if not accepted:
        return False
    rms = np.sqrt(np.mean((np.stack(accepted) - candidate) ** 2, axis=1))
    return bool(rms.min() < DUPLICATE_RMS_ANGSTROM)


def run_md(trajectory: Trajectory) -> Iterator[Atoms]:
    """Endless stream of decorrelated frames, centred on the centre of mass."""
    rng = np.random.default_rng(trajectory.entropy)
    atoms = molecule(trajectory.species.g2_name)
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    thermalize_momenta(atoms, TEMPERATURE_K, rng=rng)
    dynamics = Langevin(
        atoms,
        timestep=TIMESTEP_FS * fs,
        temperature_K=TEMPERATURE_K,
        friction=FRICTION_PER_FS / fs,
        # The molecule may drift, as frames are centred below; ASE's correction of the drift
        # would distort the canonical distribution of so few atoms.
        fixcm=False,
        rng=rng,
    )
    dynamics.run(round(EQUILIBRATION_FS / TIMESTEP_FS))
    sample = 0
    while True:
        dynamics.run(round(SPACING_FS / TIMESTEP_FS))
        # A bare copy: velocities and xTB results have no place in the data set.
        frame = Atoms(atoms.symbols, atoms.positions - atoms.get_center_of_mass())
        frame.info = {
            "molecule": trajectory.species.name,
            "trajectory": trajectory.number,
            "frame": sample,
            "temperature": TEMPERATURE_K,
        }
        yield frame
        sample += 1


def sample_trajectory(trajectory: Trajectory, accepted: list[np.ndarray]) -> list[Atoms]:
    """Frames of one trajectory, none a near-duplicate of another or of those in ``accepted``.

    A rejected frame leaves a gap in the ``frame`` numbers, so that rejections can be counted.
    """
    frames: list[Atoms] = []
    for frame in run_md(trajectory):
        candidate = fingerprint(frame)
        if is_duplicate(candidate, accepted):
            log.info("%s: sample %d is a near-duplicate", trajectory.label, frame.info["frame"])
            continue
        accepted.append(candidate)
        frames.append(frame)
        if len(frames) == trajectory.n_frames:
            break
    return frames


def sample(plan: Sequence[Trajectory], folder: Path) -> dict[str, list[Atoms]]:
    """Geometries of every trajectory by its label, read from ``folder`` where already there."""
    folder.mkdir(parents=True, exist_ok=True)
    accepted: dict[str, list[np.ndarray]] = {species.name: [] for species in SPECIES}
    geometries = {}
    for trajectory in plan:
        path = folder / f"{trajectory.label}.xyz"
        known = accepted[trajectory.species.name]
        if path.exists():
            known.extend(fingerprint(frame) for frame in ase.io.read(path, index=":"))
        else:
            start = time.perf_counter()
            write_atomically(path, sample_trajectory(trajectory, known))
            log.info("%s: sampled in %.0f s", trajectory.label, time.perf_counter() - start)
        # Always from the file, so that labels belong to the coordinates as written.
        geometries[trajectory.label] = ase.io.read(path, index=":")
    return geometries


def pbe0(atoms: Atoms) -> dft.rks.RKS:
    """Converged density-fitted PBE0/def2-SVP calculation of a closed-shell neutral molecule."""
    # Bohr by ASE's constant: PySCF's own differs in the tenth digit.
    geometry = [(atom.symbol, atom.position / Bohr) for atom in atoms]
    mol = gto.M(atom=geometry, unit="Bohr", basis=BASIS, verbose=0)
    calculation = dft.RKS(mol, xc=XC).density_fit(auxbasis=AUXILIARY_BASIS)
    calculation.grids.level = GRID_LEVEL
    calculation.conv_tol = SCF_TOLERANCE_HARTREE
    calculation.conv_tol_grad = SCF_GRADIENT_TOLERANCE
    calculation.kernel()
    if not calculation.converged:
        raise RuntimeError(f"SCF did not converge for {atoms.info}")
    return calculation


def label_frame(atoms: Atoms) -> Atoms:
    """Copy of ``atoms`` that carries the PBE0 energy (eV) and forces (eV/Angstrom)."""
    calculation = pbe0(atoms)
    gradient = calculation.nuc_grad_method()
    # With the response of the integration grid the forces are the exact derivative of the
    # computed energy, and their sum vanishes.
    gradient.grid_response = True
    forces = -gradient.kernel() * (Hartree / Bohr)
    labelled = atoms.copy()
    labelled.calc = SinglePointCalculator(
        labelled, energy=float(calculation.e_tot * Hartree), forces=forces
    )
    return labelled


def label_path(folder: Path, frame: Atoms) -> Path:
    """File of the labels of ``frame``."""
    info = frame.info
    return folder / f"{info['molecule']}_t{info['trajectory']}_f{info['frame']:03d}.xyz"


def label(geometries: dict[str, list[Atoms]], folder: Path) -> None:
    """Label all frames that have no file in ``folder`` yet, in turn over the trajectories."""
    folder.mkdir(parents=True, exist_ok=True)
    depth = max(len(frames) for frames in geometries.values())
    # Round-robin, so that the labels of an unfinished run cover every molecule and split.
    queue = [frames[i] for i in range(depth) for frames in geometries.values() if i < len(frames)]
    for done, frame in enumerate(queue, start=1):
        path = label_path(folder, frame)
        if path.exists():
            continue
        start = time.perf_counter()
        write_atomically(path, label_frame(frame))
        elapsed = time.perf_counter() - start
        log.info("%d/%d %s: labelled in %.1f s", done, len(queue), path.stem, elapsed)


def export(
    plan: Sequence[Trajectory], geometries: dict[str, list[Atoms]], labels: Path, out: Path
) -> None:
    """Write the three splits and their checksums to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    checksums = []
    for split in SPLITS:
        frames = [
            ase.io.read(label_path(labels, frame))
            for trajectory in plan
            if trajectory.split == split
            for frame in geometries[trajectory.label]
        ]
        path = out / f"molecules_pbe0_{split}.xyz"
        write_atomically(path, frames)
        checksums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
        log.info("%s: %d frames", path.name, len(frames))
    (out / "SHA256SUMS").write_text("".join(checksums), encoding="ascii")


def main() -> None:
    """Run the three stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished files")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of resumable results")
    parser.add_argument("--seed", type=int, default=2024, help="seed of all trajectories")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    # A seed of its own per folder: results of different seeds must never mix.
    workdir = args.workdir / f"seed{args.seed}"
    plan = plan_trajectories(args.seed)
    geometries = sample(plan, workdir / "geometries")
    label(geometries, workdir / "labels")
    export(plan, geometries, workdir / "labels", args.out)


if __name__ == "__main__":
    main()
