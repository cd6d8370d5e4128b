"""A run as it lies in its folder, read for its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase.data import atomic_numbers

from pet_finetune.checkpoint import load_checkpoint
from pet_finetune.committee.calibration import Curves
from pet_finetune.config.yaml_file import read_yaml
from pet_finetune.data.predicted import Predicted
from pet_finetune.errors import ConfigError, DataError, PetFinetuneError
from pet_finetune.files import read_object, read_table
from pet_finetune.log import get_logger
from pet_finetune.runs import works_elsewhere
from pet_finetune.training.run_files import (
    ABOUT,
    ADAPTER,
    BEST,
    DIMERS,
    LAST,
    LOG,
    OPTIONS,
    PREDICTIONS,
    REPORT,
    RESULTS,
    TABLE,
)

from .record import CommitteeRecord, Dimers, Epochs, RunRecord

_logger = get_logger(__name__)
_T = TypeVar("_T")
#: One of these is in every folder of a run.
_MARKS = (TABLE, RESULTS, LAST, BEST, ABOUT, LOG)


def read_run(folder: Path, leave_out: Collection[str] = ()) -> RunRecord:
    """Read what there is; a file that is missing or damaged leaves its part of the report out.

    Args:
        folder: of the run.
        leave_out: names of files that are not read.

    Raises:
        DataError: the folder holds no run.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder '{folder}'. Name the folder of a run.")
    members = sorted(path for path in folder.glob("member_*") if path.is_dir())
    if not members and not any((folder / name).exists() for name in _MARKS):
        raise DataError(
            f"'{folder}' holds no run: there is no {TABLE}, {RESULTS} or {LAST} in it. Name the "
            "folder that `pet-finetune train` wrote (outputs/DATE/TIME without -o)."
        )

    def read(reader: Callable[[Path], _T], path: Path) -> _T | None:
        return None if path.name in leave_out or not path.exists() else reader(path)

    own = members or [folder]
    results = read(_json, folder / RESULTS) or {}
    abouts = [read(_json, path / ABOUT) or {} for path in own]
    epochs = [read(_epochs, path / TABLE) or [] for path in own]
    about = _about(abouts[0], own[0])
    after = results.get("after", {}) if results else _so_far(epochs)
    curves = read(_curves, folder / f"{DIMERS}.csv") or {}
    return RunRecord(
        folder=str(folder),
        status="finished" if results else "running" if is_running(folder) else "interrupted",
        options=read(_options, folder / OPTIONS) or {},
        options_text=read(_text, folder / OPTIONS) or "",
        start=about,
        before=results.get("before") or about.pop("before", {}),
        after=after,
        parameters=results.get("parameters", {}),
        memory=_memory(abouts),
        epochs=epochs,
        predicted=read(_predicted, folder / PREDICTIONS),
        dimers=_dimers(curves, results.get("dimers", {})),
        committee=_committee(results, folder),
        last_layer=_curves_of(results.get("uncertainty", {})),
        files=_files(folder),
    )


def is_running(folder: Path) -> bool:
    """Whether another process works in the folder of a run, or in that of a member of it."""
    return any(works_elsewhere(path) for path in (folder, *folder.glob("member_*")))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _json(path: Path) -> dict[str, Any]:
    """The content of a file; nothing where it is damaged."""
    try:
        return read_object(path)
    except DataError as error:
        _logger.warning("%s The report does without.", error)
        return {}


def _options(path: Path) -> dict[str, Any]:
    """The options of the run; nothing where they are damaged."""
    try:
        return read_yaml(path)
    except ConfigError as error:
        _logger.warning("%s", error)
        return {}


