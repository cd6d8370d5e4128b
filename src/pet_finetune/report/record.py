"""What the report is made of: all that a run left, as plain values and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pet_finetune.committee.calibration import Curves
from pet_finetune.data.predicted import Predicted

if TYPE_CHECKING:
    from pet_finetune.forgetting.dimers import DimerRow
from pet_finetune.keys import forces_key, stress_key

#: Errors of one model: ``errors[set][target]["forces_mae"]``, in eV, Å and the targets' own units.
ErrorTable = Mapping[str, Mapping[str, Mapping[str, float]]]
#: The rows of a ``train.csv``; cells that are empty there are absent.
Epochs = Sequence[Mapping[str, float]]

# Factor and unit in which errors of energies and their derivatives are shown, and the values.
_UNITS = {
    "energy": (1000.0, "meV/atom", "eV/atom"),
    "forces": (1000.0, "meV/Å", "eV/Å"),
    "stress": (1000.0, "meV/Å³", "eV/Å³"),
}


@dataclass(frozen=True)
class Quantity:
    """One kind of number that a model predicts and is compared in.

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

    @property
    def rmse(self) -> str:
        """The key of its root mean squared error."""
        return f"{self.kind}_rmse"


@dataclass(frozen=True)
class Dimers:
    """Dimer curves: distances in Å, and a row for each pair."""

    distances: Sequence[float]
    rows: Sequence[DimerRow]


@dataclass(frozen=True)
class CommitteeRecord:
    """What an ensemble knows of itself.

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
        """What the model before and the one after are called."""
        if not self.is_finetuning:
            return "untrained", "trained"
        return "starting model", "committee" if self.committee else "fine-tuned"

    @property
    def primary_set(self) -> str | None:
        """The set that says most of the model: the one it saw least of."""
        errors = self.after or self.before
        return next((name for name in ("test", "validation", "train") if name in errors), None)

    def quantities(self) -> list[Quantity]:
        """What is compared, in the order of the targets."""
        errors = self.after or self.before
        found = errors.get(self.primary_set or "", {}) or self._in_epochs()
        kinds = ("energy", "forces", "stress", "value")
        quantities = [
            self._quantity(target, kind, several=len(found) > 1)
            for target, values in found.items()
            for kind in kinds
            if f"{kind}_mae" in values
        ]
        return sorted(quantities, key=lambda quantity: quantity.kind == "value")  # energies first

    def _in_epochs(self) -> dict[str, dict[str, float]]:
        """Targets and errors that ``train.csv`` names, for a run without an evaluation."""
        found: dict[str, dict[str, float]] = {}
        for name in self.epochs[0][0] if self.epochs and self.epochs[0] else ():
            group, _, rest = name.partition("/")
            target, _, error = rest.rpartition("/")
            if group == "validation" and target:
                found.setdefault(target, {})[error] = 0.0
        return found

    def _quantity(self, target: str, kind: str, several: bool) -> Quantity:
        if kind == "value":
            about = self.start.get("targets", {}).get(target, {})
            factor, unit = about.get("shown", (1.0, ""))
            plain = _typeset(about.get("unit", ""))
            return Quantity(target, kind, target, float(factor), _typeset(unit), plain)
        # Of several targets the plain energy needs no name.
        name = f"{target} {kind}" if several and target != "energy" else kind
        return Quantity(target, kind, name, *_UNITS[kind])


def _typeset(unit: str) -> str:
    """A unit as it is printed: Å and raised digits."""
    parts = unit.replace("^2", "²").replace("^3", "³").split("/")
    return "/".join("Å" + part[1:] if part in ("A", "A²", "A³") else part for part in parts)
