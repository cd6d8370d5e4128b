"""ASE's integrators by the name of the ensemble, their conserved quantity, and their state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet

from .freedom import degrees_of_freedom
from .settings import MDSettings

__all__ = [
    "conserved_quantity",
    "integrator_state",
    "keeps_momentum",
    "make_integrator",
    "restore_integrator",
]

_RNG = "rng"


def keeps_momentum(settings: MDSettings) -> bool:
    """Whether the total momentum stays as it is; only Langevin's random forces change it."""
    return settings.thermostat != "langevin"


def make_integrator(
    atoms: Atoms, settings: MDSettings, rng: np.random.Generator
) -> MolecularDynamics:
    """The integrator of an ensemble.

    NVE is velocity Verlet. NVT is Langevin dynamics (E. Vanden-Eijnden and G. Ciccotti, Chem.
    Phys. Lett. 429, 310 (2006)), stochastic velocity rescaling (G. Bussi, D. Donadio and M.
    Parrinello, J. Chem. Phys. 126, 014101 (2007)) or a Nose-Hoover chain. NPT is that of Martyna,
    Tobias and Klein (J. Chem. Phys. 101, 4177 (1994)), which samples the true ensemble for cells
    of any shape and has a conserved quantity to judge it by.

    Args:
        atoms: with calculator and momenta.
        settings: with all defaults written out.
        rng: of the stochastic thermostats; the state of the run.
    """
    timestep = settings.timestep * units.fs
    if settings.ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    freedom = degrees_of_freedom(atoms, keeps_momentum(settings))
    if settings.thermostat == "langevin":
        assert settings.friction is not None
        return Langevin(
            atoms,
            timestep,
            temperature_K=settings.temperature,
            friction=settings.friction / (1000.0 * units.fs),
            fixcm=False,  # samples the right distribution; the other is deprecated in ASE
            rng=rng,
        )
    assert settings.thermostat_time is not None
    damping = settings.thermostat_time * units.fs
    if settings.thermostat == "bussi":
        dynamics = Bussi(atoms, timestep, settings.temperature, damping, rng=rng)
        # ASE counts 3N; the total momentum and, of a molecule, the angular one take no part.
        dynamics.ndof = freedom
        dynamics.target_kinetic_energy = 0.5 * freedom * units.kB * settings.temperature
        return dynamics
    # The chains of ASE count 3N too: the product of number and temperature is what they hold.
    held = settings.temperature * freedom / (3 * len(atoms))
    if settings.ensemble == "nvt":
        return NoseHooverChainNVT(atoms, timestep, temperature_K=held, tdamp=damping)
    assert settings.pressure is not None
    assert settings.barostat_time is not None
    barostat = IsotropicMTKNPT if settings.barostat == "isotropic" else MTKNPT
    return barostat(
        atoms,
        timestep,
        temperature_K=held,
        pressure_au=settings.pressure * units.GPa,
        tdamp=damping,
        pdamp=settings.barostat_time * units.fs,
    )


def conserved_quantity(dynamics: MolecularDynamics) -> float | None:
    """What a perfect integration would keep constant, in eV; None for Langevin, which has none.

    The total energy, with what thermostat and barostat hold and what they have given away.
    """
    if isinstance(dynamics, Langevin):
        return None
    if isinstance(dynamics, (NoseHooverChainNVT, IsotropicMTKNPT, MTKNPT)):
        return float(dynamics.get_conserved_energy())
    total = float(dynamics.atoms.get_total_energy())
    return total - dynamics.transferred_energy if isinstance(dynamics, Bussi) else total


def integrator_state(dynamics: MolecularDynamics, rng: np.random.Generator) -> dict[str, Any]:
    """All numbers of an integrator, its thermostat, its barostat and the random generator.

    They are arrays that numpy stores without pickles.
    """
    state = {name: np.asarray(value) for name, (_, _, value) in _numbers(dynamics).items()}
    state[_RNG] = np.asarray(json.dumps(rng.bit_generator.state))
    return state


def restore_integrator(
    dynamics: MolecularDynamics, rng: np.random.Generator, state: Mapping[str, Any]
) -> None:
    """Put back what :func:`integrator_state` took, into an integrator made in the same way.

    Raises:
        KeyError: the state is of another kind of integrator.
    """
    for name, (owner, attribute, value) in _numbers(dynamics).items():
        kept = state[name]
        setattr(owner, attribute, np.array(kept) if kept.ndim else type(value)(kept.item()))
    rng.bit_generator.state = json.loads(str(state[_RNG]))


def _numbers(owner: Any, prefix: str = "") -> dict[str, tuple[Any, str, Any]]:
    """Owner, name and value of each number and array of an object of ASE's and of its parts."""
    found: dict[str, tuple[Any, str, Any]] = {}
    for name, value in vars(owner).items():
        if isinstance(value, (int, float, np.number, np.ndarray)) and not isinstance(value, bool):
            found[prefix + name] = (owner, name, value)
        elif type(value).__module__.startswith("ase.md."):
            found |= _numbers(value, f"{prefix}{name}.")
    return found