def _about(start: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What ``run.json`` says; of a run without one, what its checkpoint says of itself."""
    if "versions" in start or not (folder / BEST).exists():
        return start
    try:
        provenance = load_checkpoint(folder / BEST).provenance
    except PetFinetuneError as error:
        _logger.warning("%s", error)
        return {}
    return {**start, **{key: value for key, value in provenance.items() if key != "options"}}


def _memory(abouts: list[dict[str, Any]]) -> dict[str, float | None]:
    """The largest peaks of the members, MiB."""
    found: dict[str, float | None] = {}
    for about in abouts:
        for key, value in about.get("peak_memory_mib", {}).items():
            if value is not None:
                found[key] = max(value, found.get(key) or 0.0)
    return found


def _epochs(path: Path) -> Epochs:
    """The rows of a table as numbers; empty cells and damaged rows are left out."""
    rows = []
    for row in _rows(path):
        with suppress(ValueError):
            rows.append({name: float(cell) for name, cell in row.items() if cell})
    return [row for row in rows if math.isfinite(row.get("epoch", math.nan))]


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it is damaged."""
    try:
        heading, rows = read_table(path)
    except DataError as error:
        _logger.warning("%s The report does without.", error)
        return []
    return [dict(zip(heading, row, strict=True)) for row in rows]


def _so_far(epochs: list[Epochs]) -> dict[str, Any]:
    """The validation errors of the best epoch of a run that has no results yet."""
    best = [row for row in epochs[0] if row.get("best") == 1] if len(epochs) == 1 else []
    targets: dict[str, dict[str, float]] = {}
    for name, value in best[-1].items() if best else ():
        group, _, rest = name.partition("/")
        target, _, error = rest.rpartition("/")
        if group == "validation" and target:
            targets.setdefault(target, {})[error] = value
    return {"validation": targets} if targets else {}


def _predicted(path: Path) -> Predicted | None:
    try:
        return Predicted.read(path)
    except DataError as error:
        _logger.warning("%s The report does without.", error)
        return None


#: Energies of a pair at its distances, by the name of the curve.
_Curve = dict[str, list[float]]


def _curves(path: Path) -> dict[str, tuple[list[float], _Curve]]:
    """Distances and energies of each pair of elements; none where the table is damaged."""
    found: dict[str, tuple[list[float], _Curve]] = {}
    try:
        for row in _rows(path):
            lengths, energies = found.setdefault(row.pop("pair"), ([], {}))
            lengths.append(float(row.pop("distance")))
            for name, energy in row.items():
                energies.setdefault(name, []).append(float(energy))
    except (KeyError, ValueError) as error:
        _logger.warning("'%s' is damaged and left out of the report (%s)", path, error)
        return {}
    return found


def _dimers(
    curves: Mapping[str, tuple[list[float], _Curve]], verdicts: Mapping[str, str]
) -> Dimers | None:
    """The curves, with what ``results.json`` says of them."""
    from pet_finetune.forgetting.dimers import DimerRow, wall_distance  # which wrote them

    known = {pair: curve for pair, curve in curves.items() if pair in verdicts}
    if not known:
        return None
    lengths = max((lengths for lengths, _ in known.values()), key=len)
    rows = [
        DimerRow(pair, energies, wall_distance(_numbers(pair)), verdicts[pair])
        for pair, (own, energies) in known.items()
        if own == lengths
    ]
    return Dimers(lengths, rows)


def _numbers(pair: str) -> tuple[int, int]:
    first, _, second = pair.partition("-")
    return atomic_numbers[first], atomic_numbers[second]


def _curves_of(calibration: Mapping[str, Any]) -> dict[str, Curves]:
    """Coverage curves as they stand in ``results.json``."""
    found = {}
    for name, curve in calibration.items():
        plain: dict[str, Any] = {
            key: np.array(value) if isinstance(value, list) else value
            for key, value in curve.items()
        }
        found[name] = Curves(**plain)
    return found


def _committee(results: Mapping[str, Any], folder: Path) -> CommitteeRecord | None:
    if "members" not in results:
        return None
    calibration = _curves_of(results.get("calibration", {}))
    reports = sorted(path.parent.name + f"/{REPORT}" for path in folder.glob(f"member_*/{REPORT}"))
    return CommitteeRecord(results["members"], calibration, reports)


def _files(folder: Path) -> dict[str, int]:
    """Sizes of what is there to be used, bytes."""
    found = {}
    if (folder / BEST).exists():
        found[BEST] = (folder / BEST).stat().st_size
    if (folder / ADAPTER).is_dir():
        found[ADAPTER] = sum(path.stat().st_size for path in (folder / ADAPTER).iterdir())
    return found
