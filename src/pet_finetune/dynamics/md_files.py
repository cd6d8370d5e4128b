"""Files of a simulation: trajectory, log, state for a restart."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune.errors import DynamicsError, damage_explained
from pet_finetune.files import make_writable, replacing, write_whole, writing_explained
from pet_finetune.log import get_logger

from .carried import carried, from_ase, to_traj
from .measure import Measurement

_logger = get_logger(__name__)

TRAJECTORY = "trajectory.xyz"
TABLE = "md.csv"
#: Columns of the log that every run has.
_NEEDED = ("step", "time_fs", "temperature_K")
STATE = "state.npz"
START = "start.traj"
FINAL = "final.xyz"
STOPPED = "stopped.xyz"
SETTINGS = "md.json"
RESULTS = "results.json"
PLOT = "md.svg"
LOG = "md.log"
#: Entry of the settings: what the file of the start was when it was written.
_START_DIGEST = "start_sha256"

#: Columns of the log; those that a structure or model does not have are left out.
_COLUMNS = {
    "step": "step",
    "time_fs": "time",
    "potential_eV": "potential",
    "kinetic_eV": "kinetic",
    "total_eV": "total",
    "conserved_eV": "conserved",
    "temperature_K": "temperature",
    "volume_A3": "volume",
    "pressure_GPa": "pressure",
    "energy_uncertainty_eV": "energy_uncertainty",
    "max_forces_uncertainty_eV_A": "forces_uncertainty",
}


class MDFiles:
    """Writes and reads the files of one simulation.

    Trajectory and log only grow. The state says how long they were when it was saved, so that
    one that goes on cuts off what came after, and the files end as those of a run that never
    stopped.

    Raises:
        DynamicsError: it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._template: Atoms | None = None
        make_writable(folder, DynamicsError)

    @classmethod
    def existing(cls, folder: Path) -> MDFiles:
        """Files of an existing run; nothing is created."""
        if not (folder / STATE).is_file():
            raise DynamicsError(
                f"--restart: '{folder}' holds no {STATE}, so there is nothing to continue. "
                "Name the output folder of a run of `pet-finetune md`."
            )
        return cls(folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @staticmethod
    def check_free(folder: Path) -> None:
        """Make sure that a new run in ``folder`` overwrites no older one."""
        if any((folder / name).exists() for name in (STATE, TRAJECTORY, TABLE)):
            how = f"go on with that one: --restart {folder}"
            if not (folder / STATE).exists():
                how = f"remove it: it was ended before it had saved its {STATE}"
            raise DynamicsError(
                f"The output folder '{folder}' holds a simulation already. Choose another with "
                f"-o FOLDER, or {how}."
            )

    def write(self, name: str, text: str) -> None:
        """Write a text file in one step: it is whole or as it was."""
        with writing_explained(self.folder, DynamicsError):
            write_whole(self / name, text)

    def write_start(self, atoms: Atoms, settings: Mapping[str, Any]) -> None:
        """Keep what the run starts from: the structure with all it carries, and settings."""
        with writing_explained(self.folder, DynamicsError):
            with replacing(self / START) as partial:
                ase.io.write(partial, to_traj(atoms), format="traj")
            digest = sha256((self / START).read_bytes()).hexdigest()  # the format has no checksum
        settings = {**settings, _START_DIGEST: digest}
        self.write(SETTINGS, json.dumps(settings, indent=2) + "\n")

    def read_start(self) -> tuple[Atoms, dict[str, Any]]:
        """Start written by :meth:`write_start`."""
        try:
            settings: dict[str, Any] = json.loads((self / SETTINGS).read_text(encoding="utf-8"))
            digest = sha256((self / START).read_bytes()).hexdigest()
            if settings.pop(_START_DIGEST, digest) != digest:
                raise DynamicsError(f"the checksum of {START} differs")
            atoms = ase.io.read(self / START)
            assert isinstance(atoms, Atoms)
            atoms = from_ase(atoms, str(self / START))
        except Exception as error:  # ASE's reader raises whatever it meets
            raise DynamicsError(
                f"'{self.folder}' cannot be gone on with: {START} and {SETTINGS} cannot be read "
                f"({error}). Start a new run, from {FINAL} or the last frame of {TRAJECTORY}."
            ) from error
        return atoms, settings

    def frame(self, atoms: Atoms, row: Measurement | None = None) -> Atoms:
        """A structure as it is written: what was computed for it, and what it has carried along.

        What was left out of it is said once.
        """
        if self._template is None:
            self._template, left = carried(atoms)
            if left:
                _logger.info(
                    "%s are not written into the frames: they were computed for the start, or "
                    "extended XYZ cannot hold them; %s has them",
                    ", ".join(left),
                    START,
                )
        out = self._template.copy()
        out.set_cell(atoms.cell, apply_constraint=False)
        out.positions = atoms.positions
        out.set_momenta(atoms.get_momenta(), apply_constraint=False)
        if row is not None:
            out.info |= {"step": row.step, "time_fs": row.time, "temperature_K": row.temperature}
        results = {} if atoms.calc is None else atoms.calc.results
        if "forces_uncertainty" in results:
            out.arrays["forces_uncertainty"] = np.array(results["forces_uncertainty"])
        if "energy_uncertainty" in results:
            out.info["energy_uncertainty"] = results["energy_uncertainty"]
        kept = {name: results[name] for name in ("energy", "forces", "stress") if name in results}
        out.calc = SinglePointCalculator(out, **kept)
        return out

    def add(self, row: Measurement, atoms: Atoms) -> None:
        """Add a row to the log and a frame to the trajectory; a heading comes with the first."""
        values = {name: getattr(row, attribute) for name, attribute in _COLUMNS.items()}
        cells = {name: _cell(value) for name, value in values.items() if value is not None}
        with (
            writing_explained(self.folder, DynamicsError),
            (self / TABLE).open("a", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, cells.keys(), lineterminator="\n")
            if stream.tell() == 0:
                writer.writeheader()
            writer.writerow(cells)
        self.write_frames(TRAJECTORY, [self.frame(atoms, row)], append=True)

    def write_frames(self, name: str, frames: Sequence[Atoms], append: bool = False) -> None:
        """Write frames as extended XYZ, which every program reads."""
        with writing_explained(self.folder, DynamicsError):
            ase.io.write(self / name, frames, format="extxyz", append=append)

    def read_rows(self) -> dict[str, np.ndarray]:
        """The log, one array for each of its columns."""
        try:
            with (self / TABLE).open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
            found = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
            missing = [name for name in _NEEDED if name not in found]
            if missing:
                raise ValueError(f"no column {', '.join(missing)}")
            return found
        except (OSError, ValueError, TypeError, IndexError) as error:
            raise DynamicsError(f"The log '{self / TABLE}' cannot be read ({error}).") from error

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Save all that is needed to go on, in one step, with the lengths of the files."""
        lengths = [_length(self / name) for name in (TRAJECTORY, TABLE)]
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **state, lengths=np.array(lengths))
        with writing_explained(self.folder, DynamicsError):
            write_whole(self / STATE, content.getvalue())

    def load_state(self) -> dict[str, np.ndarray]:
        """Read the state, and cut off what trajectory and log have gained since."""
        with damage_explained(
            lambda why: DynamicsError(
                f"The state '{self / STATE}' is damaged ({why}). Start a new run from the last "
                f"frame of {TRAJECTORY}."
            )
        ):
            with np.load(self / STATE, allow_pickle=False) as file:
                state = dict(file)
            trajectory, table = (int(length) for length in state["lengths"])
        with writing_explained(self.folder, DynamicsError):
            for name, length in ((TRAJECTORY, trajectory), (TABLE, table)):
                if _length(self / name) < length:
                    raise DynamicsError(
                        f"'{self / name}' is shorter than when the state was saved: it was changed "
                        "since. Put it back, or start a new run."
                    )
                if length:
                    os.truncate(self / name, length)
        return state


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
