"""A simulation from its checks to its table and plot."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.optimize import FIRE
from rich.table import Table

from pet_finetune.config.problems import check_kind
from pet_finetune.device import plain_torch
from pet_finetune.dynamics.integrators import MDSettings
from pet_finetune.dynamics.loop import Outcome, simulate
from pet_finetune.dynamics.md_files import MDFiles
from pet_finetune.errors import DynamicsError, PetFinetuneError
from pet_finetune.installation import drawn
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.runs import STARTED, own_folder, starts_of
from pet_finetune.terminal import InterruptGuard, show

from .integrators import degrees_of_freedom, draw_velocities, keeps_momentum, temperature
from .md_checks import ModelChoice, check_start, chosen_model
from .md_files import FINAL, LOG, PLOT, RESULTS, TRAJECTORY
from .measure import MDDisplay, Summary, simulation_svg, summarize

_logger = get_logger(__name__)
_RELAXED = 0.05  # eV/A
_LARGE_FORCE = 15.0  # eV/A; at 300 K the largest are near 5


@dataclass(frozen=True)
class MDResult:
    """Result of a simulation.

    Attributes:
        folder: where its files are.
        outcome: how it ended.
        summary: its figures.
    """

    folder: Path
    outcome: Outcome
    summary: Summary


@plain_torch()
def run_md(
    model: ModelChoice | str | Path,
    structure: str | Path | Atoms,
    settings: MDSettings,
    folder: str | Path | None = None,
    *,
    index: int | None = None,
    format: str = "",
    types: Mapping[int, str] | None = None,
) -> MDResult:
    """Simulate a structure, and print a short summary.

    Args:
        model: which model: a checkpoint, or more.
        structure: any file ASE reads, or a structure.
        settings: how to move the atoms.
        folder: where trajectory, log, plot and state go; ``outputs/DATE/TIME`` without it. It
            belongs to this process until the run ends.
        index: frame of the file; None for the last.
        format: ASE's name of the file's format; guessed where empty.
        types: elements by type of atom, for LAMMPS files that do not say them.

    Raises:
        ConfigError: anything that can be seen to be wrong before the first step, all at once.
        DynamicsError: the folder holds a simulation already, or this one has gone wrong.
    """
    check_kind("settings", settings, MDSettings)
    model = chosen_model(model)
    if folder is not None:
        MDFiles.check_free(Path(folder))
    atoms, calculator = check_start(model, structure, settings, index, format, types)
    with own_folder(folder) as path:
        MDFiles.check_free(path)  # it may have been filled since
        files = MDFiles(path)
        setup_logging(file=files / LOG)
        filled = settings.filled(random.SystemRandom().randrange(2**31))
        with_hydrogen = 1 in atoms.numbers
        for warning in settings.warnings(with_hydrogen):
            _logger.warning(warning)
        rng = np.random.default_rng(filled.seed)
        atoms.calc = calculator
        _relax(atoms, filled)
        _start_moving(atoms, filled, rng, structure)
        files.write_start(atoms, _record(model, filled, {}))
        _announce(atoms, filled, model)
        return _go(atoms, filled, files, rng)


@plain_torch()
def restart_md(
    folder: str | Path, *, model: Mapping[str, Any] | None = None, steps: int | None = None
) -> MDResult:
    """Go on with a simulation exactly where its last state was saved.

    Args:
        folder: of the run.
        model: attributes of :class:`ModelChoice` to replace, such as a checkpoint that was moved.
        steps: in all, where there are to be more than first asked for.

    Raises:
        DynamicsError: there is no state, nothing is left to do, or the model is another one.
    """
    MDFiles.existing(Path(folder))
    with own_folder(folder) as path:
        files = MDFiles.existing(path)
        state = files.load_state()
        setup_logging(file=files / LOG)
        atoms, kept = files.read_start()
        settings = MDSettings(**kept["settings"])
        if steps is not None:
            settings = replace(settings, steps=steps)
        done = int(state["integrator/nsteps"])
        if done >= settings.steps:
            raise DynamicsError(
                f"--restart: the run in '{files.folder}' has made {done} steps of "
                f"{settings.steps}: nothing is left to do. Ask for more with --steps."
            )
        kept_model = {**kept["model"], "adapters": tuple(kept["model"]["adapters"])}
        chosen = ModelChoice(**{**kept_model, **(model or {})})
        atoms.calc = chosen.open(settings.stop_uncertainty is not None)
        files.write_start(atoms, _record(chosen, settings, kept))
        _logger.info("going on from step %d of %d in %s", done, settings.steps, files.folder)
        return _go(atoms, settings, files, np.random.default_rng(settings.seed), state)


def _record(model: ModelChoice, settings: MDSettings, before: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``md.json`` for a run, given the earlier one."""
    plain = {"model": asdict(model.absolute()), "settings": asdict(settings)}
    return {**plain, STARTED: starts_of(before)}


