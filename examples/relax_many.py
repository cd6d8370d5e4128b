"""Many molecules relaxed in one batch, with torch-sim (extra ``torch-sim``).

    python examples/relax_many.py checkpoints/pet-xtb-s.ckpt --count 200

Takes molecules of ASE's G2 set that are made of H, C, N and O, each several times with its atoms
displaced at random, relaxes all together, and prints how many converged and their energies.
``--alone`` relaxes them one after the other with ASE's FIRE instead, for comparison.
``pet-finetune relax`` does this for the structures of a file, without torch-sim.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.collections import g2
from ase.optimize import FIRE

from pet_finetune import PETCalculator


def molecules(count: int) -> list[Atoms]:
    """So many molecules of 6 to 15 atoms, no two the same."""
    names = [
        name for name in g2.names
        if set(g2[name].symbols) <= set("HCNO") and 6 <= len(g2[name]) <= 15
        and g2[name].get_initial_magnetic_moments().sum() == 0
    ]  # fmt: skip
    made = []
    for number in range(count):
        name = names[number % len(names)]
        atoms = molecule(name)
        atoms.info["name"] = name
        atoms.rattle(0.05, seed=number)
        made.append(atoms)
    return made


def relax_together(model: str, structures: list[Atoms], fmax: float, steps: int) -> list[Atoms]:
    """All in one batch, from which those at rest are taken out."""
    import torch_sim as ts

    from pet_finetune.torch_sim import PETTorchSimModel

    network = PETTorchSimModel(model)
    final = ts.optimize(
        ts.io.atoms_to_state(structures, network.device, network.dtype),
        network,
        optimizer=ts.optimizers.fire,
        convergence_fn=ts.runners.generate_force_convergence_fn(fmax, include_cell_forces=False),
        autobatcher=ts.InFlightAutoBatcher(
            network, memory_scales_with="n_atoms", max_memory_scaler=2000
        ),
        max_steps=steps,
        steps_between_swaps=1,
    )
    return ts.io.state_to_atoms(final)


def relax_alone(model: str, structures: list[Atoms], fmax: float, steps: int) -> list[Atoms]:
    """One after the other."""
    calculator = PETCalculator(model)
    for atoms in structures:
        atoms.calc = calculator
        FIRE(atoms, logfile=None).run(fmax=fmax, steps=steps)
    return structures


def main() -> None:
    """Relax, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a checkpoint, or the name of one")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--fmax", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--alone", action="store_true", help="one after the other, with ASE")
    arguments = parser.parse_args()
    structures = molecules(arguments.count)
    names = [atoms.info["name"] for atoms in structures]
    relax = relax_alone if arguments.alone else relax_together
    began = time.process_time()
    relaxed = relax(arguments.model, structures, arguments.fmax, arguments.steps)
    took = time.process_time() - began

    calculator = PETCalculator(arguments.model)
    energies, at_rest = defaultdict(list), 0
    for name, atoms in zip(names, relaxed, strict=True):
        atoms.calc = calculator
        energies[name].append(atoms.get_potential_energy())
        at_rest += bool(np.linalg.norm(atoms.get_forces(), axis=1).max() < 1.01 * arguments.fmax)
    for name, values in energies.items():
        print(f"{name}: {min(values):.3f} eV, {1000 * np.ptp(values):.0f} meV apart at most")
    print(f"{at_rest} of {len(relaxed)} at rest; {took:.1f} s of processor time")


if __name__ == "__main__":
    main()
