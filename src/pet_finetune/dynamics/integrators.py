"""Settings of a simulation, and ASE's integrators, temperatures and degrees of freedom."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms, constraints, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet

from pet_finetune.errors import did_you_mean

ENSEMBLES = ("nve", "nvt", "npt")
#: Of ``nvt``; the barostats bring a Nose-Hoover chain of their own.
THERMOSTATS = ("langevin", "bussi", "nose-hoover")
BAROSTATS = ("isotropic", "full")
VELOCITIES = ("auto", "keep", "new")

_LONGEST_STEP = 5.0  # fs
_FRICTION = 10.0  # 1/ps
_THERMOSTAT_TIME = 100.0  # fs
_BAROSTAT_TIME = 1000.0  # fs


@dataclass(frozen=True)
class MDSettings:
    """Settings of a simulation; None takes the default in the command line's help.

    Attributes:
        ensemble: ``nve``, ``nvt`` or ``npt``.
        temperature: K; of ``nve`` that of the initial velocities.
        steps: in all, those before a restart included.
        timestep: fs.
        thermostat: of ``nvt``: ``langevin``, ``bussi`` or ``nose-hoover``.
        friction: of ``langevin``, 1/ps.
        thermostat_time: relaxation time of the other thermostats, fs.
        pressure: of ``npt``, GPa.
        barostat: of ``npt``: ``isotropic`` keeps the shape of the cell, ``full`` does not.
        barostat_time: of ``npt``, fs.
        seed: of velocities and stochastic thermostats.
        every: steps between two frames and rows of the log.
        velocities: ``auto`` (those of the file, else new ones), ``keep`` or ``new``.
        minimize: relaxation steps before the first velocities.
        stop_uncertainty: largest ``forces_uncertainty`` of an atom at which the run ends, eV/A.
        max_temperature: K; above it the run is taken for exploded.
    """

    ensemble: str = "nvt"
    temperature: float = 300.0
    steps: int = 10000
    timestep: float = 0.5
    thermostat: str | None = None
    friction: float | None = None
    thermostat_time: float | None = None
    pressure: float | None = None
    barostat: str | None = None
    barostat_time: float | None = None
    seed: int | None = None
    every: int = 10
    velocities: str = "auto"
    minimize: int = 0
    stop_uncertainty: float | None = None
    max_temperature: float | None = None

    def __post_init__(self) -> None:
        """Make plain numbers of NumPy's, for the record of the run."""
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())

    def problems(self) -> list[str]:
        """Problems of the settings, one line each."""
        return [*self._names(), *self._numbers(), *self._clashes()]

    def _names(self) -> list[str]:
        allowed = {
            "ensemble": ENSEMBLES,
            "thermostat": THERMOSTATS,
            "barostat": BAROSTATS,
            "velocities": VELOCITIES,
        }
        given = {name: getattr(self, name) for name in allowed}
        return [
            f"--{name}: expected one of {', '.join(allowed[name])}, got '{value}'."
            f"{did_you_mean(value, allowed[name])}"
            for name, value in given.items()
            if value is not None and value not in allowed[name]
        ]

    def _numbers(self) -> list[str]:
        found = []
        for name in ("timestep", "friction", "thermostat_time", "barostat_time",
                     "stop_uncertainty", "max_temperature"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"{_option(name)}: expected a number above 0, got {value:g}.")
        for name, least in (("steps", 1), ("every", 1), ("minimize", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                found.append(f"--{name}: expected {least} or more, a whole number, got {value}.")
        if self.seed is not None and self.seed < 0:
            found.append(f"--seed: expected 0 or more, got {self.seed}.")
        if self.pressure is not None and not math.isfinite(self.pressure):
            found.append(f"--pressure: expected a number in GPa, got {self.pressure}.")
        if not 0 <= self.temperature < math.inf:
            found.append(f"--temperature: expected 0 K or more, got {self.temperature:g}.")
        elif self.temperature == 0 and self.ensemble in ("nvt", "npt"):
            found.append(f"--temperature: {self.ensemble} needs one above 0 K.")
        if _LONGEST_STEP < self.timestep < math.inf:
            found.append(
                f"--timestep: {self.timestep:g} fs is too long for any material: bonds with "
                "hydrogen vibrate every 10 fs, others every 20 to 100. Take 0.5 fs with hydrogen, "
                f"1 to 2 fs without; at most {_LONGEST_STEP:g}."
            )
        return found

    def _clashes(self) -> list[str]:
        """Settings of one ensemble or thermostat that were given with another."""
        thermostat = "nose-hoover" if self.ensemble == "npt" else self.thermostat or "langevin"
        unused = {
            "thermostat": self.ensemble == "nve"
            or (self.ensemble == "npt" and self.thermostat != "nose-hoover"),
            "friction": self.ensemble == "nve" or thermostat != "langevin",
            "thermostat_time": self.ensemble == "nve" or thermostat == "langevin",
            "pressure": self.ensemble != "npt",
            "barostat": self.ensemble != "npt",
            "barostat_time": self.ensemble != "npt",
        }
        chosen = f"--ensemble {self.ensemble}"
        if self.ensemble == "nvt":
            chosen += f" --thermostat {thermostat}"
        elif self.ensemble == "npt":
            chosen += ", whose thermostat is a Nose-Hoover chain,"
        return [
            f"{_option(name)}: {chosen} does not use it. Leave it out, or choose what does."
            for name, idle in unused.items()
            if idle and getattr(self, name) is not None and self.ensemble in ENSEMBLES
        ]

    def warnings(self, with_hydrogen: bool) -> list[str]:
        """Warnings about unusual settings, one line each."""
        if with_hydrogen and 2.0 < self.timestep <= _LONGEST_STEP:
            return [
                f"--timestep {self.timestep:g} fs is long for hydrogen, whose bonds vibrate every "
                "10 fs: energy will not be conserved. Take 0.5 to 1 fs."
            ]
        return []

    def filled(self, seed: int) -> MDSettings:
        """Settings with all defaults, for the file that a restart reads."""
        changes: dict[str, Any] = {"seed": seed if self.seed is None else self.seed}
        if self.ensemble == "nvt":
            changes["thermostat"] = self.thermostat or "langevin"
        if self.ensemble == "npt":
            changes["pressure"] = 0.0 if self.pressure is None else self.pressure
            changes["barostat"] = self.barostat or "isotropic"
            changes["barostat_time"] = self.barostat_time or _BAROSTAT_TIME
        if changes.get("thermostat") == "langevin":
            changes["friction"] = self.friction or _FRICTION
        elif self.ensemble != "nve":
            changes["thermostat_time"] = self.thermostat_time or _THERMOSTAT_TIME
        if self.max_temperature is None:
            changes["max_temperature"] = max(10.0 * self.temperature, 2000.0)
        return replace(self, **changes)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


#: Constraints whose effect on momenta ASE's integrators carry out and count.
_KINDS = ("FixAtoms", "FixCartesian", "FixScaled", "FixedPlane", "FixedLine", "FixedMode",
          "FixCom", "FixSubsetCom", "FixBondLengths", "FixInternals", "FixLinearTriatomic",
          "Hookean")  # fmt: skip
_OF_SINGLE = (constraints.FixAtoms, constraints.FixCartesian)


def constraint_problems(atoms: Atoms, simulated: bool = True) -> list[str]:
    """Problems of the constraints, one line each."""
    kinds = sorted({type(c).__name__ for c in atoms.constraints} - {*_KINDS})
    if simulated and kinds:
        return [
            f"the constraints {', '.join(kinds)} are for relaxations: ASE's integrators do not "
            f"keep them, or cannot count them. Take them out; those that can be simulated are "
            f"{', '.join(_KINDS)}."
        ]
    modes = (c.mode for c in atoms.constraints if isinstance(c, constraints.FixedMode))
    moved = [np.abs(mode.reshape(-1, 3)).max(axis=1) > 1e-12 for mode in modes]
    if simulated and any(np.ptp(atoms.get_masses()[some]) > 1e-6 for some in moved):
        return [
            "the constraint FixedMode holds together atoms of several masses, and ASE takes the "
            "same part from momenta as from positions, which heats them. Take it out."
        ]
    if len(atoms.constraints) < 2:
        return []
    probe = atoms.copy()
    probe.set_momenta(np.random.default_rng(0).standard_normal((len(atoms), 3)))
    once = probe.get_momenta()
    probe.set_momenta(once)
    if np.abs(probe.get_momenta() - once).max() < 1e-6:
        return []
    names = ", ".join(type(c).__name__ for c in atoms.constraints)
    return [
        f"the constraints ({names}) act on the same atoms, and ASE applies one after the other, so "
        "that none of them would hold exactly. Leave one of them out."
    ]


def degrees_of_freedom(atoms: Atoms, momentum_kept: bool) -> int:
    """Number of degrees of freedom in the kinetic energy.

    3N, less those that constraints take, less the motions of the whole that nothing changes: for
    free atoms 3 translations, and of a structure that is not periodic 3 rotations (2 of a linear
    one), where nothing (such as Langevin's random forces) changes the total momentum. ASE's
    ``Atoms.get_temperature`` counts 3N less the constraints, which makes a molecule of nine atoms
    at rest 22 % too cold.
    """
    fixed = np.zeros((len(atoms), 3), dtype=bool)
    removed = 0
    for constraint in atoms.constraints:
        if isinstance(constraint, _OF_SINGLE):
            mask = getattr(constraint, "mask", np.ones(3, dtype=bool))
            fixed[constraint.index] |= mask  # one coordinate may be fixed twice
        elif isinstance(constraint, constraints.FixedMode):
            removed += 1  # ASE says one for each atom
        else:
            removed += int(constraint.get_removed_dof(atoms))
    left = 3 * len(atoms) - int(fixed.sum()) - removed
    if momentum_kept and len(atoms) > 1:
        left -= _kept_motions(atoms).shape[1]
    return max(left, 0)


def _kept_motions(atoms: Atoms) -> np.ndarray:
    """Motions of the whole whose momentum is conserved, ``[3N, k]``, orthonormal, mass-weighted.

    They are the translations, and rotations where nothing is periodic, that the constraints allow:
    forces between atoms do no work along them, and those of constraints neither.
    """
    count, weights = len(atoms), np.sqrt(atoms.get_masses())[:, None]
    springs = [c.todict() for c in atoms.constraints if isinstance(c, constraints.Hookean)]
    # One that holds an atom to a place rather than to another atom.
    if any(not isinstance(s["kwargs"]["a2"], (int, np.integer)) for s in springs):
        return np.zeros((3 * count, 0))
    axes = np.eye(3)
    velocities = [np.broadcast_to(axis, (count, 3)) for axis in axes]
    if not atoms.pbc.any():
        arms = atoms.positions - atoms.get_center_of_mass()
        scale = max(float(np.abs(arms).max()), 1e-9)
        velocities += [np.cross(axis, arms / scale) for axis in axes]
    motions = np.stack([(velocity * weights).ravel() for velocity in velocities], axis=1)
    left, sizes, _ = np.linalg.svd(motions, full_matrices=False)
    rigid = left[:, sizes > 1e-3 * sizes[0]]  # of a linear molecule one rotation moves nothing
    if not atoms.constraints:
        return rigid
    probe = atoms.copy()
    changes = []
    for motion in rigid.T:
        probe.set_momenta(motion.reshape(count, 3) * weights)
        changes.append((probe.get_momenta() / weights).ravel() - motion)
    _, sizes, right = np.linalg.svd(np.stack(changes, axis=1), full_matrices=False)
    kept: np.ndarray = rigid @ right[sizes < 1e-6].T
    return kept


def temperature(atoms: Atoms, freedom: int) -> float:
    """Kinetic temperature in K."""
    return float(2.0 * atoms.get_kinetic_energy() / (max(freedom, 1) * units.kB))


def draw_velocities(atoms: Atoms, wanted: float, rng: np.random.Generator) -> None:
    """Maxwell-Boltzmann momenta that obey the constraints, at exactly ``wanted``.

    Motions of the whole that nothing would change are taken out.
    """
    weights = np.sqrt(atoms.get_masses())[:, None]
    drawn = rng.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * wanted)
    atoms.set_momenta(drawn * weights)
    if len(atoms) > 1:
        motions = _kept_motions(atoms)
        momenta = (atoms.get_momenta() / weights).ravel()
        momenta -= motions @ (motions.T @ momenta)
        atoms.set_momenta(momenta.reshape(-1, 3) * weights, apply_constraint=False)
    found = temperature(atoms, degrees_of_freedom(atoms, momentum_kept=True))
    if found > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(wanted / found), apply_constraint=False)


_RNG = "rng"


def keeps_momentum(settings: MDSettings) -> bool:
    """Whether the total momentum is conserved; only Langevin's random forces change it."""
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
    """Conserved quantity of the integrator, in eV; None for Langevin, which has none.

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
