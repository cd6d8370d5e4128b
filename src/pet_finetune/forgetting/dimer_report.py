"""Dimer curves at the end of a run: what became of the repulsion at short distances."""

from __future__ import annotations

from pet_finetune.errors import PetFinetuneError
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.training.run_files import DIMERS, RunFiles

from .dimer_plot import DimerRow, dimers_csv, dimers_svg
from .dimers import dimer_curves, distances, pair_name, verdict, wall_distance
from .kept import KeptDimers

_logger = get_logger(__name__)

_MEANING = {
    "kept": "kept",
    "lost": "LOST",
    "gained": "gained",
    "absent": "absent before and after",
}
#: More pairs than fit on a page are not drawn; the table has them all.
_MOST_DRAWN = 66


def report_dimers(kept: KeptDimers | None, model: Potential, files: RunFiles) -> dict[str, str]:
    """Write the curves before and after, and say what became of each pair's wall.

    Args:
        kept: the starting model's curves; None where there are none to compare with.
        model: the best model.
        files: of the run.

    Returns:
        What became of the wall, by pair.
    """
    if kept is None or not kept.before.pairs:
        return {}
    pairs = kept.before.pairs
    after = dimer_curves(model, kept.target, {z for pair in pairs for z in pair})
    rows = [
        DimerRow(
            name=pair_name(pair),
            curves={"before": old.tolist(), "after": new.tolist()},
            wall=wall_distance(pair),
            verdict=verdict(pair, old, new),
        )
        for pair, old, new in zip(pairs, kept.before.energies, after.energies, strict=True)
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
