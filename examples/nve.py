"""Constant-energy dynamics of one molecule with a fine-tuned model: is the energy conserved?

    python examples/nve.py runs/demo/best_model.ckpt datasets/molecules_pbe0_test.xyz \
        --steps 2000 --timestep 0.5 --plot nve.png

Prints the drift (slope of a line through the total energy, per atom and picosecond) and the
largest departure from the start, and plots both. If the forces are the exact derivative of the
energy, only the integrator's error remains.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.io import read
from ase.md.velocitydistribution import Stationary, thermalize_momenta  # ASE 3.29 or newer
from ase.md.verlet import VelocityVerlet

from pet_finetune import PETCalculator


def run(atoms: Atoms, steps: int, timestep: float, temperature: float, seed: int) -> np.ndarray:
    """Total energy (eV) after every step, [steps + 1]."""
    thermalize_momenta(atoms, temperature, rng=np.random.default_rng(seed))
    Stationary(atoms)
    energies = []
    dynamics = VelocityVerlet(atoms, timestep * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()), interval=1)
    dynamics.run(steps)
    return np.array(energies[: steps + 1])


def draw(times: np.ndarray, per_atom: np.ndarray, drift: float, path: Path) -> None:
    """The total energy over time, in meV per atom from its start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(times, per_atom, linewidth=0.8)
    axes.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlabel("time (ps)")
    axes.set_ylabel("total energy − start (meV/atom)")
    axes.set_title(f"NVE, drift {drift:+.4f} meV/atom/ps")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("structure", help="a file that ASE reads; its first frame is used")
    parser.add_argument("--adapter", help="folder of an adapter of this checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K, at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--plot", type=Path, help="where to draw the energy")
    arguments = parser.parse_args()

    atoms = read(arguments.structure, index=0)
    atoms.calc = PETCalculator(
        arguments.model, adapter=arguments.adapter, dtype=arguments.dtype, device="cpu"
    )
    energies = run(
        atoms, arguments.steps, arguments.timestep, arguments.temperature, arguments.seed
    )
    per_atom = (energies - energies[0]) * 1000 / len(atoms)
    times = np.arange(len(energies)) * arguments.timestep / 1000
    drift = float(np.polyfit(times, per_atom, 1)[0])
    print(f"{atoms.get_chemical_formula()}, {arguments.steps} steps of {arguments.timestep} fs")
    print(f"drift: {drift:+.4f} meV/atom/ps")
    print(f"largest departure from the start: {np.abs(per_atom).max():.4f} meV/atom")
    print(f"temperature at the end: {atoms.get_temperature():.0f} K")
    if arguments.plot:
        draw(times, per_atom, drift, arguments.plot)
        print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
