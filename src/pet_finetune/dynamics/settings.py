"""What a simulation is asked to do, and what of it cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

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
    """How to move the atoms; what is None takes the default that the command line's help names.

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

    def problems(self) -> list[str]:
        """What is wrong with the settings by themselves, one line each."""
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
            if getattr(self, name) < least:
                found.append(f"--{name}: expected {least} or more, got {getattr(self, name)}.")
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
        """What may be meant but seldom ends well, one line each."""
        if with_hydrogen and 2.0 < self.timestep <= _LONGEST_STEP:
            return [
                f"--timestep {self.timestep:g} fs is long for hydrogen, whose bonds vibrate every "
                "10 fs: energy will not be conserved. Take 0.5 to 1 fs."
            ]
        return []

    def filled(self, seed: int) -> MDSettings:
        """The same with every default written out, for the file that a restart reads."""
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
