"""Data of the report: a run's folder, read as plain values and arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pet_finetune.committee.calibration import Curves
from pet_finetune.data.predicted import Predicted

if TYPE_CHECKING:
    from pet_finetune.forgetting.dimers import DimerRow
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

from ase.data import atomic_numbers

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.load import read_yaml
from pet_finetune.errors import ConfigError, DataError, PetFinetuneError
from pet_finetune.files import read_object, read_table
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.runs import works_elsewhere
from pet_finetune.training.metrics import SHOWN
from pet_finetune.training.run_files import (
    ABOUT,
    BEST,
    DIMERS,
    LAST,
    LOG,
    OPTIONS,
    PREDICTIONS,
    REPORT,
    RESULTS,
    TABLE,
    Epochs,
    read_epochs,
    sizes_of,
)

_logger = get_logger(__name__)

#: Errors of one model: ``errors[set][target]["forces_mae"]``, in eV, Å and the targets' own units.
ErrorTable = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Quantity:
    """A quantity in which predictions and labels are compared.

    Attributes:
        target: which target of the model.
        kind: ``energy``, ``forces`` or ``stress`` of an energy, ``value`` of anything else.
        name: in words.
        factor, unit: an error times the factor is in the unit; energies are per atom.
        plain: unit of the values.
    """

    target: str
    kind: str
    name: str
    factor: float
    unit: str
    plain: str = ""

    @property
    def error(self) -> str:
        """Its error in a sentence: ``force error``."""
        return f"{self.name.replace('forces', 'force')} error"

    @property
    def label(self) -> str:
        """The name of its labels and predictions in :class:`Predicted`."""
        names = {"forces": forces_key(self.target), "stress": stress_key(self.target)}
        return names.get(self.kind, self.target)

    @property
    def mae(self) -> str:
        """The key of its mean absolute error in a table of errors."""
        return f"{self.kind}_mae"

    def error_in(self, errors: ErrorTable, set_name: str | None, statistic: str = "mae") -> float:
        """Its error on a set (``mae`` or ``rmse``), in its unit; NaN where that is unknown."""
        of_target = errors.get(set_name or "", {}).get(self.target, {})
        return float(of_target.get(f"{self.kind}_{statistic}", math.nan)) * self.factor


@dataclass(frozen=True)
class Dimers:
    """Dimer curves: distances in Å, and a row for each pair."""

    distances: Sequence[float]
    rows: Sequence[DimerRow]


@dataclass(frozen=True)
class CommitteeRecord:
    """Record of an ensemble.

    Attributes:
        errors: of each member.
        reports: the members' own, relative to the folder.
        calibration: coverage curves by kind.
    """

    errors: Sequence[ErrorTable]
    calibration: Mapping[str, Curves]
    reports: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run as it lies in its folder; what is not there is empty or None.

    Attributes:
        folder: as the user names it.
        status: ``finished``, ``interrupted`` or ``running``.
        options: of the run, and the text of their file.
        start: what ``run.json`` says: parent, baselines, what trains, data, versions.
        before, after: errors of the starting model and of the best one.
        parameters: ``trainable`` and ``total``.
        memory: peaks in MiB, ``process`` and ``gpu``.
        epochs: rows of ``train.csv``; of an ensemble, of each member.
        predicted: the structures that the model is judged by, with predictions.
        dimers: curves before and after.
        committee: of an ensemble.
        last_layer: of a run with ``finetune.llpr``, coverage curves by target.
        files: names and sizes in bytes of what the run wrote for use.
    """

    folder: str
    status: str
    options: Mapping[str, Any] = field(default_factory=dict)
    options_text: str = ""
    start: Mapping[str, Any] = field(default_factory=dict)
    before: ErrorTable = field(default_factory=dict)
    after: ErrorTable = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    memory: Mapping[str, float | None] = field(default_factory=dict)
    epochs: Sequence[Epochs] = ()
    predicted: Predicted | None = None
    dimers: Dimers | None = None
    committee: CommitteeRecord | None = None
    last_layer: Mapping[str, Curves] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)

    @property
    def training(self) -> Mapping[str, Any]:
        """The options ``architecture.training``."""
        section: Mapping[str, Any] = self.options.get("architecture", {}).get("training", {})
        return section

    @property
    def finetune(self) -> Mapping[str, Any]:
        """The options ``architecture.training.finetune``."""
        section: Mapping[str, Any] = self.training.get("finetune", {})
        return section

    @property
    def is_finetuning(self) -> bool:
        """Whether the run started from a model rather than from scratch."""
        return self.start.get("parent_fingerprint") is not None or bool(
            self.finetune.get("read_from")
        )

    @property
    def names(self) -> tuple[str, str]:
        """Names of the model before and after."""
        if not self.is_finetuning:
            return "untrained", "trained"
        return "starting model", "committee" if self.committee else "fine-tuned"

    @property
    def primary_set(self) -> str | None:
        """The primary set: the one that training saw least of."""
        errors = self.after or self.before
        return next((name for name in ("test", "validation", "train") if name in errors), None)

    def quantities(self) -> list[Quantity]:
        """Compared quantities, in the order of the targets."""
        errors = self.after or self.before
        found = errors.get(self.primary_set or "", {})
        if not found and self.epochs and self.epochs[0]:  # a run without an evaluation
            found = validation_errors(self.epochs[0][0])
        kinds = ("energy", "forces", "stress", "value")
        quantities = [
            self._quantity(target, kind, several=len(found) > 1)
            for target, values in found.items()
            for kind in kinds
            if f"{kind}_mae" in values
        ]
        return sorted(quantities, key=lambda quantity: quantity.kind == "value")  # energies first

    def _quantity(self, target: str, kind: str, several: bool) -> Quantity:
        if kind == "value":
            about = self.start.get("targets", {}).get(target, {})
            factor, unit = about.get("shown", (1.0, ""))
            plain = _typeset(about.get("unit", ""))
            return Quantity(target, kind, target, float(factor), _typeset(unit), plain)
        # Of several targets the plain energy needs no name.
        name = f"{target} {kind}" if several and target != "energy" else kind
        factor, unit = SHOWN[kind]
        plain = _typeset(unit.removeprefix("m"))
        return Quantity(target, kind, name, factor, _typeset(unit), plain)


