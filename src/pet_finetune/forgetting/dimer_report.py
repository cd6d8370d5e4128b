"""Dimer curves at the end of a run: what became of the repulsion at short distances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pet_finetune.data.species import find_species
from pet_finetune.errors import PetFinetuneError
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.training.feature import Feature, Plan, TrainingRun
from pet_finetune.training.run_files import DIMERS, RunFiles

from .dimer_plot import DimerRow, dimers_csv, dimers_svg
from .dimers import DimerCurves, dimer_curves, distances, pair_name, verdict, wall_distance

_logger = get_logger(__name__)

_MEANING = {
    "kept": "kept",
    "lost": "LOST",
    "gained": "gained",
    "absent": "absent before and after",
}
#: More pairs than fit on a page are not drawn; the table has them all.
_MOST_DRAWN = 66


class DimerReport(Feature):
    """Dimer curves of the starting model and the best one, side by side."""

    name = "dimers"

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._kept: dict[str, Any] | None = None

    def check(self, plan: Plan) -> None:
        """Note the run; there is nothing to read."""
        self._plan = plan

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Compute the starting model's curves, or take them as they were kept."""
        self._kept = dict(kept) if kept else self._curves(trainer.model)

    def _curves(self, model: Potential) -> dict[str, Any] | None:
        plan = self._plan
        if plan is None or plan.foundation is None or not plan.options.final_eval:
            return None
        target = next(iter(plan.foundation.sources), None)
        if target is None:
            return None
        species = [z for z in find_species(plan.training) if z in plan.foundation.species]
        return {"target": target, "before": dict(vars(dimer_curves(model, target, species)))}

    def kept(self) -> dict[str, Any] | None:
        """The starting model's curves and the energy that they are of."""
        return self._kept

    def finish(self, best: Potential, files: RunFiles) -> Mapping[str, Any]:
        """Write curves and plot; what became of the repulsion of each pair."""
        if self._kept is None:
            return {}
        before = DimerCurves(**self._kept["before"])
        if not before.pairs:
            return {}
        verdicts = report_dimers(before, self._kept["target"], best, files)
        return {"dimers": verdicts} if verdicts else {}


def report_dimers(
    before: DimerCurves, target: str, model: Potential, files: RunFiles
) -> dict[str, str]:
    """Write the curves before and after, and say what became of each pair's wall.

    Args:
        before: the starting model's curves.
        target: the energy that they are of.
        model: the best model.
        files: of the run.

    Returns:
        What became of the wall, by pair.
    """
    pairs = before.pairs
    after = dimer_curves(model, target, {z for pair in pairs for z in pair})
    rows = [
        DimerRow(
            name=pair_name(pair),
            curves={"before": old.tolist(), "after": new.tolist()},
            wall=wall_distance(pair),
            verdict=verdict(pair, old, new),
        )
        for pair, old, new in zip(pairs, before.energies, after.energies, strict=True)
    ]
    lengths = distances().tolist()
    files.write(f"{DIMERS}.csv", dimers_csv(lengths, rows))
    drawn = _draw(lengths, rows, files)
    verdicts = {row.name: row.verdict for row in rows}
    parts = []
    for kind, words in _MEANING.items():
        names = [name for name, found in verdicts.items() if found == kind]
        if names:
            parts.append(f"{words}: {' '.join(names)}")
    _logger.info("repulsion at short distances (%s): %s", drawn, "; ".join(parts))
    return verdicts


def _draw(lengths: list[float], rows: list[DimerRow], files: RunFiles) -> str:
    """Write the plot where that can be done; the name of the file to look at."""
    table = f"{files.folder / DIMERS}.csv"
    if len(rows) > _MOST_DRAWN:
        _logger.info("dimer curves of %d pairs are not drawn: too many for a page", len(rows))
        return table
    try:
        files.write(f"{DIMERS}.svg", dimers_svg(lengths, rows))
    except PetFinetuneError as error:
        _logger.info("dimer curves are not drawn. %s", error)
        return table
    return f"{files.folder / DIMERS}.svg"
