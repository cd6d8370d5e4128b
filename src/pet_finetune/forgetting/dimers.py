"""Dimer curves: how two atoms of each pair of elements attract and repel each other."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from ase.data import chemical_symbols, covalent_radii
from torch import Tensor

from pet_finetune.data.structure_sets import find_species
from pet_finetune.graph import Batch
from pet_finetune.installation import drawn, plotting
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import evaluating
from pet_finetune.training.feature import Plan
from pet_finetune.training.run_files import DIMERS, RunFiles

from .replay import Keeping

_logger = get_logger(__name__)

#: Angstrom.
SHORTEST, LONGEST, STEP = 0.5, 6.0, 0.05
#: Below this part of the sum of the covalent radii there must be a wall...
_WALL = 0.7
#: ...and in any case up to here (Angstrom), for the sake of hydrogen.
_WALL_AT_LEAST = 0.65
# eV: a fall by less towards shorter distances is rounding, and a rise by less no wall.
_FLAT, _HIGH = 1e-3, 0.1
# Angstrom: beyond the reach of any model.
_APART = 1000.0
_PAIRS_AT_ONCE = 32
# PET is not invariant to rotations: one direction, without symmetry, the same for all.
_DIRECTION = torch.tensor([0.48, 0.60, 0.64], dtype=torch.float64)


@dataclass(frozen=True)
class DimerCurves:
    """Energies of dimers.

    Attributes:
        pairs: atomic numbers of the two atoms, the smaller first.
        energies: [n_pairs, n_distances] eV, relative to the two atoms far apart; the distances
            are those of :func:`distances`.
    """

    pairs: tuple[tuple[int, int], ...]
    energies: Tensor


def distances() -> Tensor:
    """The distances of a curve, [n_distances] float64, Angstrom."""
    return torch.arange(round((LONGEST - SHORTEST) / STEP) + 1, dtype=torch.float64) * STEP + (
        SHORTEST
    )


def pairs_of(species: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """All pairs of elements, an element with itself included."""
    return tuple(combinations_with_replacement(sorted(set(species)), 2))


def pair_name(pair: tuple[int, int]) -> str:
    """Such as ``C-O``."""
    return "-".join(chemical_symbols[number] for number in pair)


def dimer_curves(model: Potential, target: str, species: Iterable[int]) -> DimerCurves:
    """The curves of all pairs of some elements."""
    pairs = pairs_of(species)
    if not pairs:  # all elements are new to the foundation
        return DimerCurves((), torch.zeros(0, len(distances())))
    lengths = torch.cat([distances(), torch.tensor([_APART], dtype=torch.float64)])
    parts = []
    with evaluating(model), torch.no_grad():
        for some in torch.tensor(pairs).split(_PAIRS_AT_ONCE):
            batch = _dimers(some, lengths).to(model.device, model.dtype)
            parts.append(model.predict(batch, target, forces=False).energy.cpu())
    energies = torch.cat(parts).view(len(pairs), len(lengths))
    return DimerCurves(pairs, energies[:, :-1] - energies[:, -1:])


def _dimers(pairs: Tensor, lengths: Tensor) -> Batch:
    """Dimers of each pair, [n, 2], at each length, [m], as one batch of n m structures."""
    count = len(pairs) * len(lengths)
    numbers = pairs.repeat_interleave(len(lengths), dim=0).reshape(-1)
    outward = lengths.repeat(len(pairs)).unsqueeze(1) * _DIRECTION
    atoms = torch.arange(2 * count)
    opposite = atoms.view(-1, 2).flip(1).reshape(-1)
    return Batch(
        numbers=numbers,
        positions=torch.stack([torch.zeros_like(outward), outward], dim=1).reshape(-1, 3),
        edge_vectors=torch.stack([outward, -outward], dim=1).reshape(-1, 3),
        centers=atoms,
        neighbors=opposite,
        reverse=opposite,
        structure_index=atoms // 2,
        cells=torch.zeros(count, 3, 3, dtype=torch.float64),
        charges=torch.zeros(count, dtype=torch.int64),
        spins=torch.ones(count, dtype=torch.int64),
    )


def wall_distance(pair: tuple[int, int]) -> float:
    """The distance in Angstrom below which two atoms are too close.

    That is 0.7 of the sum of the covalent radii (ASE's table), and at least 0.65 Angstrom.
    """
    radii = float(covalent_radii[pair[0]] + covalent_radii[pair[1]])
    return max(_WALL * radii, _WALL_AT_LEAST)


def has_wall(pair: tuple[int, int], energies: Tensor) -> bool:
    """Whether the energy of a dimer rises steadily and by 0.1 eV where atoms are too close."""
    close = energies[distances() <= wall_distance(pair) + 1e-9]
    return bool((close.diff() < _FLAT).all()) and float(close[0] - close[-1]) > _HIGH


def verdict(pair: tuple[int, int], before: Tensor, after: Tensor) -> str:
    """Verdict on a pair's short-range repulsion: ``kept``, ``lost``, ``gained`` or ``absent``."""
    walls = has_wall(pair, before), has_wall(pair, after)
    return {
        (True, True): "kept",
        (True, False): "lost",
        (False, True): "gained",
        (False, False): "absent",
    }[walls]


_COLUMNS = 4
# eV: what lies outside is cut off, or the wells would not be seen beside the walls.
_LOWEST, _HIGHEST = -12.0, 12.0
_COLOURS = {"before": "0.55", "after": "tab:blue", "wall": "0.93"}


@dataclass(frozen=True)
class DimerRow:
    """The curves of one pair.

    Attributes:
        name: such as ``C-O``.
        curves: energies by name of the model, eV, one for each distance.
        wall: distance below which there should be a wall, Angstrom.
        verdict: what became of it.
    """

    name: str
    curves: Mapping[str, Sequence[float]]
    wall: float
    verdict: str


def dimers_csv(distances: Sequence[float], rows: Sequence[DimerRow]) -> str:
    """CSV text with a line for each pair and distance: pair, distance (Angstrom), energies (eV)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(rows[0].curves)
    writer.writerow(["pair", "distance", *names])
    for row in rows:
        for index, distance in enumerate(distances):
            energies = (f"{row.curves[name][index]:.6g}" for name in names)
            writer.writerow([row.name, f"{distance:g}", *energies])
    return text.getvalue()


def dimers_svg(distances: Sequence[float], rows: Sequence[DimerRow]) -> str:
    """A small plot for each pair, as SVG.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    rc_context, Figure = plotting()
    columns = min(_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    # Letters as letters and names by a fixed rule: the same curves give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dimers", "font.size": 8}):
        width, height = 2.4 * columns, 1.9 * lines + 0.4
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
        # Inches for the labels; matplotlib's own layout takes longer than all the rest.
        figure.subplots_adjust(
            left=0.7 / width,
            right=1 - 0.1 / width,
            bottom=0.5 / height,
            top=1 - 0.3 / height,
            wspace=0.25,
            hspace=0.25,
        )
        for axis, row in zip(axes, rows, strict=False):
            draw_pair(axis, distances, row, _COLOURS)
            axis.set_title(f"{row.name}: {row.verdict}", fontsize=8)
        for axis in axes[len(rows) :]:
            axis.set_visible(False)
        axes[0].legend(frameon=False)
        figure.supxlabel("distance (Å)", y=0.08 / height)
        figure.supylabel("energy (eV)", x=0.08 / width)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def draw_pair(
    axes: Any, distances: Sequence[float], row: DimerRow, colours: Mapping[str, str]
) -> None:
    """The curves of one pair, and where the wall should be."""
    for name, energies in row.curves.items():
        axes.plot(
            distances, energies, label=name, linewidth=1.2, color=colours.get(name),
            linestyle="--" if name == "before" else "-",
        )  # fmt: skip
    shown = [e for energies in row.curves.values() for e in energies]
    low, high = max(min(shown), _LOWEST), min(max(shown), _HIGHEST)
    margin = 0.05 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + margin)
    axes.axvspan(distances[0], row.wall, color=colours["wall"], linewidth=0)


_MEANING = {
    "kept": "kept",
    "lost": "LOST",
    "gained": "gained",
    "absent": "absent before and after",
}
#: More pairs than fit on a page are not drawn; the table has them all.
_MOST_DRAWN = 66


class DimerReport(Keeping):
    """Dimer curves of the starting model and the best one, side by side."""

    name = "dimers"

    def check(self, plan: Plan) -> None:
        """Note the run; there is nothing to read."""
        self._plan = plan

    def _made(self, model: Potential) -> dict[str, Any] | None:
        """The starting model's curves and the energy that they are of."""
        plan = self._plan
        if plan is None or plan.foundation is None or not plan.options.final_eval:
            return None
        target = next(iter(plan.foundation.sources), None)
        if target is None:
            return None
        species = [z for z in find_species(plan.training) if z in plan.foundation.species]
        return {"target": target, "before": dict(vars(dimer_curves(model, target, species)))}

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
    """Write the curves before and after, and log the repulsion of each pair.

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
    where = f" ({drawn})" if files.kept else ""
    _logger.info("repulsion at short distances%s: %s", where, "; ".join(parts))
    return verdicts


def _draw(lengths: list[float], rows: list[DimerRow], files: RunFiles) -> str:
    """Write the plot where that can be done; the name of the file to look at."""
    table = f"{files.folder / DIMERS}.csv"
    if len(rows) > _MOST_DRAWN:
        _logger.info("dimer curves of %d pairs are not drawn: too many for a page", len(rows))
        return table
    picture = f"{DIMERS}.svg"
    if drawn(picture, lambda: files.write(picture, dimers_svg(lengths, rows))):
        return str(files.folder / picture)
    return table