def _relax(atoms: Atoms, settings: MDSettings) -> None:
    """Relax the start if requested, and warn of very large forces."""
    before = _largest_force(atoms)
    if settings.minimize:
        FIRE(atoms, logfile=None).run(fmax=_RELAXED, steps=settings.minimize)
        _logger.info(
            "relaxed with FIRE: largest force %.2f eV/A before, %.3f after",
            before,
            _largest_force(atoms),
        )
    elif before > _LARGE_FORCE:
        _logger.warning(
            "the largest force at the start is %.1f eV/A, and near 5 would be usual at room "
            "temperature: the structure is strained, or the model does not know it. "
            "--minimize 200 relaxes it first.",
            before,
        )


def _largest_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


def _start_moving(
    atoms: Atoms, settings: MDSettings, rng: np.random.Generator, structure: str | Path | Atoms
) -> None:
    """Keep the velocities of the file, or draw new ones."""
    given = bool(atoms.get_momenta().any())
    if given and settings.velocities != "new":
        freedom = degrees_of_freedom(atoms, keeps_momentum(settings))
        _logger.info(
            "velocities: those of %s, %.0f K (--new-velocities draws others)",
            structure,
            temperature(atoms, freedom),
        )
        return
    draw_velocities(atoms, settings.temperature, rng)
    _logger.info(
        "velocities: drawn for %g K (seed %d), without momentum and rotation of the whole",
        settings.temperature,
        settings.seed,
    )


def _announce(atoms: Atoms, settings: MDSettings, model: ModelChoice) -> None:
    how = settings.ensemble
    if settings.thermostat is not None and settings.ensemble == "nvt":
        how += f" ({settings.thermostat})"
    if settings.ensemble == "npt":
        how += f" ({settings.barostat}, {settings.pressure:g} GPa)"
    with_what = f"a committee of {model.checkpoint}" if model.is_committee else model.checkpoint
    _logger.info(
        "%s of %s, %d atoms, with %s: %d steps of %g fs at %g K",
        how.upper() if how == settings.ensemble else how[:3].upper() + how[3:],
        atoms.get_chemical_formula(),
        len(atoms),
        with_what,
        settings.steps,
        settings.timestep,
        settings.temperature,
    )


def _go(
    atoms: Atoms,
    settings: MDSettings,
    files: MDFiles,
    rng: np.random.Generator,
    state: Mapping[str, Any] | None = None,
) -> MDResult:
    """Simulate with display and Ctrl-C looked after; then plot and table, of what there is."""
    done = 0 if state is None else int(state["integrator/nsteps"])
    try:
        with InterruptGuard() as guard, MDDisplay(settings.steps, done, len(atoms)) as display:
            outcome = simulate(
                atoms,
                settings,
                files,
                rng=rng,
                show=display.step,
                stop=lambda: guard.requested,
                state=state,
            )
    except PetFinetuneError as error:
        _logger.error("%s", error, extra=FILE_ONLY)
        _draw(files, settings, len(atoms))
        raise
    files.write_frames(FINAL, [files.frame(atoms, outcome.row)])
    _draw(files, settings, len(atoms))
    _explain(outcome, settings, files)
    summary = summarize(files.read_rows(), len(atoms))
    _report(summary, outcome, settings, files)
    return MDResult(files.folder, outcome, summary)