def best_row(rows: Epochs) -> Mapping[str, float]:
    """The row of the last epoch that was the best so far; empty where none was."""
    return next((row for row in reversed(rows) if row.get("best") == 1), {})


def validation_errors(row: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The validation errors in a row of ``train.csv``, by target and name."""
    found: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        group, _, rest = name.partition("/")
        target, _, error = rest.rpartition("/")
        if group == "validation" and target:
            found.setdefault(target, {})[error] = value
    return found


def _typeset(unit: str) -> str:
    """A unit as it is printed: Å and raised digits."""
    parts = unit.replace("^2", "²").replace("^3", "³").split("/")
    return "/".join("Å" + part[1:] if part in ("A", "A²", "A³") else part for part in parts)


_T = TypeVar("_T")
#: One of these is in every folder of a run.
_MARKS = (TABLE, RESULTS, LAST, BEST, ABOUT, LOG)


def read_run(folder: Path, leave_out: Collection[str] = ()) -> RunRecord:
    """Read what there is; a file that is missing or damaged leaves its part of the report out.

    Raises:
        DataError: the folder holds no run.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder '{folder}'. Name the folder of a run.")
    if (folder / "md.json").exists() and not (folder / TABLE).exists():
        raise DataError(
            f"'{folder}' holds a simulation of `md`, which has its own figures (md.svg, "
            f"{RESULTS}). Reports are made of runs of `train`."
        )
    members = sorted(path for path in folder.glob("member_*") if path.is_dir())
    if not members and not any((folder / name).exists() for name in _MARKS):
        raise DataError(
            f"'{folder}' holds no run: there is no {TABLE}, {RESULTS} or {LAST} in it. Name the "
            "folder that `pet-finetune train` wrote (outputs/DATE/TIME without -o)."
        )

    def read(reader: Callable[[Path], _T], path: Path) -> _T | None:
        """Result of a reader; None if the file is missing, damaged or left out."""
        if path.name in leave_out or not path.exists():
            return None
        try:
            return reader(path)
        except (ConfigError, DataError) as error:
            _logger.warning("%s The report does without.", error)
            return None

    own = members or [folder]
    results = read(read_object, folder / RESULTS) or {}
    abouts = [read(read_object, path / ABOUT) or {} for path in own]
    epochs = [read(read_epochs, path / TABLE) or [] for path in own]
    about = _about(abouts[0], own[0])
    after = results.get("after", {})
    if not results and len(epochs) == 1 and (errors := validation_errors(best_row(epochs[0]))):
        after = {"validation": errors}  # so far
    dimers = partial(_dimers, verdicts=results.get("dimers", {}))
    return RunRecord(
        folder=str(folder),
        status="finished" if results else "running" if is_running(folder) else "interrupted",
        options=read(read_yaml, folder / OPTIONS) or {},
        options_text=read(partial(Path.read_text, errors="replace"), folder / OPTIONS) or "",
        start=about,
        before=results.get("before") or about.pop("before", {}),
        after=after,
        parameters=results.get("parameters", {}),
        memory=_memory(abouts),
        epochs=epochs,
        predicted=read(Predicted.read, folder / PREDICTIONS),
        dimers=read(dimers, folder / f"{DIMERS}.csv"),
        committee=_committee(results, folder),
        last_layer=_curves_of(results.get("uncertainty", {})),
        files=sizes_of(folder),
    )


def is_running(folder: Path) -> bool:
    """Whether another process works in the folder of a run, or in that of a member of it."""
    return any(works_elsewhere(path) for path in (folder, *folder.glob("member_*")))


def _about(start: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Content of ``run.json``, or else the provenance of the checkpoint."""
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


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    heading, rows = read_table(path)
    return [dict(zip(heading, row, strict=True)) for row in rows]


def _dimers(path: Path, verdicts: Mapping[str, str]) -> Dimers | None:
    """The curves of the pairs of elements that ``results.json`` judges."""
    from pet_finetune.forgetting.dimers import DimerRow, wall_distance  # which wrote them

    curves: dict[str, tuple[list[float], dict[str, list[float]]]] = {}
    try:
        for row in _rows(path):
            lengths, energies = curves.setdefault(row.pop("pair"), ([], {}))
            lengths.append(float(row.pop("distance")))
            for name, energy in row.items():
                energies.setdefault(name, []).append(float(energy))
    except (KeyError, ValueError) as error:
        raise DataError(f"'{path}' is damaged ({error}).") from error
    known = {pair: curve for pair, curve in curves.items() if pair in verdicts}
    if not known:
        return None
    lengths = max((lengths for lengths, _ in known.values()), key=len)
    rows = [
        DimerRow(
            pair, energies, wall_distance((atomic_numbers[a], atomic_numbers[b])), verdicts[pair]
        )
        for pair, (own, energies) in known.items()
        for a, b in [pair.split("-")]
        if own == lengths
    ]
    return Dimers(lengths, rows)


def _curves_of(calibration: Mapping[str, Mapping[str, Any]]) -> dict[str, Curves]:
    """Coverage curves from ``results.json``."""
    return {name: Curves.from_plain(curve) for name, curve in calibration.items()}


def _committee(results: Mapping[str, Any], folder: Path) -> CommitteeRecord | None:
    if "members" not in results:
        return None
    calibration = _curves_of(results.get("calibration", {}))
    reports = sorted(path.parent.name + f"/{REPORT}" for path in folder.glob(f"member_*/{REPORT}"))
    return CommitteeRecord(results["members"], calibration, reports)