def _draw(files: MDFiles, settings: MDSettings, atoms: int) -> None:
    """Write the plot where that can be done."""
    limit = settings.stop_uncertainty

    def draw() -> None:
        svg = simulation_svg(files.read_rows(), atoms, settings.temperature, limit)
        files.write(PLOT, svg)

    drawn(PLOT, draw)


def _explain(outcome: Outcome, settings: MDSettings, files: MDFiles) -> None:
    """Say why a run ended before its last step."""
    if outcome.reason == "finished":
        return
    if outcome.reason == "uncertain":
        assert settings.stop_uncertainty is not None
        assert outcome.row.forces_uncertainty is not None
        _logger.warning(
            "stopped at step %d: the force on an atom is uncertain by %.3f eV/A, more than "
            "--stop-uncertainty %g. The structure is in %s: label it and train on it.",
            outcome.row.step,
            outcome.row.forces_uncertainty,
            settings.stop_uncertainty,
            files / FINAL,
        )
        return
    _logger.warning(
        "interrupted at step %d; the state is saved. Go on with: %s",
        outcome.row.step,
        shlex.join(["pet-finetune", "md", "--restart", str(files.folder)]),
    )


def _report(summary: Summary, outcome: Outcome, settings: MDSettings, files: MDFiles) -> None:
    """Print the summary, and write it as JSON."""
    per_second = outcome.steps / max(outcome.seconds, 1e-9)
    speed = per_second * settings.timestep * 1e-6 * 86400.0
    content = {
        "reason": outcome.reason,
        "steps": outcome.row.step,
        **asdict(summary),
        "steps_per_second": per_second,
        "ns_per_day": speed,
    }
    files.write(RESULTS, json.dumps(content, indent=2) + "\n")
    there = [(what, files / name) for what, name in (("frames", TRAJECTORY), ("plot", PLOT))]
    notes = "\n".join(f"{what}: {path}" for what, path in there if path.exists())
    table = Table(title="simulation", title_justify="left", show_header=False, caption=notes)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for cells in _rows(summary, outcome, per_second, speed):
        table.add_row(*cells)
    _logger.info("summary\n%s", show(table), extra=FILE_ONLY)
    if summary.drifts:
        _logger.warning(
            "the conserved energy drifts by %.2f meV/atom/ps: try a shorter --timestep, then "
            "--dtype float64.",
            summary.drift,
        )


def _rows(
    summary: Summary, outcome: Outcome, per_second: float, speed: float
) -> Sequence[tuple[str, str, str]]:
    """Name, value and unit of what there is to show."""
    of_half = "mean of the second half"
    rows = [
        ("steps", f"{outcome.row.step}", outcome.reason),
        ("time", f"{summary.time:.4g}", "ps"),
        (
            "temperature",
            f"{summary.temperature:.1f} ± {summary.temperature_deviation:.1f}",
            f"K, {of_half}",
        ),
    ]
    if summary.drift is not None:
        drift = f"{summary.drift:+.3f} ± {summary.drift_error:.3f}"
        rows.append(("drift of the conserved energy", drift, "meV/atom/ps"))
        rows.append(("fluctuation around it", f"{summary.fluctuation:.3f}", "meV/atom"))
    if summary.volume is not None:
        rows.append(("volume", f"{summary.volume:.1f}", f"A^3, {of_half}"))
    if summary.pressure is not None:
        rows.append(("pressure", f"{summary.pressure:.3f}", f"GPa, {of_half}"))
    if summary.uncertainty is not None:
        where = f"meV/A, of the force on an atom, at step {summary.uncertain_at}"
        rows.append(("largest uncertainty", f"{1000 * summary.uncertainty:.0f}", where))
    return [*rows, ("speed", f"{per_second:.1f}", "steps/s"), ("", f"{speed:.3g}", "ns/day")]
